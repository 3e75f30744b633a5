"""Cross entropy of softly capped logits, by chunks of tokens: the logits of a whole batch are never held.

At 16,384 tokens and a vocabulary of 65,536 they would take 4 GB in fp32, and most of the step's memory traffic.
"""

import math
from functools import lru_cache

import torch

from nanochat_ray.model.compiling import compile_static

LOGIT_SOFTCAP = 15.0
CHUNK_LOGITS = 2**24  # logits held at once on a CPU, whose caches they should fit
GPU_CHUNK_LOGITS = 2**28  # on a GPU, where small chunks would read and write the head's gradient too often
IGNORED = -1


def softcap(logits: torch.Tensor) -> torch.Tensor:
    """15·tanh(logits/15) (arXiv:2408.00118) in fp32, as 30·σ(2·logits/15) − 15: one exp instead of a tanh."""
    return 2 * LOGIT_SOFTCAP * torch.sigmoid(logits.float() * (2 / LOGIT_SOFTCAP)) - LOGIT_SOFTCAP


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum (), each token's loss (N,)) in nats and fp32; the sum alone has a gradient.

    hidden is (N, C) in the compute dtype, weight (V, C) the head, targets (N,) with −1 where there is none: no loss,
    no gradient. compiled: run the passes over the logits under torch.compile.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _CrossEntropy.apply(hidden, weight, targets, compiled)
    losses = _chunks(hidden, weight, targets, compiled)
    return losses.sum(), losses


class _CrossEntropy(torch.autograd.Function):
    """Takes the gradients in the same pass as the loss, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        ctx.gradients = torch.empty_like(hidden), torch.zeros_like(weight)
        losses = _chunks(hidden, weight, targets, compiled, *ctx.gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # scaled in place, so they serve once
        return grad_hidden.mul_(grad_sum), grad_weight.mul_(grad_sum), None, None


def _chunks(hidden, weight, targets, compiled, grad_hidden=None, grad_weight=None) -> torch.Tensor:
    sum_exp, gradient_ = _compiled_passes() if compiled else (_sum_exp, _gradient_)
    weight = weight.to(hidden.dtype)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    size = chunk_size(len(weight), hidden.is_cuda)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        x, learned = hidden[part], (targets[part] != IGNORED).unsqueeze(-1)
        column = targets[part].clamp(min=0).unsqueeze(-1)
        logits = x @ weight.T
        of_target = logits.gather(-1, column)
        total = sum_exp(logits)
        losses[part] = ((total.log() + LOGIT_SOFTCAP - softcap(of_target)) * learned).squeeze(-1)
        if grad_hidden is not None:
            gradient_(logits, learned / total)  # from here on: the gradient with respect to the logits
            logits.scatter_(-1, column, logits.gather(-1, column) - (_slope(of_target) * learned).to(logits.dtype))
            torch.mm(logits, weight, out=grad_hidden[part])
            add_product_(grad_weight, logits.T, x)
    return losses


def chunk_size(vocab_size: int, on_gpu: bool) -> int:
    """Tokens whose logits are held at once."""
    return max(1, (GPU_CHUNK_LOGITS if on_gpu else CHUNK_LOGITS) // vocab_size)


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b. On a GPU the matmul itself adds in fp32, with no product in bf16 between."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


# No maximum is subtracted before exp: capped logits are at most 15, so exp(capped − 15) neither overflows nor, summed
# over a vocabulary, vanishes. Two passes, each fused into one loop, are faster than one that stores what they share.
# On GPUs they were bound by arithmetic: compiled exp is some ten instructions there, and exp2 is one.


def _share_below(logits: torch.Tensor) -> torch.Tensor:
    """How far softcap(logits) is below 15, as a share of 30: σ(−2·logits/15)."""
    return 1 / (1 + torch.exp2(logits.float() * (2 / LOGIT_SOFTCAP / math.log(2))))


def _exp_below(share: torch.Tensor) -> torch.Tensor:
    return torch.exp2(share * (-2 * LOGIT_SOFTCAP / math.log(2)))


def _sum_exp(logits: torch.Tensor) -> torch.Tensor:
    return _exp_below(_share_below(logits)).sum(-1, keepdim=True)


def _gradient_(logits: torch.Tensor, scale: torch.Tensor) -> None:
    """In place, the derivative of the log of the sum above; scale (n, 1) is 1 over that sum, or 0."""
    logits.copy_(_exp_below(_share_below(logits)) * _slope(logits) * scale)


def _slope(logits: torch.Tensor) -> torch.Tensor:
    """The derivative of softcap, 1 − tanh²."""
    share = _share_below(logits)
    return 4 * share * (1 - share)


@lru_cache(maxsize=1)
def _compiled_passes():
    return compile_static(_sum_exp), compile_static(_gradient_)
