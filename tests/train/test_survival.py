"""Runs that lose a worker, a node, their driver, their newest checkpoint, their disk or their mind."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import psutil
import pytest
from runs import assert_every_row_once, assert_same_weights, kept, losses, steps
from safetensors.torch import load_file, save_file

from nanochat_ray import storage
from nanochat_ray.train import checkpoint, launch, loop, pretrain
from nanochat_ray.train.metrics import read_metrics

pytestmark = pytest.mark.slow


def wait_until(condition, process=None) -> None:
    """A run that never gets there fails by the test's timeout, one that ends by what the test then looks at."""
    while not condition() and (process is None or process.poll() is None):
        time.sleep(0.02)


def train_workers(driver: psutil.Process) -> list[psutil.Process]:
    """Those of this driver's Ray, and no other."""
    return [p for p in driver.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_killed_worker_is_replaced_and_the_end_is_bit_identical(uninterrupted, tiny, nanochat_ray_home):
    run_dir, killed = nanochat_ray_home / "runs" / "killed", []

    def kill_at(step):
        wait_until(lambda: max(losses(run_dir), default=0) >= step)
        for process in train_workers(psutil.Process()):
            process.kill()
            killed.append(process.pid)

    thread = threading.Thread(target=kill_at, args=[random.randint(9, 17)])
    thread.start()
    result = pretrain.run(tiny(run="killed"))
    thread.join()
    assert killed
    assert_same_weights(run_dir, uninterrupted.run_dir)
    assert_every_row_once(run_dir, 20, 8)
    assert losses(run_dir) == losses(uninterrupted.run_dir)
    assert result.val_bpb == uninterrupted.val_bpb


def test_a_killed_driver_a_sigterm_and_a_damaged_checkpoint(tiny, mixed, nanochat_ray_home, tmp_path, capsys):
    """The same command goes on each time, and the end is that of a run to which nothing happened; with two sources."""
    # Long enough to be interrupted: 20 steps may end before a signal is heard.
    options = tiny(run="driver", rows=mixed, num_iterations=100, eval_every=50, save_every=10)
    whole = pretrain.run(replace(options, run="not-interrupted"))
    assert "pretrain: 30.0% again, whose" in capsys.readouterr().out
    (measured,) = [line for line in read_metrics(whole.run_dir) if line["step"] == 50 and "val/bpb" in line]
    assert measured["val/bpb/topics"] == measured["val/bpb/again"] == pytest.approx(measured["val/bpb"])
    changed = {k: v for k, v in asdict(options).items() if v != getattr(pretrain.PretrainOptions, k)}
    flags = [str(part) for k, v in changed.items() for part in (f"--{k.replace('_', '-')}", v)]
    command = [sys.executable, "-m", "nanochat_ray.cli", "pretrain", *flags]  # with a Ray of its own
    environment = os.environ | {"WANDB_MODE": "disabled"}
    run_dir = nanochat_ray_home / "runs" / "driver"

    def start(name):
        with open(tmp_path / name, "w") as out:
            return subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    first = start("first")
    try:
        wait_until(lambda: losses(run_dir) and checkpoint.latest_checkpoint(str(run_dir)), first)
        assert first.poll() is None, (tmp_path / "first").read_text()
        workers = train_workers(psutil.Process(first.pid))
    finally:
        first.kill()
        first.wait()

    second = start("second")
    try:
        wait_until(lambda: "resuming from step" in (tmp_path / "second").read_text(), second)
        resumed_at = int(re.search(r"resuming from step (\d+)", (tmp_path / "second").read_text())[1])
        wait_until(lambda: max(losses(run_dir)) >= resumed_at + 2, second)
        os.killpg(second.pid, signal.SIGTERM)  # to Ray's processes and the workers, too, as supervisors do
        began = time.monotonic()
        second.wait(timeout=60)
        print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    finally:
        second.kill()
    said = (tmp_path / "second").read_text()
    assert second.returncode == 130, said
    assert "Traceback" not in said
    assert "stopping after this step" in said
    assert workers and not psutil.wait_procs(workers, timeout=0)[1]  # none of the first driver's was left to write
    newest = Path(checkpoint.latest_checkpoint(str(run_dir)))
    stopped_at = checkpoint.read_meta(str(newest))["step"]
    assert resumed_at + 2 <= stopped_at < 100
    assert f"stopped at step {stopped_at}" in said
    assert_every_row_once(run_dir, stopped_at, 8)

    with open(newest / "optimizer_00000.safetensors", "r+b") as f:
        f.truncate(1000)
    pretrain.run(options)
    said = capsys.readouterr().out
    assert re.search(rf"skipped a damaged one: .*{newest.name}/optimizer_00000\.safetensors", said)
    assert int(re.search(r"resuming from step (\d+)", said)[1]) < stopped_at
    assert_same_weights(run_dir, whole.run_dir)
    assert_every_row_once(run_dir, 100, 8)
    assert kept(run_dir) == ["step_000090", "step_000100"]  # the damaged one is gone


@pytest.fixture
def small_disk(nanochat_ray_home, uninterrupted):
    """A run folder on a disk of its own, with room for one checkpoint and a half."""
    folder = nanochat_ray_home / "runs" / "small"
    folder.mkdir(parents=True)
    size = sum(file.stat().st_size for file in Path(uninterrupted.checkpoint).iterdir())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", folder])
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_checkpoints_but_not_the_run(small_disk, uninterrupted, tiny, capsys):
    with pytest.raises(ValueError, match=r"step 20 could not be saved: .*No space left on device.* MB free") as failed:
        pretrain.run(tiny(run="small"))
    assert f"{small_disk}: " in str(failed.value)
    rescued = Path(re.search(r"; it is in (\S+) instead: make room, and move it to ", str(failed.value))[1])
    assert_same_weights(rescued.parents[1], uninterrupted.run_dir)
    shutil.rmtree(rescued.parents[1])
    lines = [line for line in capsys.readouterr().out.splitlines() if "step 16 is not saved" in line]
    assert len(lines) == 1 and "No space left on device" in lines[0]
    assert kept(small_disk) == ["step_000008"]
    assert_every_row_once(small_disk, 20, 8)
    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    pretrain.run(tiny(run="small"))
    assert "resuming from step 8" in capsys.readouterr().out
    assert_every_row_once(small_disk, 20, 8)
    assert_same_weights(small_disk, uninterrupted.run_dir)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(uninterrupted, tiny, nanochat_ray_home):
    """Weights turned to NaN between two starts stand in for a divergence."""
    run_dir = nanochat_ray_home / "runs" / "diverged"
    run_dir.parent.mkdir(parents=True)
    shutil.copytree(uninterrupted.run_dir, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_000020")
    folder = run_dir / "checkpoints" / "step_000016"
    broken = load_file(folder / "model.safetensors")
    broken["lm_head.weight"].fill_(float("nan"))
    meta = checkpoint.read_meta(str(folder))
    save_file(broken, folder / "model.safetensors")
    file = folder / "model.safetensors"
    meta["files"]["model.safetensors"] = {"size": file.stat().st_size, "sha256": checkpoint._sha256(file)}
    storage.write_json(str(folder / "meta.json"), meta)
    with pytest.raises(ValueError, match="the loss is nan at step 16"):
        pretrain.run(tiny(run="diverged"))
    assert checkpoint.latest_checkpoint(str(run_dir)).endswith("step_000016")


def test_a_loss_worse_than_guessing_is_hopeless():
    """Not in the first 40 steps, which may begin anywhere."""
    progress = loop.Progress()
    for _ in range(39):
        progress.learn(12.0, vocab_size=4096)
    with pytest.raises(loop.Diverged, match=r"the loss is 12\.00 at step 40, far above 8\.32 of random guessing"):
        progress.learn(12.0, vocab_size=4096)


def test_what_no_new_start_would_mend_ends_the_run_at_once_and_says_why(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pretrain, "train", lambda *given: given)
    config, *more = pretrain.run(tiny(run="again"))
    with pytest.raises(ValueError, match="missing") as failed:
        launch.train(replace(config, tokenizer=str(tmp_path / "missing")), *more)
    assert "\n" not in str(failed.value)
    assert "worker 0 failed" not in capsys.readouterr().out  # said once, and not tried again


def test_workers_that_can_not_connect_are_started_again(tiny, monkeypatch, tmp_path, capsys):
    """At the first start their interface is not there, as on a host that has just come up."""
    marker = tmp_path / "first"

    class Backend(launch.network.TorchBackend):
        def on_start(self, worker_group, backend_config):
            if not marker.exists():
                marker.touch()
                worker_group.execute(lambda: os.environ.update(GLOO_SOCKET_IFNAME="none-such"))
            super().on_start(worker_group, backend_config)

    class TorchConfig(launch.network.TorchConfig):
        backend_cls = Backend

    monkeypatch.setattr(launch.network, "TorchConfig", TorchConfig)
    assert pretrain.run(tiny(run="connects", num_iterations=2)).step == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "trying again" in line]
    assert len(said) == 1 and said[0].startswith("pretrain: workers could not be started, trying again: ")
    print(said[0])


@pytest.mark.cluster
def test_a_worker_that_is_frozen_is_replaced(tiny, nanochat_ray_home, monkeypatch):
    """It neither computes nor answers, and holds what it has."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "10")
    run_dir, frozen = nanochat_ray_home / "runs" / "frozen", []

    def freeze():
        wait_until(lambda: max(losses(run_dir), default=0) >= 12)
        frozen.extend(train_workers(psutil.Process())[:1])
        frozen[0].suspend()

    thread = threading.Thread(target=freeze)
    thread.start()
    pretrain.run(tiny(run="frozen", workers=2, num_iterations=60, eval_every=0))
    thread.join()
    assert_every_row_once(run_dir, 60, 8)
    assert not psutil.wait_procs(frozen, timeout=0)[1]  # it was ended, else it would write when it wakes


@pytest.mark.cluster
def test_a_run_outlives_a_node_grows_back_and_saves_before_a_node_is_drained(tiny, nanochat_ray_home):
    """Seven rows a step, which two workers share unevenly."""
    options = tiny(run="node", workers=2, total_batch_size=7 * 64, num_iterations=160, eval_every=0, save_every=10)
    script = str(Path(__file__).with_name("lose_a_node.py"))
    environment = os.environ | {"WANDB_MODE": "disabled"}
    result = subprocess.run(
        [sys.executable, script, json.dumps(asdict(options))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    run_dir = nanochat_ray_home / "runs" / "node"
    assert_every_row_once(run_dir, 160, 7)
    assert [size for size, _ in groupby(line["train/world_size"] for line in steps(run_dir))] == [2, 1, 2]
    before_growing, before_draining = map(int, re.findall(r"step (\d+) is saved, because workers", result.stdout))
    shrunk, grown = map(int, re.findall(r"resuming from step (\d+), workers: [12]", result.stdout))
    assert 10 <= shrunk < before_growing <= grown < before_draining


@pytest.mark.cluster
def test_an_elastic_run_starts_beside_a_service_and_grows_when_that_ends(tmp_path):
    """It took all GPUs or none, and waited in silence."""
    script = str(Path(__file__).with_name("beside_a_service.py"))
    result = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    sizes, seconds, said = json.loads(result.stdout.splitlines()[-1])
    print(f"the first workers started after {seconds:.0f} s")
    assert sizes == [2, 3]
    assert said == ["3 workers of 1 GPU: 2 are free, continues with 2"]


@pytest.mark.cluster
def test_a_gpu_that_fails_twice_is_left_out_by_the_run_and_by_all_runs_of_a_sweep(tmp_path, rows):
    script = str(Path(__file__).with_name("a_bad_gpu.py"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, str(tmp_path), rows]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    of_sweep, of_run, said = storage.read_json(str(tmp_path / "result.json"))
    assert sorted(gpu for _, gpu in of_sweep) == ["0", "0", "1", "1"], of_sweep
    assert of_run == [["run", "0", "1"], ["run", "0", "1"], ["run", "1"]]
    assert any(re.search("^[ab]: workers failed twice on GPU 0 of host .*: all runs avoid them", s) for s in said)
    assert any(re.search("^pretrain: workers failed twice on GPU 0 of host .*: the run avoids them", s) for s in said)
