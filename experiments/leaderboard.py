"""Runs that reached a target, by the training time they took to reach it."""

import math
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import optimize

from nanochat_ray import storage
from nanochat_ray.measuring import one_line
from nanochat_ray.train.metrics import read_metrics

GPT2_CORE = 0.256525  # GPT-2 XL's score
# Of nanochat's leaderboard: d24 at 12 tokens per scaling parameter.
NANOCHAT = {"run": "nanochat, d24, ratio 12", "CORE": 0.25851, "seconds": 10_949, "cluster": "8 × H100"}


@dataclass
class LeaderboardOptions:
    core: float | None = None
    """List runs with at least this CORE score; 0.256525, GPT-2's, unless bpb is given."""
    bpb: float | None = None
    """List runs that came down to this val/bpb and ended there, with the time at which they did."""
    folder: str | None = None
    """Where the runs are; the default is runs/ in NANOCHAT_RAY_HOME. Sweeps in it are looked into."""
    dollars_per_gpu_hour: float = 3.0


COLUMNS = ("training time", "run", "value", "step", "FLOPs", "depth", "ratio", "batch", "commit", "cluster", "cost")


def run(options: LeaderboardOptions) -> list[dict]:
    """Print the table; returns its lines, the fastest first. Raises ValueError for two targets."""
    if options.core is not None and options.bpb is not None:
        raise ValueError("--core and --bpb: give one target")
    if options.core is None and options.bpb is None:
        options.core = GPT2_CORE
    folder = options.folder or storage.join(storage.home(), "runs")
    lines = []
    for name in find_runs(folder):
        try:
            lines += [line] if (line := entry(folder, name, options)) else []
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"{name} is left out: {one_line(error)}")
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
    lines_and_score = with_scores(storage.join(folder, name), lines)
    if options.bpb:
        first = crossing(lines, options.bpb)
    else:
        scored = (line for line in lines_and_score if line.get("core_metric") is not None)
        first = next((line for line in scored if line["core_metric"] >= options.core), None)
    if first is None:
        return None
    seconds, gpus = first["total_training_time"], 0
    if "CPUs" not in (config.get("cluster") or "CPUs"):
        gpus = max((line.get("train/world_size", 0) for line in lines), default=0)
    return {
        "seconds": seconds,
        "training time": f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h",
        "run": name,
        "value": f"{first['val/bpb' if options.bpb else 'core_metric']:.4f}",
        "step": f"{first['step']:,.0f}",
        "FLOPs": f"{first['total_training_flops']:.3g}",
        "depth": f"{plan['depth']}",
        "ratio": f"{plan['num_iterations'] * plan['total_batch_size'] / plan['scaling_params']:.3g}",
        "batch": f"{plan['total_batch_size']:,}",
        "commit": config.get("commit") or "–",
        "cluster": config.get("cluster") or "–",
        "cost": f"${seconds / 3600 * gpus * options.dollars_per_gpu_hour:,.2f}" if gpus else "–",
    }


def crossing(lines: list[dict], target: float) -> dict | None:
    """Where a run's val/bpb came down to the target for good: its step, time and FLOPs; None if it did not.

    A measurement has noise, so the first one below the target is early by chance, and how often a run measures would
    move its time. The curve is made to fall steadily by isotonic regression, and read off between two measurements,
    with the value of its end. The last measurement has to be at or below the target, too.
    """
    measured = [line for line in lines if line.get("val/bpb") is not None and math.isfinite(line["val/bpb"])]
    if not measured or measured[-1]["val/bpb"] > target:
        return None
    values = optimize.isotonic_regression([line["val/bpb"] for line in measured], increasing=False).x
    if values[-1] > target:
        return None
    reached = int(np.argmax(values <= target))
    after, before = measured[reached], measured[max(reached - 1, 0)]
    share = (values[reached - 1] - target) / (values[reached - 1] - values[reached]) if reached else 1.0
    if share < 1 and before["total_training_time"] > 0:  # losses fall evenly in the logarithm of time
        ratio = after["total_training_time"] / before["total_training_time"]
        share = (ratio**share - 1) / (ratio - 1) if ratio > 1 else share
    found = {
        key: float(before[key] + share * (after[key] - before[key]))
        for key in ("step", "total_training_time", "total_training_flops")
    }
    return found | {"val/bpb": measured[-1]["val/bpb"]}


def with_scores(run_dir: str, lines: list[dict]) -> list[dict]:
    """The run's metrics, with the scores that a sweep or a speedrun gave its end."""
    result = storage.join(run_dir, "result.json")
    found = storage.read_json(result) if lines and storage.exists(result) else {}
    scores = {name: found.get(name) for name in ("core_metric", "chatcore_metric")}
    scores = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    return [*lines, lines[-1] | scores] if scores else lines


def beside_nanochat(name: str, config: dict, lines: list[dict]) -> list[dict]:
    """How long a run and nanochat's trained to reach GPT-2's CORE; empty for a run without a score."""
    scored = [line for line in lines if line.get("core_metric") is not None]
    if not scored:
        return []
    first = next((line for line in scored if line["core_metric"] >= GPT2_CORE), scored[-1])
    mine = {"run": name, "CORE": first["core_metric"], "seconds": first["total_training_time"]}
    mine["cluster"] = config.get("cluster") or "–"
    return [line | {"reached": line["CORE"] >= GPT2_CORE} for line in (mine, NANOCHAT)]
