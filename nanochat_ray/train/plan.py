"""What a depth decides, before a GPU is rented: sizes, horizon, rates, memory, time and cost."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nanochat_ray.model.scaling import RunPlan, plan_run
from nanochat_ray.train.launch import MAX_TOKENS_PER_GPU
from nanochat_ray.train.metrics import gpu_peak_flops


@dataclass
class PlanOptions:
    depth: int = 24
    """The dial: layers of the Transformer."""
    gpus: int = 8
    """How many GPUs train."""
    gpu: str = "H100"
    """Their kind, for the peak FLOP/s: H100, H200, B200, A100, L40S, L4, A10G, 4090, …"""
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
    memory: dict[str, float]  # bytes per GPU, by part
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
    rows = options.device_batch_size or max(1, MAX_TOKENS_PER_GPU // options.sequence_len)
    rows = min(rows, max(1, plan.total_batch_size // (options.sequence_len * options.gpus)))
    seconds = plan.total_flops / (options.gpus * gpu_peak_flops(options.gpu) * options.mfu)
    prediction = Prediction(
        memory=predict_memory(plan, options.gpus, rows),
        seconds=seconds,
        dollars=seconds / 3600 * options.gpus * options.dollars_per_gpu_hour,
    )
    _print(plan, options, rows, prediction)
    return prediction


def predict_memory(plan: RunPlan, world_size: int, rows: int) -> dict[str, float]:
    """Bytes per GPU by part, training in bf16 with rows of T tokens in each forward pass.

    Activations count what autograd keeps of a compiled layer: about 20 numbers a channel (residual, norms, q, k, v
    before and after rotation, attention's output, and the MLP's two hidden layers of 4 each).
    """
    counts, tokens = plan.param_counts, rows * plan.config.sequence_len
    embeddings = counts["wte"] + counts["value_embeds"]
    masters = counts["total"] - embeddings
    adamw = counts["total"] - counts["transformer_matrices"]
    return {
        "weights": 4 * masters + 2 * embeddings,
        "gradients": 4 * masters + 2 * embeddings,
        "optimizer shard": (4 * counts["transformer_matrices"] + 8 * adamw) / world_size,
        "activations": 2 * 20 * plan.n_embd * plan.depth * tokens,
        "logits": (2 + 4 + 4) * plan.config.vocab_size * tokens,  # bf16, their fp32 softcap, and its gradient
    }


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
    memory = {name: f"{size / 2**30:.1f} GiB" for name, size in [*prediction.memory.items(), ("total", total)]}
    hours = prediction.seconds / 3600
    outlook = {
        "time": f"{prediction.seconds:,.0f} s ({hours:.2f} h) at {options.mfu:.0%} MFU",
        "cost": f"${prediction.dollars:,.0f} at ${options.dollars_per_gpu_hour:g} a GPU hour",
    }
    for title, values in {
        f"depth {plan.depth}": sizes,
        f"memory per GPU, {rows} rows a forward pass": memory,
        f"{options.gpus} × {options.gpu}": outlook,
    }.items():
        table = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for name, value in values.items():
            table.add_row(name, value)
        console.print(table)
