"""Every command of the first pages and every --help, in a new home, as a newcomer types them."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forked
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.cli import STAGES

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
# A new home begins with docstrings: here of the standard library alone, as those of all packages take a minute.
NANOCHAT_RAY = """
import sysconfig
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *scheme, **more: get_path("stdlib" if name.endswith("lib") else name, *scheme, **more)
from nanochat_ray.cli import main
main()
"""
PAGES = ["README.md", "docs/speedrun.md", "docs/experiments.md"]
# Options that make a command of these pages take seconds, or else the test that runs this command.
TINY = {
    "nanochat-ray prepare": "--vocab-size 1024 --sequence-len 64",
    "nanochat-ray plan": "",
    "nanochat-ray doctor": "",
    "nanochat-ray leaderboard": "",
    "nanochat-ray pretrain": "--depth 1 --num-iterations 2 --total-batch-size 256 --eval-tokens 512 --compile False",
    "nanochat-ray sft": "--mixture offline --steps 2 --total-batch-size 256 --eval-tokens 512 --compile False",
    "nanochat-ray rl": "--steps 1 --prompts-per-step 2 --max-new-tokens 4 --eval-questions 2 --eval-samples 1",
    "nanochat-ray eval bpb": "--eval-tokens 512",
    "nanochat-ray chat": "-p Hello --max-tokens 4",
    "nanochat-ray serve": "tests/serving/test_command.py",
    "nanochat-ray import": "tests/train/test_checkpoint.py",
    "nanochat-ray export": "",
    "python -m experiments.miniseries": "tests/experiments/test_sweep.py",
    "python -m experiments.scaling_laws": "tests/experiments/test_sweep.py",
    "python -m experiments.compare": "tests/experiments/test_compare.py",
    "python -m experiments.research": "tests/experiments/test_research.py",
    "python -m experiments.mixtures": "tests/experiments/test_mixtures.py",
    "python -m experiments.report": "tests/experiments/test_report.py",
    "python -m experiments.tune_lr": "tests/experiments/test_tune_lr.py",
    "make": ".ci/run",
    "ray job submit": "tests/cluster/test_hosts_speedrun.py",
}
SHELL = ("source ", "export ", "set ")


def documented_commands() -> list[str]:
    """The commands in the code blocks of the pages, each on one line and without its comment."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```\n(.*?)^```", (REPOSITORY / page).read_text(), re.M | re.S)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [re.split(r"\s+# ", line)[0].strip() for line in lines]
    return [line for line in commands if line.startswith((*{name.split()[0] + " " for name in TINY}, *SHELL))]


def name_of(command: str) -> str:
    return next(name for name in sorted(TINY, key=len, reverse=True) if command.startswith(name))


def documented_command(name: str) -> list[str]:
    """The first such command of the pages, with the options that make it tiny."""
    command = next(line for line in documented_commands() if line.startswith(name))
    return [*shlex.split(command)[1:], *shlex.split(TINY[name])]


def environment_of(home: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HF_"))}
    return env | {"NANOCHAT_RAY_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "disabled"}


def run(home: Path, *args: str, **environment: str) -> str:
    """What `nanochat-ray ARGS` prints. It finds no Ray but its own."""
    env = environment_of(home) | environment
    said = subprocess.run(
        [sys.executable, "-c", NANOCHAT_RAY, *args], env=env, capture_output=True, text=True, timeout=180
    )
    assert said.returncode == 0, f"{' '.join(args)}: {said.stdout[-2000:]}\n{said.stderr[-4000:]}"
    assert "Traceback" not in said.stderr
    assert "Unhandled error" not in said.stderr
    return said.stdout


def test_every_command_of_the_pages_is_known_here():
    unknown = [c for c in documented_commands() if not c.startswith((*TINY, *SHELL))]
    assert not unknown, "add these to TINY"
    names = [name_of(command) for command in documented_commands() if not command.startswith(SHELL)]
    assert set(names) == set(TINY)
    assert all((REPOSITORY / test).exists() for test in TINY.values() if "/" in test)


def test_the_first_commands_in_a_new_home(tmp_path):
    """Two at a time: text that Ray's tasks make or download, with nothing there yet, and what reads nothing."""
    hub = tmp_path / "hub" / "datasets" / "karpathy" / "climbmix-400b-shuffle" / "resolve" / "main"
    hub.mkdir(parents=True)
    for i in (0, 1, 6542):
        texts = [f"Document {j} of shard {i}: {'word ' * (j % 50)}" for j in range(200)]
        pq.write_table(pa.table({"text": texts}), hub / f"shard_{i:05d}.parquet")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "hub")
    handler.log_message = None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(2) as pool:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        climbmix = ["prepare", "--source=climbmix", "--shards=2", "--vocab-size=280", "--sequence-len=32"]
        web = pool.submit(run, tmp_path / "web", *climbmix, HF_ENDPOINT=endpoint)
        docs = pool.submit(run, tmp_path / "docs", *documented_command("nanochat-ray prepare"))
        others = ("nanochat-ray plan", "nanochat-ray doctor", "nanochat-ray leaderboard")
        rest = [pool.submit(run, tmp_path / "empty", *documented_command(name)) for name in others]
        try:
            assert "downloaded 3/3 files" in web.result()
            assert "prepare: train" in docs.result()
            plan, doctor, _ = [command.result() for command in rest]
        finally:
            server.shutdown()
    assert "H100" in plan
    assert "ok" in doctor


@pytest.mark.cluster
def test_the_stages_in_the_order_of_the_pages(tmp_path):
    """In one home, each with what the one before it has made."""

    def checkpoint(args: list[str], folder: str) -> list[str]:
        """The arguments with a folder of runs/ in place of the documented one."""
        [found] = (tmp_path / "runs").glob(folder)
        return [str(found) if "…" in arg else arg for arg in args]

    run(tmp_path, *documented_command("nanochat-ray prepare"))
    assert "val/bpb" in run(tmp_path, *documented_command("nanochat-ray pretrain"))
    assert "val/bpb" in run(tmp_path, *checkpoint(documented_command("nanochat-ray sft"), "d1-*"))
    assert "checkpoint" in run(tmp_path, *checkpoint(documented_command("nanochat-ray rl"), "d1-*-sft"))
    assert "val/bpb" in run(tmp_path, *checkpoint(documented_command("nanochat-ray eval bpb"), "d1-*-sft"))
    run(tmp_path, *checkpoint(documented_command("nanochat-ray chat"), "d1-*-sft"))
    *export, out = checkpoint(documented_command("nanochat-ray export"), "d1-*-sft")
    run(tmp_path, *export, str(tmp_path / out))
    assert (tmp_path / "OUT" / "model.safetensors").exists()
    assert json.loads(next((tmp_path / "conversations").glob("*/manifest.json")).read_text())["train"]["rows"] > 100


def modules_with_a_main(*folders: str) -> list[str]:
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).glob("*.py"))]
    return [f"{path.parent.name}.{path.stem}" for path in files if "__main__" in path.read_text()]


def check_help(home: Path, commands: list[tuple[str, ...]]) -> None:
    for module, *args in commands:
        shown = forked.run(module, *args, "--help", environment=environment_of(home))
        assert shown.returncode == 0, shown.stderr
        assert "usage: " in shown.stdout and "Traceback" not in shown.stderr
    assert not home.exists()


def test_help_of_every_stage_and_experiment(tmp_path):
    stages = [("nanochat_ray.cli", stage) for stage in STAGES]
    evals = [("nanochat_ray.cli", "eval", kind) for kind in ("bpb", "core", "chat")]
    experiments = [(module,) for module in modules_with_a_main("experiments", "serving")]
    check_help(tmp_path / "home", [*stages, *evals, *experiments])


@pytest.mark.cluster
def test_help_of_every_benchmark(tmp_path):
    started_by_others = {"benchmarks.gpu_checks", "benchmarks.rl_peer", "benchmarks.clean_peers"}
    modules = set(modules_with_a_main("benchmarks")) - started_by_others
    check_help(tmp_path / "home", [(module,) for module in sorted(modules)])
