"""Writes one self-contained HTML page about runs: curves, plans, numbers, wall time, samples, chat answers.

It reads only the runs' folders. For a sweep's folder, it adds the findings: laws, optima, verdicts, with figures.

python -m experiments.report FOLDER [FOLDER …] --out report.html
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from numbers import Number
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from experiments import findings
from experiments.leaderboard import GPT2_CORE, beside_nanochat, with_scores
from experiments.svg import DASHES, NICE_STEPS, SERIES, empty_figure, style, svg
from nanochat_ray import storage
from nanochat_ray.measuring import measuring, one_line
from nanochat_ray.train.metrics import read_metrics

MAX_POINTS = 400  # per curve; a small chart can't show more
STEEP_START = 0.1  # share of the steps that the y axis may cut off, because the loss falls steeply there

CURVES = {
    "train/loss": "Training loss, nats per token",
    "val/bpb": "Validation, bits per byte",
    "rl/reward": "Reward, mean of a step's answers",
    "pass@1": "pass@1 on held-out questions",
    "core_metric": "CORE",
    "chatcore_metric": "ChatCORE",
}
SOURCE_BPB = "val/bpb/"  # followed by the name of a mixture's source
X_AXES = {"step": "step", "total_training_time": "training time", "total_training_flops": "training FLOPs"}


@dataclass
class Run:
    """The content of a run folder. A missing file gives an empty value, a damaged one also a note."""

    uri: str
    config: dict
    metrics: list[dict]
    samples: str
    stages: list[dict]
    chat: list[dict]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return storage.name(self.uri) or self.uri

    def part(self, name: str):
        """A block whose failure becomes a note on the page and does not affect its other parts."""
        return measuring(
            name, lambda line: self.notes.append(line.replace(" failed: ValueError: ", " is left out, ", 1))
        )


def read_run(uri: str) -> Run:
    """Read config.json, metrics.jsonl, samples.md, stages.json, chat.json and result.json, if they exist.

    A damaged file is left out, with a note. Raises FileNotFoundError if the folder does not exist."""
    if not storage.exists(uri):
        raise FileNotFoundError(f"there is no run folder {uri}: name a folder with a metrics.jsonl or config.json")
    run = Run(uri=str(uri), config={}, metrics=[], samples="", stages=[], chat=[])

    def read(name: str, parse: Callable[[str], object], default, holds: Callable = lambda value: True):
        """The value of a file, or the default if the file is missing or its content is unexpected."""
        with run.part(name):
            try:
                value = parse(storage.join(uri, name))
            except FileNotFoundError:
                return default
            except ValueError as error:
                raise ValueError(f"it is not JSON: {error}") from None
            if not holds(value):
                raise ValueError("its content is not what a run writes")
            return value
        return default

    run.config = read("config.json", storage.read_json, {}, is_config)
    run.stages = read("stages.json", storage.read_json, [], partial(holds_all, keys={"stage": str, "seconds": Number}))
    run.chat = read("chat.json", storage.read_json, [], partial(holds_all, keys={"prompt": str, "answer": str}))
    run.samples = read("samples.md", storage.read_bytes, b"").decode(errors="replace").strip()
    lines = read("metrics.jsonl", lambda _: _by_step(read_metrics(uri)), [])
    run.metrics = read("result.json", lambda _: _by_step(with_scores(uri, lines)), lines)
    if run.config.get("inputs", {}).get("stage") == "rl":  # the loss of RL is not a cross entropy
        run.metrics = [{name: value for name, value in line.items() if name != "train/loss"} for line in run.metrics]
    return run


def is_config(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("plan", {}), dict)


def holds_all(value, keys: dict) -> bool:
    """Whether the value is a list of dicts that have these keys, with values of these types."""
    return isinstance(value, list) and all(
        isinstance(line, dict)
        and all(isinstance(line.get(key), kind) for key, kind in keys.items())
        and isinstance(line.get("result") or {}, dict)
        for line in value
    )


def runs_of(folder: str) -> list[str]:
    """The run folders of a sweep, sorted by name. For a run's folder, the folder itself."""
    if not storage.exists(storage.join(folder, "sweep.json")):
        return [folder]
    runs = [name for name in storage.listdir(folder) if storage.exists(storage.join(folder, name, "config.json"))]
    return [storage.join(folder, name) for name in sorted(runs, key=_naturally)]


def _naturally(name: str) -> list:
    """A sort key that puts d2 before d10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _by_step(lines: list[dict]) -> list[dict]:
    """One line per step, in order. If a metric was logged twice at a step, the last value counts."""
    steps = {}
    for line in lines:
        steps[line["step"]] = steps.get(line["step"], {}) | line
    return [steps[step] for step in sorted(steps)]


def series(run: Run, *keys: str) -> list[tuple[float, ...]]:
    """The finite values of the metrics, at the steps that logged all of them."""
    rows = (tuple(line.get(key, math.nan) for key in keys) for line in run.metrics)
    return [row for row in rows if all(isinstance(v, int | float) and math.isfinite(v) for v in row)]


def flatten(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# Numbers as text


def show(value) -> str:
    """A setting or number as text: 16,384, 4.331e19, 0.02, yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, list):
        return ", ".join(map(show, value))
    if not isinstance(value, int | float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e12:
        return f"{value:.4g}".replace("e+", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.5g}"


def duration(seconds: float) -> str:
    """12.3 s, 3 min 12 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


NUMBERS: dict[str, tuple[str, Callable, Callable]] = {  # metric: (label, function that picks a value, format)
    "val/bpb": ("validation bits per byte", lambda v: v[-1], "{:.4f}".format),
    "core_metric": ("CORE", lambda v: v[-1], "{:.4f}".format),
    "chatcore_metric": ("ChatCORE", lambda v: v[-1], "{:.4f}".format),
    "pass@1": ("pass@1 on held-out questions", lambda v: v[-1], "{:.3f}".format),
    "rl/reward": ("reward, mean of the last step", lambda v: v[-1], "{:.3f}".format),
    "train/loss": ("training loss, nats per token", lambda v: v[-1], "{:.4f}".format),
    "step": ("steps", lambda v: v[-1], show),
    "total_training_time": ("training time", lambda v: v[-1], duration),
    "total_training_flops": ("training FLOPs", lambda v: v[-1], show),
    "train/tok_per_sec": ("tokens per second, median", median, "{:,.0f}".format),
    "train/mfu": ("MFU, median", median, "{:.1%}".format),
    "train/peak_memory_mb": ("peak memory, MB", max, "{:,.0f}".format),
}


def numbers(run: Run) -> dict[str, str]:
    """{label: text} of the depth, the parameters and the run's measurements."""
    found = {}
    plan = run.config.get("plan", {})
    if "depth" in plan or "depth" in run.config:
        found["depth"] = show(plan.get("depth", run.config.get("depth")))
    if total := plan.get("param_counts", {}).get("total"):
        found["parameters"] = show(total)
    for key, (label, choose, text) in NUMBERS.items():
        if values := [v for (v,) in series(run, key)]:
            found[label] = text(choose(values))
        if key == "val/bpb":
            last = {name: series(run, SOURCE_BPB + name)[-1:] for name in sources_of([run])}
            found |= {f"{label}, {name}": text(value) for name, [(value,)] in last.items()}
    return found


def sources_of(runs: list[Run]) -> list[str]:
    """Names of the sources that have their own val/bpb."""
    keys = dict.fromkeys(key for run in runs for line in run.metrics for key in line if key.startswith(SOURCE_BPB))
    return [key.removeprefix(SOURCE_BPB) for key in keys if any(series(run, key) for run in runs)]


# Charts


def chart(runs: list[Run], metric: str, x: str) -> Markup | None:
    """A chart of one metric of all runs against step, time or FLOPs. None if no run has the metric."""
    curves = [series(run, "step", x, metric) for run in runs]
    if x == "total_training_flops":  # a logarithmic scale has no zero
        curves = [[point for point in curve if point[1] > 0] for curve in curves]
    if not any(curves):
        return None
    figure, axes = empty_figure()
    unit, scale = _x_unit(x, max(point[1] for curve in curves for point in curve))
    for i, curve in enumerate(curves):
        kept = sorted({round(j) for j in np.linspace(0, len(curve) - 1, min(len(curve), MAX_POINTS))})
        axes.plot(
            [curve[j][1] / scale for j in kept],
            [curve[j][2] for j in kept],
            color=SERIES[i % len(SERIES)],
            linestyle=DASHES[i // len(SERIES) % len(DASHES)],
            marker="o" if len(curve) <= 30 else None,
            markersize=3.5,
            linewidth=1.7,
        )
    _limit(axes, [point for curve in curves for point in curve if point[0] >= STEEP_START * curve[-1][0]], x)
    source = metric.removeprefix(SOURCE_BPB) if metric.startswith(SOURCE_BPB) else None
    style(axes, f"{X_AXES[x]}{unit}" + (f": {source}" if source else ""))
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=NICE_STEPS, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    label = f"{CURVES['val/bpb']}, of {source}" if source else CURVES[metric]
    return svg(figure, f"{label}, against {X_AXES[x]}")


def _x_unit(x: str, largest: float) -> tuple[str, float]:
    """(unit to add to the label, divisor of the values)."""
    if x != "total_training_time":
        return "", 1
    if largest < 300:
        return " (s)", 1
    return (" (min)", 60) if largest < 7200 else (" (h)", 3600)


def _limit(axes: Axes, shown: list[tuple[float, ...]], x: str) -> None:
    """Fit the axes to the points after the steep start, because everything else would look flat beside it."""
    low, high = (choose(point[2] for point in shown) for choose in (min, max))
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if x == "total_training_flops":
        axes.set_xscale("log")
        axes.set_xlim(min(point[1] for point in shown) / 1.3, max(point[1] for point in shown) * 1.3)
    else:
        axes.set_xlim(left=0)


# The page


def write_report(run_folders: list[str], out: str, title: str = "nanochat-ray") -> None:
    """Write the page. run_folders and out are paths or URIs. Raises FileNotFoundError if a folder does not exist."""
    if not run_folders:
        raise ValueError("a report needs at least one run folder")
    found = [about for uri in run_folders if (about := find(uri))]
    runs = [read_run(uri) for folder in run_folders for uri in runs_of(folder)]
    charts = {label: [chart(runs, metric, x) for x in X_AXES] for metric, label in CURVES.items()}
    of_sources = [chart(runs, SOURCE_BPB + name, "step") for name in sources_of(runs)]
    charts |= {f"{CURVES['val/bpb']}, of each source": of_sources}
    measured, beside = [], []
    for run in runs:
        measured.append({})
        beside.append([])
        with run.part("the table of numbers"):
            measured[-1] = numbers(run)
        with run.part("the time to GPT-2's CORE"):
            beside[-1] = beside_nanochat(run.name, run.config, run.metrics) if run.stages else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # because samples are text of a model
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "show": show,
        "duration": duration,
        "flatten": flatten,
        "words": lambda name: name.replace("_", " "),
    }
    html = environment.get_template("report.html.jinja").render(
        title=title,
        steep_start=f"{STEEP_START:.0%}",
        findings=found,
        runs=runs,
        beside=beside,
        gpt2_core=GPT2_CORE,
        measured=measured,
        columns=list(dict.fromkeys(label for values in measured for label in values)),
        charts={label: drawn for label, charted in charts.items() if (drawn := [c for c in charted if c])},
    )
    storage.write_bytes(out, html.encode())


def find(folder: str) -> findings.Findings | None:
    """The findings of a sweep's folder. If they can't be computed, a sentence says so."""
    try:
        return findings.read(folder)
    except Exception as error:
        return findings.Findings(storage.name(folder), [f"the findings are left out: {one_line(error)}"])


def conclude(folder: str, title: str) -> str:
    """Print a sweep's findings and write its report.html. Returns the report's URI."""
    out = storage.join(folder, "report.html")
    with measuring("the report"):
        write_report([folder], out, title)
    found = find(folder)
    for sentence in found.sentences if found else ():
        print(sentence)
    print(f"results   {storage.join(folder, 'results.csv')}\nreport    {out}")
    return out


def main(
    run_folders: Annotated[list[str], tyro.conf.Positional], /, out: str = "report.html", title: str = "nanochat-ray"
) -> None:
    """Write one HTML page about any number of runs.

    Args:
        run_folders: Folders of runs or sweeps, as paths or URIs.
        out: The page to write.
        title: The heading of the page.
    """
    try:
        write_report(run_folders, out, title)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
