"""What a depth decides, before a GPU is rented: sizes, horizon, rates, memory, time and cost."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from nanochat_ray.model.attention import BLOCK
from nanochat_ray.model.gpt import GPTConfig
from nanochat_ray.model.loss import CHUNK_LOGITS
from nanochat_ray.model.scaling import RunPlan, plan_run
from nanochat_ray.train.checkpoint import compute_dtype
from nanochat_ray.train.launch import MAX_TOKENS_PER_CPU, MAX_TOKENS_PER_GPU
from nanochat_ray.train.metrics import gpu_peak_flops, peak_flops

PROCESS_BYTES = 900 * 2**20  # Python, torch, Ray and what compiling leaves behind


@dataclass
class PlanOptions:
    depth: int = 24
    """The dial: layers of the Transformer."""
    gpus: int = 8
    """How many GPUs train; 0 for one worker on this machine's CPUs."""
    gpu: str = "H100"
    """Their kind, for the peak FLOP/s: H100, H200, B200, A100, L40S, L4, A10G, 4090, …"""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    mfu: float = 0.5
    """Share of the peak that training reaches."""
    dollars_per_gpu_hour: float = 3.0
    target_param_data_ratio: float = 12
    """Training tokens per scaling parameter."""
    target_flops: float | None = None
    """Train for this many FLOPs instead of for a ratio."""
    sequence_len: int = 2048
    vocab_size: int = 32768
    head_dim: int = 128
    window_pattern: str = "SSSL"
    device_batch_size: int | None = None
    """Rows in one forward pass of a GPU; the default is what pretrain would take."""


@dataclass(frozen=True)
class Prediction:
    memory: dict[str, float]  # bytes per worker, by part
    seconds: float
    dollars: float


def run(options: PlanOptions) -> Prediction:
    """Print the plan; returns what it predicts. Raises ValueError for an unknown GPU."""
    plan = plan_run(
        options.depth,
        target_param_data_ratio=options.target_param_data_ratio,
        sequence_len=options.sequence_len,
        vocab_size=options.vocab_size,
        head_dim=options.head_dim,
        window_pattern=options.window_pattern,
        target_flops=options.target_flops,
    )
    workers = max(1, options.gpus)
    most = MAX_TOKENS_PER_GPU if options.gpus else MAX_TOKENS_PER_CPU
    rows = options.device_batch_size or max(1, most // options.sequence_len)
    rows = min(rows, max(1, plan.total_batch_size // (options.sequence_len * workers)))
    dtype = torch.bfloat16 if options.gpus and options.dtype is None else compute_dtype(options.dtype, "cpu")
    peak = gpu_peak_flops(options.gpu) if options.gpus else peak_flops(torch.device("cpu"), dtype)
    seconds = plan.total_flops / (workers * peak * options.mfu)
    prediction = Prediction(
        memory=predict_memory(plan, workers, rows, not options.gpus, dtype),
        seconds=seconds,
        dollars=seconds / 3600 * options.gpus * options.dollars_per_gpu_hour,
    )
    _print(plan, options, rows, prediction)
    return prediction


def predict_memory(plan: RunPlan, world_size: int, rows: int, on_cpu: bool, dtype: torch.dtype) -> dict[str, float]:
    """Peak bytes of a worker by part, with rows of T tokens in each forward pass; on a CPU of the whole process.

    Activations count what autograd keeps of a compiled block, and the gradients of one block, as numbers a channel:
    on a GPU about 20 are kept (residual, norms, q, k, v before and after rotation, attention's output, the MLP's two
    hidden layers of 4 each). On a CPU also attention's weights, for the blocks of keys that a query's block sees, and
    copies that its matmuls take, and a tenth more for gaps between blocks of memory.
    """
    counts, tokens, size = plan.param_counts, rows * plan.config.sequence_len, dtype.itemsize
    embeddings = counts["wte"] + counts["value_embeds"]
    masters = counts["total"] - embeddings
    adamw = counts["total"] - counts["transformer_matrices"]
    chunk = min(CHUNK_LOGITS, tokens * plan.config.vocab_size)
    stack = 4 * plan.depth * plan.n_embd**2  # the largest that Muon updates at once, the MLPs' matrices
    kept = [20 + on_cpu * (6 + 1.3 * seen / plan.head_dim) for seen in visible_keys(plan.config)]
    return {
        "weights": 4 * masters + size * embeddings,
        "gradients": 4 * masters + size * embeddings,
        "optimizer shard": (4 * counts["transformer_matrices"] + 8 * adamw) / world_size,
        "optimizer's copies": 32 * stack / world_size,
        "activations": (1.1 if on_cpu else 1) * size * plan.n_embd * tokens * (sum(kept) + 50),
        "logits": size * chunk + (size + 4) * counts["lm_head"],  # of a chunk, with the head's gradient beside it
        "process": PROCESS_BYTES if on_cpu else 0,
    }


def visible_keys(config: GPTConfig) -> list[float]:
    """By layer, the mean number of keys that a query's block of the CPU's attention computes with."""
    T = config.sequence_len
    return [(T + BLOCK) / 2 if window >= T else min(window + BLOCK, T) for window in config.window_sizes]


def _print(plan: RunPlan, options: PlanOptions, rows: int, prediction: Prediction) -> None:
    console = Console(highlight=False)
    sizes = {
        "depth": f"{plan.depth}",
        "width, heads": f"{plan.n_embd}, {plan.n_head} of {plan.head_dim}",
        "windows": f"{plan.config.window_pattern}, {min(plan.config.window_sizes)} to {max(plan.config.window_sizes)}",
        **{f"parameters, {name.replace('_', ' ')}": f"{count:,}" for name, count in plan.param_counts.items()},
        "scaling parameters": f"{plan.scaling_params:,}",
        "FLOPs per token": f"{plan.flops_per_token:,}",
        "tokens": f"{plan.total_tokens:,}",
        "batch": f"{plan.total_batch_size:,} tokens",
        "steps": f"{plan.num_iterations:,}",
        "FLOPs": f"{plan.total_flops:.6e}",
        "learning rates": ", ".join(f"{name.removesuffix('_lr')} {lr:.4g}" for name, lr in plan.lrs.items()),
        "Muon weight decay": f"{plan.weight_decay:.4g}",
    }
    total = sum(prediction.memory.values())
    memory = {name: f"{size / 2**20:,.0f} MiB" for name, size in [*prediction.memory.items(), ("total", total)]}
    hours = prediction.seconds / 3600
    outlook = {"time": f"{prediction.seconds:,.0f} s ({hours:.2f} h) at {options.mfu:.0%} MFU"}
    if options.gpus:
        outlook["cost"] = f"${prediction.dollars:,.0f} at ${options.dollars_per_gpu_hour:g} a GPU hour"
    for title, values in {
        f"depth {plan.depth}": sizes,
        f"memory per worker, {rows} rows a forward pass": memory,
        f"{options.gpus} × {options.gpu}" if options.gpus else "this machine's CPUs": outlook,
    }.items():
        table = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for name, value in values.items():
            table.add_row(name, value)
        console.print(table)
