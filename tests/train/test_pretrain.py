"""Real TorchTrainer runs on tiny models."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import ray
from safetensors.torch import load_file, save_file

from nanochat_ray import storage
from nanochat_ray.train import checkpoint, pretrain
from nanochat_ray.train.metrics import read_metrics

pytestmark = pytest.mark.slow


def weights(run_dir):
    return load_file(Path(checkpoint.latest_checkpoint(run_dir)) / "model.safetensors")


def losses(run_dir):
    return {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}


def assert_same_weights(run_dir, other):
    theirs = weights(other)
    for name, tensor in weights(run_dir).items():
        assert tensor.equal(theirs[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RAY_HOME", str(tmp_path_factory.mktemp("home")))
        return pretrain.run(tiny(run="whole"))


def test_a_run_learns_and_leaves_what_the_design_says(uninterrupted, tiny):
    run_dir = Path(uninterrupted.run_dir)
    lines = read_metrics(str(run_dir))
    bpb = {line["step"]: line["val/bpb"] for line in lines if "val/bpb" in line}
    assert list(bpb) == [0, 5, 10, 15, 20]
    assert bpb[20] == uninterrupted.val_bpb < bpb[0]
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 21))
    named = "total_training_flops total_training_time train/lrm train/dt train/tok_per_sec train/mfu train/epoch"
    assert all(name in trained[-1] for name in [*named.split(), "train/peak_memory_mb"])
    assert 0 < trained[-1]["train/mfu"] < 1
    # The last two checkpoints are kept, and with them the best, which here is the last.
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_000016", "step_000020"]
    assert "## step 20" in (run_dir / "samples.md").read_text()
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".pkl", ".pt")]


def test_a_finished_run_is_not_run_again(uninterrupted, tiny, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(Path(uninterrupted.run_dir).parents[1]))
    before = (Path(uninterrupted.checkpoint) / "meta.json").stat().st_mtime_ns
    assert pretrain.run(tiny(run="whole")).val_bpb == uninterrupted.val_bpb
    assert "nothing to do" in capsys.readouterr().out
    assert (Path(uninterrupted.checkpoint) / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"num_iterations 20, not num_iterations 21"):
        pretrain.run(tiny(run="whole", num_iterations=21))


def test_a_killed_worker_is_replaced_and_the_end_is_bit_identical(uninterrupted, tiny):
    killed = []
    target = random.randint(9, 19)

    def kill_when_it_gets_there(run_dir):
        while max(losses(run_dir), default=0) < target:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):  # of this session's Ray, and no other
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    run_dir = str(Path(os.environ["NANOCHAT_RAY_HOME"]) / "runs" / "killed")
    thread = threading.Thread(target=kill_when_it_gets_there, args=[run_dir])
    thread.start()
    result = pretrain.run(tiny(run="killed"))
    thread.join()
    assert killed
    assert_same_weights(result.run_dir, uninterrupted.run_dir)
    assert losses(result.run_dir) == losses(uninterrupted.run_dir)
    assert result.val_bpb == uninterrupted.val_bpb


def test_two_workers_learn_what_one_does(uninterrupted, tiny):
    """Same rows, same losses; and what two began, one can finish."""
    two = pretrain.run(tiny(run="two", workers=2))
    of_one, of_two = losses(uninterrupted.run_dir), losses(two.run_dir)
    assert max(abs(of_one[step] - of_two[step]) for step in range(1, 21)) < 1e-3
    assert abs(uninterrupted.val_bpb - two.val_bpb) < 1e-3
    storage.remove(two.checkpoint)
    assert len(list(Path(checkpoint.latest_checkpoint(two.run_dir)).glob("optimizer_*.safetensors"))) == 2
    again = pretrain.run(tiny(run="two", workers=1))
    assert abs(losses(again.run_dir)[20] - of_one[20]) < 1e-3


def test_ctrl_c_saves_and_the_same_command_goes_on(uninterrupted, tiny, nanochat_ray_home):
    options = {k: v for k, v in asdict(tiny(run="stopped")).items() if v is not None}
    flags = [str(part) for k, v in options.items() for part in (f"--{k.replace('_', '-')}", v)]
    command = [sys.executable, "-m", "nanochat_ray.cli", "pretrain", *flags]
    address = ray.get_runtime_context().gcs_address  # a job of this session's Ray
    environment = os.environ | {"RAY_ADDRESS": address, "WANDB_MODE": "disabled"}
    run_dir = str(nanochat_ray_home / "runs" / "stopped")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while max(losses(run_dir), default=0) < 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "stopping after this step" in out
    stopped_at = checkpoint.read_meta(checkpoint.latest_checkpoint(run_dir))["step"]
    assert 2 <= stopped_at < 20
    assert f"stopped at step {stopped_at}" in err
    result = pretrain.run(tiny(run="stopped"))
    assert_same_weights(result.run_dir, uninterrupted.run_dir)


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
