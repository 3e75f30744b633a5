"""Checks on a GPU in order of worth: training, decoding, the tests marked gpu, a whole speedrun, the service.

    python -m benchmarks.gpu --minutes 6                    as many checks as fit into six minutes
    python -m benchmarks.gpu --only decode_d12 prefill      only these
    python -m benchmarks.gpu --tiny                         on a CPU with tiny sizes, to test the checks themselves

Each check is a process with a time limit of its own. When it ends, its line {name, figures, seconds, error, gpu, torch,
commit, date} is appended to --out. A check that crashes or runs out of time keeps the figures that it has reported,
and the next check starts.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_checks import CHECKS, Check
from nanochat_ray import storage
from nanochat_ray.session import one_line_errors

TINY_LIMIT = 240  # seconds of a check with --tiny
TINY_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # tiny matmuls gain nothing from more threads
GPU_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as launch.py gives it to workers
GRACE = 2  # a check may take this many times its usual seconds


@dataclass
class Options:
    only: tuple[str, ...] = ()
    """Names of the checks to run; all of them by default."""
    list: bool = False
    """Print the checks with their targets and usual seconds, and run none."""
    minutes: float | None = None
    """Time for all checks together. A check whose usual seconds are more than what is left is not run."""
    out: str = str(Path(__file__).with_name("results") / "gpu.jsonl")
    """File that the lines are appended to. The output of each check goes to the folder logs beside it."""
    tiny: bool = False
    """Run on a CPU with tiny sizes."""


def chosen(options: Options) -> list[Check]:
    """Raises ValueError for a name that is not a check."""
    names = [check.name for check in CHECKS]
    if unknown := [name for name in options.only if name not in names]:
        raise ValueError(f"no check {unknown[0]!r}; there are {', '.join(names)}")
    return [check for check in CHECKS if not options.only or check.name in options.only]


def run(options: Options) -> list[dict]:
    """Run the checks; returns their lines. Raises ValueError without a GPU, unless tiny."""
    checks = chosen(options)
    if not options.tiny and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --tiny runs the checks on a CPU")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * (options.minutes or math.inf)
    lines = []
    for check in checks:
        left = deadline - time.monotonic()
        if left < check.seconds:
            print(f"{check.name}: not run, {left:.0f} s are left and it takes {check.seconds}", flush=True)
            continue
        print(f"{check.name}: …", flush=True)
        lines.append(measure(check, min(left, TINY_LIMIT if options.tiny else GRACE * check.seconds), options))
        with open(options.out, "a") as f:
            f.write(storage.to_json(lines[-1]) + "\n")
        print(f"{check.name}: {lines[-1]['seconds']:.0f} s, {lines[-1]['error'] or 'done'}", flush=True)
    return lines


def measure(check: Check, limit: float, options: Options) -> dict:
    """The line of one check, which runs in a process of its own for at most `limit` seconds."""
    log = Path(options.out).parent / "logs" / f"{check.name}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as out:
        figures = Path(folder) / "figures.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu_checks", check.name, str(figures)]
        environment = os.environ | (TINY_ENVIRONMENT if options.tiny else GPU_ENVIRONMENT)
        command += ["--tiny"] if options.tiny else []
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            error = None if process.wait(limit) == 0 else last_line(log)
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        finally:
            kill(process)
        return {
            "name": check.name,
            "figures": read_figures(figures),
            "seconds": round(time.monotonic() - began, 1),
            "error": error,
            "gpu": None if options.tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def kill(process: subprocess.Popen) -> None:
    """End a check with all that it started, so that nothing is left on the GPU: Ray's processes leave its group."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "ended without a word"


def read_figures(file: Path) -> dict:
    """All that the check reported, a later value in place of an earlier one."""
    figures = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the check was killed while it wrote its last line
            figures |= json.loads(line)
    return figures


def commit() -> str:
    """Of the working tree, or where only its files were copied, the one that the copy was packed with."""
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    packed = Path(".gpu/commit")
    return packed.read_text().strip() if packed.exists() else "unknown"


def result_table(lines: list[dict], options: Options) -> Table:
    """A row for each target, and for each further number of a check that has no target."""
    table = Table("check", "figure", "value", "target", "holds", title="GPU checks", title_justify="left")
    by_name = {line["name"]: line for line in lines}
    for check in chosen(options):
        if (line := by_name.get(check.name)) is None:
            table.add_row(check.name, "not run")
            continue
        figures = line["figures"]
        for target in check.targets:
            value = figures.get(target.figure)
            holds = "–" if value is None or options.tiny else "yes" if target.holds(value) else "NO"
            table.add_row(check.name, target.figure, number(value), str(target), holds)
        if not check.targets:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    table.add_row(check.name, name, number(value), "–", "–")
        if line["error"]:
            table.add_row(check.name, "error", line["error"])
    return table


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def list_table(options: Options) -> Table:
    table = Table("check", "what", "targets", "seconds")
    for check in chosen(options):
        targets = "\n".join(f"{target.figure} {target}" for target in check.targets)
        table.add_row(check.name, check.what, targets or "–", str(check.seconds))
    return table


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.gpu", description=__doc__)
    console = Console(highlight=False)
    console.print(list_table(options) if options.list else result_table(run(options), options))


if __name__ == "__main__":
    main()
