"""How fast training is here: tokens per second, MFU, memory, and where a step's time goes.

Runs the real loop on Ray Train workers (loader, optimizer, logging included) on random tokens: a few steps to warm up,
the timed ones, then some under the profiler. MFU is against the best 2048³ matmul of three measurements' median.

    python benchmarks/train.py --depth 6 --seq 512 --vocab 8192 --device-batch 32 [--dtype float32] [--workers 2]
"""

import os
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType

from nanochat_ray import storage
from nanochat_ray.data.loader import write_rows
from nanochat_ray.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_ray.model.scaling import RunPlan, plan_run
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train import hosts, launch, loop, network
from nanochat_ray.train.metrics import MetricsLog, peak_flops, peak_memory_mb

PARTS = ("matmul", "attention", "pointwise", "loss", "optimizer", "data", "other")
PROFILED_STEPS = 2


@dataclass
class Options:
    depth: int = 6
    seq: int = 512
    """T, tokens in a row."""
    vocab: int = 8192
    device_batch: int = 32
    """Rows in one forward pass of a worker."""
    micro_batches: int = 1
    """Forward passes of a worker in a step."""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    workers: int = 1
    """Training workers, which share the CPUs, or have a GPU each."""
    head_dim: int | None = None
    """The default is 64 below depth 12 and 128 from there on."""
    window_pattern: str | None = None
    """The default is L below depth 12 and SSSL from there on."""
    steps: int = 20
    """Timed steps."""
    warmup: int = 3
    """Steps before them, which compile."""
    compile: bool | None = None
    """torch.compile; the default is that of pretrain."""
    recompute: bool = False
    """Activation checkpointing."""
    json: bool = False
    """End with one line of JSON."""


def plan_of(options: Options) -> RunPlan:
    small = options.depth < 12
    return plan_run(
        options.depth,
        sequence_len=options.seq,
        vocab_size=options.vocab,
        head_dim=options.head_dim or (64 if small else 128),
        window_pattern=options.window_pattern or ("L" if small else "SSSL"),
        total_batch_size=options.device_batch * options.micro_batches * options.seq * options.workers,
        num_iterations=options.warmup + options.steps + PROFILED_STEPS,
    )


def write_inputs(folder: Path, options: Options, plan: RunPlan) -> tuple[str, str]:
    """Random rows and a tokenizer of that size, as a run finds them; returns their folders."""
    random = np.random.default_rng(0)
    rows_a_step = plan.total_batch_size // options.seq
    for split, n in (("train", 4 * rows_a_step), ("val", 1)):
        rows = random.integers(options.vocab, size=(n, options.seq + 1)).astype(np.uint32)
        write_rows(folder / "rows" / split / "rows_00000.arrow", rows)
    tokenizer_of_size(options.vocab).save(str(folder / "tokenizer"))
    return str(folder / "rows"), str(folder / "tokenizer")


def tokenizer_of_size(vocab_size: int) -> Tokenizer:
    """All bytes, then made-up tokens."""
    tokens = (bytes([i]) if i < 256 else b"%x" % i for i in range(vocab_size - len(SPECIAL_TOKENS)))
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})


def run(options: Options) -> dict:
    """Measure; returns what --json prints."""
    plan = plan_of(options)
    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = write_inputs(Path(folder), options, plan)
        config = loop.TrainConfig(
            run_dir=str(Path(folder) / "run"),
            stage="pretrain",
            rows=rows,
            tokenizer=tokenizer,
            model=asdict(plan.config),
            total_batch_size=plan.total_batch_size,
            device_batch_size=options.device_batch,
            num_iterations=plan.num_iterations,
            lrs=plan.lrs,
            weight_decay=plan.weight_decay,
            flops_per_token=plan.flops_per_token,
            seed=0,
            init_from=None,
            eval_every=0,
            eval_tokens=0,
            sample_every=0,
            save_every=0,
            prompts=[],
            dtype=options.dtype,
            compile=options.compile,
            recompute=options.recompute,
            fp8=False,
        )
        monitor = launch.Monitor.remote()
        measuring = {"monitor": monitor, "warmup": options.warmup, "steps": options.steps}
        scaling = hosts.scaling_config(options.workers)
        trainer = ray.train.torch.TorchTrainer(
            measure,
            train_loop_config=measuring | {"config": config},
            torch_config=network.TorchConfig(),
            scaling_config=scaling,
            run_config=launch.run_config(config.run_dir, scaling.use_gpu),
        )
        trainer.fit()
        measured = ray.get(monitor.read_outcome.remote())
    return summarize(options, plan, measured)


def measure(config: dict) -> None:
    """On every worker: the timed steps of the loop."""
    c, monitor = config["config"], config["monitor"]
    worker = loop.start(c)
    log = MetricsLog(c.run_dir, asdict(c), 0) if worker.rank == 0 else None
    peaks, seconds = [], []

    def steps(n: int) -> None:
        for _ in range(n):
            metrics, _ = loop.train_step(worker, 1.0, monitor)
            seconds.append(metrics["train/dt"])
            if log:
                log.log(metrics)

    def measure_peak() -> None:
        peak = peak_flops(worker.device, worker.model.compute_dtype)
        peaks.append(loop.all_reduce(worker, [peak])[0])

    steps(config["warmup"])
    seconds.clear()
    measure_peak()
    steps(config["steps"] // 2)
    measure_peak()
    steps(config["steps"] - config["steps"] // 2)
    measure_peak()
    timed = list(seconds)
    activity = torch.profiler.ProfilerActivity
    on_gpu = worker.device.type == "cuda"
    activities = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    memory = peak_memory_mb(worker.device)  # on a GPU of the last timed step
    with torch.profiler.profile(activities=activities) as profiler:
        steps(PROFILED_STEPS)
    if log:
        log.close()
        outcome = {"seconds": timed, "peaks": peaks, "memory": memory}
        ray.get(
            monitor.finish.remote(outcome | {"shares": shares(profiler, on_gpu), "threads": torch.get_num_threads()})
        )


def shares(profiler: torch.profiler.profile, on_gpu: bool) -> dict[str, float]:
    """Each part's share of the time between a step's begin and end, by the innermost known part of an operator.

    Matmuls are those outside attention and the optimizer, the loss's included. What a compiled kernel fuses with the
    softmax of attention is pointwise. On a GPU the time is that of its kernels.
    """
    totals, kernels = Counter(), 0.0
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            totals[part_of(event)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        elif not event.is_user_annotation:
            kernels += event.self_device_time_total  # the operator that launched it counts this time as its own, too
    totals["other"] += max(0.0, kernels - sum(totals.values()))  # kernels that no operator launched
    whole = sum(totals.values()) or 1
    return {part: totals[part] / whole for part in PARTS}


def part_of(event) -> str:
    ancestors, parent = [event.name], event.cpu_parent
    while parent is not None:
        ancestors.append(parent.name)
        parent = parent.cpu_parent
    if any("Optimizer.step" in name for name in ancestors):
        return "optimizer"
    if "data" in ancestors:
        return "data"
    if any("attention" in name for name in ancestors) or event.name == "aten::bmm":
        return "attention"
    if event.name in ("aten::mm", "aten::addmm"):
        return "matmul"
    if any("_CrossEntropy" in name for name in ancestors):
        return "loss"
    if "CompiledFxGraph" in event.name or event.name.startswith(("aten::", "triton")):
        return "pointwise"
    return "other"


def summarize(options: Options, plan: RunPlan, measured: dict) -> dict:
    step = statistics.median(measured["seconds"])
    peak = statistics.median(measured["peaks"])
    tok_per_sec = plan.total_batch_size / step
    return {
        "depth": options.depth,
        "n_embd": plan.n_embd,
        "head_dim": plan.head_dim,
        "window_pattern": plan.config.window_pattern,
        "workers": options.workers,
        "threads_per_worker": measured["threads"],
        "tokens_per_step": plan.total_batch_size,
        "step_seconds": step,
        "step_seconds_slowest": max(measured["seconds"]),
        "tok_per_sec": tok_per_sec,
        "gflops": tok_per_sec * plan.flops_per_token / 1e9,
        "peak_gflops": peak / 1e9,
        "mfu": tok_per_sec * plan.flops_per_token / peak,
        "peak_rss_mb": measured["memory"],
        "shares": measured["shares"],
    }


def show(result: dict) -> None:
    table = Table(title="training", title_justify="left", show_header=False)
    for name, value in result.items():
        if name != "shares":
            table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else f"{value}")
    for part, share in result["shares"].items():
        table.add_row(f"time, {part}", f"{share:.1%}")
    Console(highlight=False, stderr=result.get("json", False)).print(table)


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    os.environ.setdefault("WANDB_MODE", "disabled")  # of the metrics, metrics.jsonl is written; no upload is timed
    start_ray()
    result = run(options)
    show(result)
    if options.json:
        print(storage.to_json(result))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
