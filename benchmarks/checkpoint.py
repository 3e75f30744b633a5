"""What checkpoints cost a run: blocks of steps of the real loop take turns with and without one at their beginning.

A block's time is that of its steps and of what begins and ends the checkpoint, which is written meanwhile. The order
of the two kinds is turned around from pair to pair, and the medians count. Random tokens, as in benchmarks/train.py.

    python -m benchmarks.checkpoint [--depth 6 --seq 512 --vocab 8192] [--device-batch 8] [--dtype float32] [--json]
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
import ray.train.torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import train
from nanochat_ray import storage
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train import checkpoint, hosts, launch, loop
from nanochat_ray.train.metrics import MetricsLog


@dataclass
class Options:
    depth: int = 6
    seq: int = 512
    """T, tokens in a row."""
    vocab: int = 8192
    device_batch: int = 8
    """Rows of a worker in a step: the fewer, the more a checkpoint weighs."""
    save_every: int = 50
    """Steps in a block."""
    pairs: int = 3
    """Blocks of each kind."""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    workers: int = 1
    """Training workers, which share the CPUs, or have a GPU each."""
    compile: bool | None = False
    """torch.compile, whose start takes a minute."""
    folder: str | None = None
    """Where the checkpoints go for the time of the benchmark, a path or a URI; the default is a temporary folder."""
    json: bool = False
    """End with one line of JSON."""


def run(options: Options) -> dict:
    """Measure; returns what --json prints. Seconds; slowdown is a share of the time without checkpoints."""
    model = train.Options(depth=options.depth, seq=options.seq, vocab=options.vocab, device_batch=options.device_batch)
    model.workers, model.steps = options.workers, 2 * options.pairs * options.save_every
    plan = train.plan_of(model)
    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = train.write_inputs(Path(folder), model, plan)
        run_dir = storage.join(storage.absolute(options.folder or folder), f"benchmark-{os.getpid()}")
        config = loop.TrainConfig(
            run_dir=run_dir,
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
            save_every=options.save_every,
            prompts=[],
            dtype=options.dtype,
            compile=options.compile,
            recompute=False,
            fp8=False,
        )
        monitor = launch.Monitor.remote()
        measuring = {"monitor": monitor, "config": config, "pairs": options.pairs}
        scaling = hosts.scaling_config(options.workers)
        trainer = ray.train.torch.TorchTrainer(
            measure,
            train_loop_config=measuring,
            scaling_config=scaling,
            run_config=launch.run_config(config.run_dir, scaling.use_gpu),
        )
        try:
            trainer.fit()
        finally:
            storage.remove(run_dir)
        measured = ray.get(monitor.read_outcome.remote())
    without, with_one = (statistics.median(measured[kind]) for kind in ("without", "with"))
    return {
        "slowdown": with_one / without - 1,
        "without_s": without,
        "with_s": with_one,
        "copy_s": statistics.median(measured["copy"]),
        "write_s": statistics.median(measured["write"]),
        "checkpoint_mb": measured["bytes"] / 1e6,
        "step_s": without / options.save_every,
        "save_every": options.save_every,
        "pairs": options.pairs,
        "workers": options.workers,
    }


def measure(config: dict) -> None:
    """On every worker: blocks of steps as the loop has them."""
    c, monitor = config["config"], config["monitor"]
    worker = loop.start(c)
    log = MetricsLog(c.run_dir, asdict(c), 0) if worker.rank == 0 else None
    times = {"with": [], "without": [], "copy": [], "write": []}

    def block(saves: bool, steps: int) -> float:
        began = time.perf_counter()
        if saves:
            loop.start_save(worker, log)
            times["copy"].append(time.perf_counter() - began)
            worker.writer.part.add_done_callback(lambda _: times["write"].append(time.perf_counter() - began))
        for _ in range(steps):
            metrics, _ = loop.train_step(worker, 1.0, monitor)
            if log:
                log.log(metrics)
        loop.finish_save(worker, monitor)
        return time.perf_counter() - began

    block(saves=True, steps=3)  # to warm up
    times["copy"].clear()
    times["write"].clear()
    for pair in range(config["pairs"]):
        for saves in (False, True) if pair % 2 == 0 else (True, False):
            times["with" if saves else "without"].append(block(saves, c.save_every))
    worker.writer.close()
    if log:
        log.close()
        files = checkpoint.read_meta(worker.writer.folder)["files"].values()
        ray.get(monitor.finish.remote(times | {"bytes": sum(entry["size"] for entry in files)}))


def show(figures: dict) -> None:
    table = Table(show_header=False)
    blocks = f"{figures['save_every']} steps"
    table.add_row(f"{blocks} without a checkpoint", f"{figures['without_s']:.2f} s")
    table.add_row(f"{blocks} with one", f"{figures['with_s']:.2f} s")
    table.add_row("slowdown", f"{figures['slowdown']:.2%}")
    table.add_row("copy to host memory", f"{figures['copy_s']:.3f} s")
    table.add_row("until it was written", f"{figures['write_s']:.3f} s")
    table.add_row("checkpoint", f"{figures['checkpoint_mb']:,.0f} MB")
    Console().print(table)


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    os.environ["WANDB_MODE"] = "disabled"
    start_ray()
    figures = run(options)
    show(figures)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
