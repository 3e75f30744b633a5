"""Sweeps: what is finished stays so, what was killed goes on to the same end, and the cluster is used as it can be."""

import csv
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import ray

from experiments import miniseries, sweep
from nanochat_ray import storage
from nanochat_ray.model.scaling import BASE_LRS, plan_run
from nanochat_ray.train import hosts, launch, pretrain
from nanochat_ray.train.metrics import read_metrics

OPTIONS = {"preset": "cpu", "ratio": 0.05, "depths": [1, 2], "name": "series"}


def write_bundle(folder: Path) -> str:
    """A CORE bundle of one task."""
    (folder / "eval_data").mkdir(parents=True)
    examples = [{"context": f"the letter after {a} is", "continuation": b} for a, b in ("ab", "bc", "cd")]
    (folder / "eval_data" / "next.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    entry = {"label": "next", "dataset_uri": "next.jsonl", "num_fewshot": [1], "icl_task_type": "language_modeling"}
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [entry]}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nnext,0\n")
    return str(folder)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(str(run_dir)) if "train/loss" in line), default=0)


def wait_until(condition, process=None) -> None:
    while not condition() and (process is None or process.poll() is None):
        time.sleep(0.05)


def train_workers() -> list[psutil.Process]:
    """Of this process's Ray."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_a_series_killed_and_started_again_ends_as_one_that_was_not(rows, ray_session, nanochat_ray_home, tmp_path):
    """First its driver is killed, then a worker of the second start."""
    series, bundle = nanochat_ray_home / "runs" / "series", write_bundle(tmp_path / "bundle")
    flags = [
        str(part)
        for key, value in (OPTIONS | {"bundle": bundle}).items()
        if key != "depths"
        for part in (f"--{key}", value)
    ]
    command = [sys.executable, "-m", "experiments.miniseries", *flags, "--rows", rows, "--depths", "1", "2"]
    environment = os.environ | {"WANDB_MODE": "disabled", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with open(tmp_path / "first", "w") as out:
        first = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    wait_until(lambda: last_step(series / "d2") >= 8, first)
    first.kill()
    first.wait()
    assert "d1 finished" in (tmp_path / "first").read_text()
    of_d1 = (series / "d1" / "result.json").stat().st_mtime_ns
    assert not (series / "d2" / "result.json").exists()

    reached = []

    def kill_worker():
        wait_until(lambda: last_step(series / "d2") >= 13)
        reached.extend(p.pid for p in train_workers())
        for process in train_workers():
            process.kill()

    thread = threading.Thread(target=kill_worker)
    thread.start()
    report = miniseries.run(miniseries.MiniseriesOptions(**OPTIONS, rows=rows, bundle=bundle))
    thread.join()
    assert reached
    assert (series / "d1" / "result.json").stat().st_mtime_ns == of_d1

    with open(series / "results.csv") as f:
        lines = list(csv.DictReader(f))
    assert list(lines[0]) == sweep.COLUMNS
    d1, d2 = lines
    assert [line["depth"] for line in lines] == ["1", "2"]
    assert float(d2["val_bpb"]) < float(d1["val_bpb"])
    assert all(0 <= float(line["core_metric"]) <= 1 and not line["notes"] for line in lines)
    plan = plan_run(2, target_param_data_ratio=0.05, sequence_len=64, vocab_size=4096, head_dim=64, window_pattern="L",
                    total_batch_size=2048)  # fmt: skip
    assert int(d2["num_iterations"]) == plan.num_iterations == last_step(series / "d2")
    assert float(d2["flops"]) == plan.total_flops
    assert int(d2["params_total"]) == plan.param_counts["total"]
    page = Path(report).read_text()
    assert "can&#39;t be predicted" in page and "<figure>" in page

    config = json.loads((series / "d2" / "config.json").read_text())
    fields = {key: config[key] for key in pretrain.PretrainOptions.__dataclass_fields__}
    alone = pretrain.run(pretrain.PretrainOptions(**fields | {"run": "alone"}))
    assert abs(alone.val_bpb - float(d2["val_bpb"])) < 1e-6


@pytest.mark.cluster
def test_runs_of_1_2_and_4_gpus_share_two_nodes_of_4(tmp_path):
    """They run at once, each on one node; one that finds no room waits, and no longer than until there is."""
    runs = [["one", 1, 12], ["two", 2, 12], ["four", 4, 12], ["big", 4, 1]]
    script = str(Path(__file__).with_name("pack.py"))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), json.dumps(runs)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name, *_ in runs}
    first = [results[name] for name in ("one", "two", "four")]
    assert max(r["started"] for r in first) < min(r["ended"] for r in first)
    assert [r["nodes"] for r in results.values()] == [1] * 4
    assert results["big"]["started"] > min(r["ended"] for r in first)


def limited_to(megabytes: int):
    """The training loop, in a process that may take so much more memory than it has."""

    def train_loop(config: dict) -> None:
        status = Path("/proc/self/status").read_text()
        now = int(re.search(r"VmData:\s+(\d+)", status)[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now + megabytes * 2**20,) * 2)
        launch_loop(config)

    launch_loop = launch.train_loop_per_worker
    return train_loop


@pytest.mark.slow
def test_out_of_memory_the_device_batch_is_halved(rows, ray_session, nanochat_ray_home, monkeypatch):
    monkeypatch.setattr(launch, "train_loop_per_worker", limited_to(500))
    monkeypatch.setattr(sweep, "report_to_tune", lambda options: lambda metrics: None)  # no trial around it
    options = pretrain.PretrainOptions(
        depth=2, rows=rows, run="wide", head_dim=32, total_batch_size=256 * 64, num_iterations=1, eval_tokens=1024,
        eval_every=0, sample_every=0, save_every=0, dtype="float32", compile=False, device_batch_size=256, workers=1,
    )  # fmt: skip
    result, used, notes = sweep.train_within_memory(options, BASE_LRS, sweep.shared())
    assert result.step == 1
    assert notes[0] == "out of memory with 256 rows per forward pass, continued with 128"
    assert used == replace(options, device_batch_size=256 >> len(notes))


def test_a_folder_is_of_one_sweep(nanochat_ray_home):
    options = sweep.SweepOptions(name="mine")
    name, folder = sweep.begin("miniseries", options, {"rows": "a", "seed": 1})
    assert (name, folder) == ("mine", str(nanochat_ray_home / "runs" / "mine"))
    assert sweep.begin("miniseries", options, {"rows": "a", "seed": 1}, budgets=[1]) == (name, folder)
    with pytest.raises(ValueError, match="was started with seed 1, not seed 2: take another --name"):
        sweep.begin("miniseries", options, {"rows": "a", "seed": 2})
    names = {sweep.begin("miniseries", sweep.SweepOptions(), {"seed": seed})[0] for seed in (1, 2, 2)}
    assert len(names) == 2


def test_workers_by_depth(monkeypatch):
    """On 8 GPUs, as many as let each depth be done no later than the largest."""
    monkeypatch.setattr(sweep.ray, "cluster_resources", lambda: {"GPU": 8.0})
    monkeypatch.setattr(launch, "smallest_gpu", lambda: 79 * 2**30)
    plans = [plan_run(depth) for depth in (12, 16, 20, 24)]
    shared = sweep.share_workers(sweep.SweepOptions(), plans)
    assert shared == [1, 1, 4, 8]
    seconds = [plan.total_flops / workers for plan, workers in zip(plans, shared, strict=True)]
    assert max(seconds) == seconds[-1]
    assert sweep.share_workers(sweep.SweepOptions(workers=[2]), plans) == [2] * 4
    with pytest.raises(ValueError, match="2 numbers for 4 runs"):
        sweep.share_workers(sweep.SweepOptions(workers=[1, 2]), plans)


@pytest.mark.parametrize(
    ("depth", "runs", "gpus", "gib", "workers"),
    [(12, 12, 8, 79, 1), (12, 12, 32, 79, 2), (20, 2, 8, 79, 4), (12, 1, 8, 79, 8), (26, 12, 8, 22, 4)],
)
def test_equal_runs_share_the_gpus_evenly(depth, runs, gpus, gib, workers, monkeypatch):
    """And each gets what its memory needs."""
    monkeypatch.setattr(sweep.ray, "cluster_resources", lambda: {"GPU": float(gpus)})
    monkeypatch.setattr(launch, "smallest_gpu", lambda: gib * 2**30)
    assert sweep.share_workers(sweep.SweepOptions(), [plan_run(depth)] * runs) == [workers] * runs


@pytest.mark.parametrize(
    ("gpus", "workers", "wanted"),
    [([4, 4], [1, 2, 4], 3), ([4, 4], [8, 8, 8], 1), ([8], [5, 5, 1, 1, 1], 4), ([2], [4], 1)],
)
def test_as_many_runs_at_once_as_have_room(gpus, workers, wanted, monkeypatch):
    nodes = [{"NodeID": str(i), "Alive": True, "Resources": {"GPU": n, "CPU": 8}} for i, n in enumerate(gpus)]
    monkeypatch.setattr(sweep.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(hosts, "can_grow", lambda: True)
    assert sweep.concurrent(workers) == wanted


@pytest.mark.parametrize(
    "message",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "The actor died because its node was running low on memory",
        "MemoryError",
    ],
)
def test_what_running_out_of_memory_looks_like(message):
    assert sweep.OUT_OF_MEMORY.search(f"Training failed due to worker errors:\n[Rank 0]\n{message}\n")
    assert not sweep.OUT_OF_MEMORY.search("ActorDiedError: The actor died unexpectedly before finishing this task.")


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [{"run": f"d{d}", "depth": d, "val_bpb": 1 / 3 + d, "core_metric": None, "notes": ""} for d in (2, 10)]
    for row in rows:
        (tmp_path / row["run"]).mkdir()
        (tmp_path / row["run"] / "result.json").write_text(json.dumps(row))
    trials = [{"name": name} for name in ("d2", "d10", "d12")]
    assert sweep.write_results(str(tmp_path), trials) == rows
    for row, read in zip(rows, sweep.read_results(str(tmp_path)), strict=True):
        assert {key: read[key] for key in row} == row | {"notes": None}


def test_a_run_that_diverged_is_finished_without_a_loss(tmp_path, monkeypatch):
    """Nothing is raised after the others, and a second start does not train it again."""
    told = []
    monkeypatch.setattr(sweep.tune, "report", told.append)
    plan = plan_run(2, sequence_len=64, vocab_size=4096, head_dim=64, window_pattern="L", num_iterations=50)
    (tmp_path / "d2").mkdir()
    storage.write_json(str(tmp_path / "d2" / "config.json"), {"plan": asdict(plan) | {"depth": 2, "n_embd": 128}})
    trial = {"name": "d2", "bundle": "core", "options": {"seed": 3, "workers": 1}, "columns": {"side": "candidate"}}
    sweep.report_failure(trial, str(tmp_path / "d2"), OSError("the disk is full"))
    assert told == [{"error": "OSError: the disk is full"}] and not sweep.is_finished(str(tmp_path), trial)
    error = ValueError(f"{tmp_path}/d2: the loss is nan at step 7: look at the data, or lower the learning rates")
    sweep.report_failure(trial, str(tmp_path / "d2"), error)
    assert len(told) == 1 and sweep.is_finished(str(tmp_path), trial)
    [row] = sweep.write_results(str(tmp_path), [trial])
    assert (row["val_bpb"], row["depth"], row["seed"], row["side"]) == (None, 2, 3, "candidate")
    assert row["notes"].startswith("diverged: the loss is nan at step 7")


def test_a_score_that_can_not_be_had_costs_a_run_nothing_and_is_measured_by_the_next_start(tmp_path, monkeypatch):
    reported, options = [], pretrain.PretrainOptions(workers=1, device_batch_size=1)
    monkeypatch.setattr(sweep.tune, "report", reported.append)
    monkeypatch.setattr(sweep.core, "run", lambda options: Path(options.bundle).read_text())
    row = {"val_bpb": 2.0}
    monkeypatch.setattr(sweep, "write_result", lambda run, more: storage.write_json(f"{run}/result.json", row | more))
    trial = {"name": "d1", "bundle": str(tmp_path / "gone"), "max_per_task": 1, "columns": {}}
    (tmp_path / "d1").mkdir()
    sweep.measuring.failed.clear()
    sweep.finish_trial(trial, options, str(tmp_path / "checkpoint"), str(tmp_path / "d1"), notes=["a note"])
    [told] = reported
    assert len(told["unmeasured"]) == 1 and told["unmeasured"][0].startswith("CORE failed: FileNotFoundError: ")
    result = storage.read_json(str(tmp_path / "d1" / "result.json"))
    assert result["core_metric"] is None and result["notes"].startswith("a note; CORE failed: ")
    assert not sweep.is_finished(str(tmp_path), trial)
    assert sweep.is_finished(str(tmp_path), trial | {"bundle": None})
    sweep.measuring.failed.clear()
