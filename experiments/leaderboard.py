"""Lists runs that reached a target, sorted by the training time that they needed."""

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
# From nanochat's leaderboard: d24 at 12 tokens per scaling parameter.
NANOCHAT: dict = {"run": "nanochat, d24, ratio 12", "CORE": 0.25851, "seconds": 10_949, "cluster": "8 × H100"}


@dataclass
class LeaderboardOptions:
    core: float | None = None
    """List runs that reached this CORE score. Default without --bpb: 0.256525, GPT-2's score."""
    bpb: float | None = None
    """List runs that reached this val/bpb and stayed there to the end."""
    folder: str | None = None
    """Folder of the runs and sweeps. Default: runs/ in NANOCHAT_RAY_HOME."""
    dollars_per_gpu_hour: float = 3.0
    """Price for the cost column."""


COLUMNS = ("training time", "run", "value", "step", "FLOPs", "depth", "ratio", "batch", "commit", "cluster", "cost")


def run(options: LeaderboardOptions) -> list[dict]:
    """Print the table and return its lines, the fastest first. Raises ValueError for two targets."""
    if options.core is not None and options.bpb is not None:
        raise ValueError("--core and --bpb can't be used together: give one target")
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
    """Run folders in a folder and in its sweeps, as relative paths."""
    names = storage.listdir(folder)
    names += [f"{name}/{run}" for name in names if storage.exists(storage.join(folder, name, "sweep.json"))
              for run in storage.listdir(storage.join(folder, name))]  # fmt: skip
    return [name for name in names if storage.exists(storage.join(folder, name, "config.json"))]


def entry(folder: str, name: str, options: LeaderboardOptions) -> dict | None:
    """The line of a run. None if it did not reach the target or is not a pretraining run."""
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
    """The step, time and FLOPs at which a run's val/bpb reached the target for good. None if it did not.

    Measurements are noisy, so the first one below the target comes too early, and more so if a run measures often. So
    this fits a falling curve by isotonic regression and interpolates between two measurements. The last measurement
    must be at or below the target, too. Returned "val/bpb" is that of the last measurement.
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
    """The run's metrics, with the final scores of result.json added to the last line."""
    result = storage.join(run_dir, "result.json")
    found = storage.read_json(result) if lines and storage.exists(result) else {}
    scores = {name: found.get(name) for name in ("core_metric", "chatcore_metric")}
    scores = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    return [*lines, lines[-1] | scores] if scores else lines


def beside_nanochat(name: str, config: dict, lines: list[dict]) -> list[dict]:
    """Training times of a run and of nanochat's run to reach GPT-2's CORE. Empty if the run has no score."""
    scored = [line for line in lines if line.get("core_metric") is not None]
    if not scored:
        return []
    first = next((line for line in scored if line["core_metric"] >= GPT2_CORE), scored[-1])
    mine: dict = {"run": name, "CORE": first["core_metric"], "seconds": first["total_training_time"]}
    mine["cluster"] = config.get("cluster") or "–"
    return [line | {"reached": line["CORE"] >= GPT2_CORE} for line in (mine, NANOCHAT)]
