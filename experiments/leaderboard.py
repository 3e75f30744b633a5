"""Runs that reached a target, by the training time they took to reach it."""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nanochat_ray import storage
from nanochat_ray.train.metrics import read_metrics


@dataclass
class LeaderboardOptions:
    core: float | None = None
    """List runs with at least this CORE score; 0.256525, GPT-2's, unless bpb is given."""
    bpb: float | None = None
    """List runs that came down to this val/bpb, with the time at which they did."""
    folder: str | None = None
    """Where the runs are; the default is runs/ in NANOCHAT_RAY_HOME. Sweeps in it are looked into."""
    dollars_per_gpu_hour: float = 3.0


COLUMNS = ("training time", "run", "value", "step", "FLOPs", "depth", "ratio", "batch", "commit", "cluster", "cost")


def run(options: LeaderboardOptions) -> list[dict]:
    """Print the table; returns its lines, the fastest first. Raises ValueError for two targets."""
    if options.core is not None and options.bpb is not None:
        raise ValueError("--core and --bpb: give one target")
    if options.core is None and options.bpb is None:
        options.core = 0.256525
    folder = options.folder or storage.join(storage.home(), "runs")
    lines = [line for run in find_runs(folder) if (line := entry(folder, run, options))]
    lines.sort(key=lambda line: line["seconds"])
    target = f"val/bpb ≤ {options.bpb:g}" if options.bpb else f"CORE ≥ {options.core:g}"
    table = Table("#", *COLUMNS, title=f"{len(lines)} runs with {target}", title_justify="left", box=None)
    for place, line in enumerate(lines, 1):
        table.add_row(str(place), *(line[column] for column in COLUMNS))
    Console(highlight=False).print(table)
    return lines


def find_runs(folder: str) -> list[str]:
    """Run folders in it and one level below, as paths from it."""
    names = storage.listdir(folder)
    names += [f"{name}/{run}" for name in names if storage.exists(storage.join(folder, name, "sweep.json"))
              for run in storage.listdir(storage.join(folder, name))]  # fmt: skip
    return [name for name in names if storage.exists(storage.join(folder, name, "config.json"))]


def entry(folder: str, name: str, options: LeaderboardOptions) -> dict | None:
    """A run's line; None when it did not reach the target or is no pretraining."""
    config = storage.read_json(storage.join(folder, name, "config.json"))
    plan = config.get("plan")
    if not plan:
        return None
    lines = read_metrics(storage.join(folder, name))
    scored = _scored(storage.join(folder, name), lines)
    key, reaches = (
        ("val/bpb", lambda v: v <= options.bpb) if options.bpb else ("core_metric", lambda v: v >= options.core)
    )
    first = next((line for line in scored if line.get(key) is not None and reaches(line[key])), None)
    if first is None:
        return None
    seconds, gpus = first["total_training_time"], 0
    if "CPUs" not in (config.get("cluster") or "CPUs"):
        gpus = max((line.get("train/world_size", 0) for line in lines), default=0)
    return {
        "seconds": seconds,
        "training time": f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h",
        "run": name,
        "value": f"{first[key]:.4f}",
        "step": f"{first['step']:,}",
        "FLOPs": f"{first['total_training_flops']:.3g}",
        "depth": f"{plan['depth']}",
        "ratio": f"{plan['num_iterations'] * plan['total_batch_size'] / plan['scaling_params']:.3g}",
        "batch": f"{plan['total_batch_size']:,}",
        "commit": config.get("commit") or "–",
        "cluster": config.get("cluster") or "–",
        "cost": f"${seconds / 3600 * gpus * options.dollars_per_gpu_hour:,.2f}" if gpus else "–",
    }


def _scored(run_dir: str, lines: list[dict]) -> list[dict]:
    """The run's metrics, with the CORE score that a sweep gave its end."""
    result = storage.join(run_dir, "result.json")
    if lines and storage.exists(result):
        score = storage.read_json(result).get("core_metric")
        if score is not None and math.isfinite(score):
            return [*lines, lines[-1] | {"core_metric": score}]
    return lines
