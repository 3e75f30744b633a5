"""Commands in processes that have imported torch and Ray already, which takes three seconds of each other start."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from subprocess import CompletedProcess

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["experiments.speedrun", "nanochat_ray.cli", "nanochat_ray.doctor", "serving.app", "serving.load_test"]
)


def run(module: str, *args: str, environment: dict[str, str]) -> CompletedProcess[str]:
    """As `python -m module args` with this environment, for commands that end before they start a Ray."""
    with tempfile.TemporaryDirectory() as folder:
        process = FORKSERVER.Process(target=_run, args=(module, args, environment, Path(folder)))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{module} {' '.join(args)} does not end")
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return CompletedProcess([module, *args], process.exitcode, *said)


def _run(module: str, args: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *args]
    warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
