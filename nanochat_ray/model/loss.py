"""Cross entropy of softly capped logits, in chunks of tokens: the logits of a whole batch are never held.

At 16,384 tokens and a vocabulary of 65,536 they would take 4 GB in fp32, and most of the step's memory traffic.
"""

import math
from functools import lru_cache

import torch

from nanochat_ray.model.compiling import compile_static

LOGIT_SOFTCAP = 15.0
# Tokens per chunk on a CPU. Fewer read and write the head's gradient too often, and the logits of more don't fit the
# CPU's caches.
CHUNK_TOKENS = 512
GPU_CHUNK_LOGITS = 2**28  # on a GPU; smaller chunks would read and write the head's gradient too often
IGNORED = -1  # target of a token without loss


def softcap(logits: torch.Tensor) -> torch.Tensor:
    """Compute 15·tanh(logits/15) (arXiv:2408.00118) in fp32, as 30·σ(2·logits/15) − 15: one exp instead of a tanh."""
    return 2 * LOGIT_SOFTCAP * torch.sigmoid(logits.float() * (2 / LOGIT_SOFTCAP)) - LOGIT_SOFTCAP


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses () and each token's loss (N,), in nats and fp32. Only the sum has a gradient.

    hidden is (N, C) in the compute dtype, weight (V, C) is the head, targets (N,) are token ids. A token with target −1
    has a loss of 0 and no gradient. compiled: run the passes over the logits under torch.compile.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _CrossEntropy.apply(hidden, weight, targets, compiled)
    losses = _chunks(hidden, weight, targets, compiled)
    return losses.sum(), losses


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while it has a chunk's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        ctx.gradients = torch.empty_like(hidden), torch.zeros_like(weight)
        losses = _chunks(hidden, weight, targets, compiled, *ctx.gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # they are scaled in place, so a second backward must fail
        return grad_hidden.mul_(grad_sum), grad_weight.mul_(grad_sum), None, None


def _chunks(hidden, weight, targets, compiled, grad_hidden=None, grad_weight=None) -> torch.Tensor:
    sum_exp, gradient_ = _compiled_passes() if compiled else (_sum_exp, _gradient_)
    weight = weight.to(hidden.dtype)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    size = chunk_size(len(weight), hidden.is_cuda)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        x, valid = hidden[part], (targets[part] != IGNORED).unsqueeze(-1)
        column = targets[part].clamp(min=0).unsqueeze(-1)
        logits = x @ weight.T
        target_logits = logits.gather(-1, column)
        total = sum_exp(logits)
        losses[part] = ((total.log() + LOGIT_SOFTCAP - softcap(target_logits)) * valid).squeeze(-1)
        if grad_hidden is not None:
            gradient_(logits, valid / total)  # logits now holds its own gradient, except for the targets' part
            logits.scatter_(-1, column, logits.gather(-1, column) - (_slope(target_logits) * valid).to(logits.dtype))
            torch.mm(logits, weight, out=grad_hidden[part])
            add_product_(grad_weight, logits.T, x)  # ty: ignore[invalid-argument-type]
    return losses


def chunk_size(vocab_size: int, on_gpu: bool) -> int:
    """Return the number of tokens per chunk."""
    return max(1, GPU_CHUNK_LOGITS // vocab_size) if on_gpu else CHUNK_TOKENS


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to total in place. The matmul adds to it directly, except in bf16 on a CPU, where it can't."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


# exp needs no maximum subtracted: capped logits are at most 15, so exp(capped − 15) does not overflow, and its sum over
# a vocabulary does not vanish. Two passes, each fused into one loop, are faster than one that stores shared results. On
# GPUs the passes were bound by arithmetic: a compiled exp takes some ten instructions there, an exp2 takes one.


def _gap(logits: torch.Tensor) -> torch.Tensor:
    """Return (15 − softcap(logits)) / 30, as σ(−2·logits/15)."""
    return 1 / (1 + torch.exp2(logits.float() * (2 / LOGIT_SOFTCAP / math.log(2))))


def _exp_capped(gap: torch.Tensor) -> torch.Tensor:
    """Return exp(softcap(logits) − 15)."""
    return torch.exp2(gap * (-2 * LOGIT_SOFTCAP / math.log(2)))


def _sum_exp(logits: torch.Tensor) -> torch.Tensor:
    return _exp_capped(_gap(logits)).sum(-1, keepdim=True)


def _gradient_(logits: torch.Tensor, scale: torch.Tensor) -> None:
    """Overwrite logits by the derivative of log(_sum_exp(logits)). scale (n, 1) is 1/_sum_exp(logits), or 0."""
    logits.copy_(_exp_capped(_gap(logits)) * _slope(logits) * scale)


def _slope(logits: torch.Tensor) -> torch.Tensor:
    """Return the derivative of softcap, 1 − tanh²."""
    gap = _gap(logits)
    return 4 * gap * (1 - gap)


@lru_cache(maxsize=1)
def _compiled_passes():
    return compile_static(_sum_exp), compile_static(_gradient_)
