"""The depth dial: the depth decides the width, batch, horizon, learning rates and weight decay of a run."""

import math
from dataclasses import dataclass, field

import torch

from nanochat_ray.model.gpt import GPT, SMEAR_CHANNELS, GPTConfig

ASPECT_RATIO = 64  # channels per layer
REFERENCE_DEPTH = 12  # the base learning rates were tuned at this depth
REFERENCE_BATCH = 2**19  # tokens; the batch at which they were tuned
BASE_LRS = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "matrix_lr": 0.02, "scalar_lr": 0.5}
BASE_WEIGHT_DECAY = 0.28


@dataclass(frozen=True)
class RunPlan:
    """All that the dial decides. Batch and horizon are in tokens. FLOPs per token count forward and backward."""

    depth: int
    target_param_data_ratio: float
    head_dim: int
    n_embd: int
    n_head: int
    config: GPTConfig
    param_counts: dict[str, int] = field(repr=False)
    scaling_params: int
    num_matmul_params: int
    flops_per_token: int
    target_tokens: int
    total_batch_size: int
    num_iterations: int
    lr_scale: float
    weight_decay: float

    @property
    def lrs(self) -> dict[str, float]:
        """Return the four base learning rates, scaled to this batch, as build_optimizer() takes them."""
        return {name: lr * self.lr_scale for name, lr in BASE_LRS.items()}

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> float:
        return float(self.flops_per_token) * self.total_tokens


def model_config(depth: int, *, sequence_len: int, vocab_size: int, head_dim: int, window_pattern: str) -> GPTConfig:
    n_embd = math.ceil(depth * ASPECT_RATIO / head_dim) * head_dim
    n_head = n_embd // head_dim
    return GPTConfig(sequence_len, vocab_size, depth, n_head, n_head, n_embd, window_pattern)


def param_counts(config: GPTConfig) -> dict[str, int]:
    """Count the parameters by role. `scalars` are the per-layer and global lambdas and the smear gate."""
    with torch.device("meta"):
        model = GPT(config)
    counts = {"wte": 0, "value_embeds": 0, "lm_head": 0, "transformer_matrices": 0, "scalars": 0}
    roles = {"transformer.wte": "wte", "transformer.h": "transformer_matrices"}
    for name, p in model.named_parameters():
        role = roles.get(".".join(name.split(".")[:2]), name.split(".")[0])
        counts[role if role in counts else "scalars"] += p.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: GPTConfig) -> int:
    """Return the training FLOPs of a token (arXiv:2204.02311, app. B).

    These are 6 per matmul weight, and 12·H·D per position that attention sees.
    """
    counts = param_counts(config)
    seen = sum(min(window, config.sequence_len) for window in config.window_sizes)
    matmul_params = counts["transformer_matrices"] + counts["lm_head"] + SMEAR_CHANNELS
    return 6 * matmul_params + 12 * config.n_head * config.head_dim * seen


def plan_run(
    depth: int,
    *,
    target_param_data_ratio: float = 12,
    sequence_len: int = 2048,
    vocab_size: int = 32768,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
    total_batch_size: int | None = None,
    num_iterations: int | None = None,
    target_flops: float | None = None,
) -> RunPlan:
    """Plan a run from its depth.

    The horizon is given by num_iterations, else by target_flops, else it is target_param_data_ratio tokens per scaling
    parameter. By default the batch grows as tokens^0.383 (arXiv:2505.13738). Learning rates grow as the square root of
    the batch. Weight decay keeps the reference's time scale (arXiv:2405.13698).
    Raises ValueError for a depth below 1 or a horizon below one step.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    shape = {
        "sequence_len": sequence_len, "vocab_size": vocab_size, "head_dim": head_dim, "window_pattern": window_pattern
    }  # fmt: skip
    config = model_config(depth, **shape)
    counts = param_counts(config)
    scaling_params = counts["transformer_matrices"] + counts["lm_head"]
    reference = param_counts(model_config(REFERENCE_DEPTH, **shape))

    tokens = target_param_data_ratio * scaling_params
    reference_tokens = target_param_data_ratio * (reference["transformer_matrices"] + reference["lm_head"])
    optimal_batch = REFERENCE_BATCH * (tokens / reference_tokens) ** 0.383
    batch = total_batch_size or 2 ** round(math.log2(optimal_batch))
    flops = flops_per_token(config)
    if num_iterations is None and target_flops is not None:
        num_iterations = round(target_flops / (flops * batch))
    elif num_iterations is None:
        num_iterations = int(tokens) // batch
    if num_iterations < 1:
        raise ValueError(f"{num_iterations} steps of {batch} tokens: give a longer horizon or a smaller batch")
    lr_scale = math.sqrt(batch / REFERENCE_BATCH)
    return RunPlan(
        depth=depth,
        target_param_data_ratio=target_param_data_ratio,
        head_dim=head_dim,
        n_embd=config.n_embd,
        n_head=config.n_head,
        config=config,
        param_counts=counts,
        scaling_params=scaling_params,
        num_matmul_params=scaling_params + SMEAR_CHANNELS,
        flops_per_token=flops,
        target_tokens=int(tokens),
        total_batch_size=batch,
        num_iterations=num_iterations,
        lr_scale=lr_scale,
        weight_decay=BASE_WEIGHT_DECAY * lr_scale * reference_tokens / tokens,
    )


WARMUP_STEPS = 40
WARMDOWN_RATIO = 0.65  # share of all steps
FINAL_LR = 0.05  # multiplier of the learning rates at the end
MOMENTUM_WARMUP_STEPS = 400


def warmdown_left(step: int, num_iterations: int) -> float | None:
    """Return the share of the warmdown that is left, from 1 to 0, or None before it begins."""
    warmdown = round(WARMDOWN_RATIO * num_iterations)
    return (num_iterations - step) / warmdown if step > num_iterations - warmdown else None


def lr_multiplier(step: int, num_iterations: int) -> float:
    """Return the multiplier of pretraining: linear warmup, constant, then linear to FINAL_LR."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = warmdown_left(step, num_iterations)
    return 1.0 if left is None else left + FINAL_LR * (1 - left)


def muon_momentum(step: int, num_iterations: int) -> float:
    if step < MOMENTUM_WARMUP_STEPS:
        return 0.85 + (0.97 - 0.85) * step / MOMENTUM_WARMUP_STEPS
    left = warmdown_left(step, num_iterations)
    return 0.97 if left is None else 0.97 + (0.90 - 0.97) * (1 - left)


def muon_weight_decay(step: int, num_iterations: int, weight_decay: float) -> float:
    return weight_decay * 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def finetune_lr_multiplier(step: int, num_iterations: int) -> float:
    """Return the multiplier of finetuning: constant, then linear to 0 over the second half."""
    return min(1.0, 2 * (1 - step / num_iterations))


def rl_lr_multiplier(step: int, num_iterations: int) -> float:
    """Return the multiplier of reinforcement learning: linear to 0."""
    return 1 - step / num_iterations
