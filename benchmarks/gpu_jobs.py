"""Whole jobs on a GPU: the tests marked gpu, a speedrun that loses a worker, CORE."""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks import eval as eval_benchmark
from benchmarks import rl as rl_benchmark
from benchmarks.gpu_checks import Report
from benchmarks.gpu_inference import build
from benchmarks.gpu_training import device_of, now, plan_of
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals.core import evaluate_core
from nanochat_ray.train.metrics import read_metrics


def golden(report: Report, tiny: bool) -> None:
    """The tests marked gpu; with tiny those of the model, which skip what needs a GPU."""
    # Not all of tests: a GPU machine may lack the clients and stand-ins that other folders import.
    folders = ["tests/model", "tests/inference", "tests/train", "-m", "gpu"]
    paths = ["tests/model/test_gpt.py"] if tiny else folders
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", *paths]
        subprocess.run(command, check=False)
        report(**test_results(file))


def test_results(file: Path) -> dict:
    """Counts, and the names of the tests that failed, of pytest's report in JUnit's format."""
    suite = ElementTree.parse(file).getroot().find("testsuite")
    total, failed, skipped = (int(suite.get(name)) for name in ("tests", "failures", "skipped"))
    failed += int(suite.get("errors"))
    names = [
        case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {child.tag for child in case}
    ]
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped, "failures": names}


def speedrun(report: Report, tiny: bool) -> None:
    """The main job on docstrings. A training worker is killed when half of the steps are made."""
    with tempfile.TemporaryDirectory() as home:
        options = ["--preset", "cpu", "--source", "pydocs", "--run", "check", "--minutes", "0.1" if tiny else "1"]
        options += ["--depth", "1"] if tiny else []
        environment = os.environ | {"NANOCHAT_RAY_HOME": home, "WANDB_MODE": "disabled"}
        run_dir, began = Path(home) / "runs" / "check", time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "experiments.speedrun", *options], env=environment)
        try:
            report(killed_after_step=kill_worker_half_way(process, run_dir))
            code = process.wait()
        finally:
            process.kill()
        report(exit_code=code, job_seconds=time.perf_counter() - began)
        if code:
            raise RuntimeError(f"the speedrun ended with exit code {code}")
        report(**speedrun_figures(run_dir))


def kill_worker_half_way(process: subprocess.Popen, run_dir: Path) -> int:
    """Kill the training workers of a speedrun when half of its steps are made; returns the last step before that."""

    def workers() -> list[psutil.Process]:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]

    config = wait_for(lambda: json_of(run_dir / "config.json"), process)
    half = config["plan"]["num_iterations"] // 2
    step = wait_for(lambda: (step := last_step(run_dir)) > half and step, process)
    for worker in workers():
        worker.kill()
    return step


def wait_for(found: Callable, process: subprocess.Popen):
    """What `found` returns once it is true. Raises RuntimeError when the process ends first."""
    while not (result := found()):
        if process.poll() is not None:
            raise RuntimeError(f"the speedrun ended with exit code {process.returncode} before a worker was killed")
        time.sleep(0.02)
    return result


def json_of(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # not there yet, or not whole
        return None


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(str(run_dir)) if "train/loss" in line), default=0)


def speedrun_figures(run_dir: Path) -> dict:
    """Nothing happened if each step has one line and begins at the row where the step before it ended."""
    steps = [line for line in read_metrics(str(run_dir)) if "train/loss" in line]
    config = json_of(run_dir / "config.json")
    rows = config["plan"]["total_batch_size"] // config["plan"]["config"]["sequence_len"]
    whole = [line["step"] for line in steps] == list(range(1, config["plan"]["num_iterations"] + 1))
    whole &= [line["train/position"] for line in steps] == [rows * i for i in range(len(steps))]
    stages = {stage["stage"]: stage for stage in json_of(run_dir / "stages.json")}
    return {
        "as_if_nothing_happened": int(whole),
        "answers": sum(bool(answer["answer"].strip()) for answer in json_of(run_dir / "chat.json")),
        "steps": len(steps),
        "val_bpb": stages["pretrain"]["result"]["val/bpb"],
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
    }


def core(report: Report, tiny: bool, depth: int) -> None:
    """Examples a second, with reading the tasks and tokenizing them."""
    device = device_of(tiny)
    tokenizer = Tokenizer.load(str(eval_benchmark.TOKENIZER))
    config = replace(plan_of(depth, tiny).config, vocab_size=tokenizer.vocab_size)
    model = build(config, device)
    with tempfile.TemporaryDirectory() as folder:
        bundle = eval_benchmark.make_bundle(folder)
        evaluate_core(model, tokenizer, bundle, 2)  # warms up
        began = now(device)
        result = evaluate_core(model, tokenizer, bundle, 2 if tiny else 500)
        seconds = now(device) - began
    examples = sum(map(len, result.examples.values()))
    report(examples=examples, examples_per_s=examples / seconds)


def reinforcement(report: Report, tiny: bool, depth: int) -> None:
    """RL's asking beside the engine alone, and how long a step takes."""
    sizes = {"seq": 64, "vocab": 512, "prompts": 2, "samples": 2, "new": 4} if tiny else {"seq": 2048, "vocab": 32768}
    options = rl_benchmark.Options(depth=1 if tiny else depth, **{"prompts": 16, "samples": 16, "new": 256} | sizes)
    learner = rl_benchmark.Learner(options, options.depth)
    figures = rl_benchmark.engine(learner, rounds=1 if tiny else 3)
    report(asking=figures["asking"], engine=figures["engine"], asking_over_engine=figures["ratio"])
    seconds, learning, drawn = [learner.step() for _ in range(2)][-1]
    report(step_seconds=seconds, learning_seconds=learning, sampled_tokens=drawn)
