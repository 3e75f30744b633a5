import json
import math
import shutil
import time

import numpy as np
import pytest
import torch

from nanochat_ray import storage
from nanochat_ray.data.mixture import Part
from nanochat_ray.train.metrics import MetricsLog, bits_per_byte, gpu_peak_flops, mixed_bpb, peak_flops, read_metrics


class Uniform(torch.nn.Module):
    """Every token costs ln 4 nats."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(1, 4)

    def forward(self, idx, targets, loss_reduction):
        assert loss_reduction == "none"
        return torch.full(targets.shape, math.log(4)).masked_fill(targets == -1, 0)


def test_bits_per_byte_leaves_out_specials_and_ignored_targets():
    token_bytes = np.array([1, 3, 0, 2], dtype=np.int32)  # token 2 stands for no bytes
    targets = torch.tensor([[0, 1, 2, -1], [3, 3, -1, 2]])
    batches = [(torch.zeros_like(t), t) for t in targets.split(1)]
    assert bits_per_byte(Uniform(), batches, token_bytes) == pytest.approx(4 * 2 / (1 + 3 + 2 + 2))
    assert math.isnan(bits_per_byte(Uniform(), [], token_bytes))


def test_the_whole_is_the_mean_of_the_sources_by_their_weights():
    measured = mixed_bpb({Part("web", "", 3): 1.0, Part("own", "", 1): 2.0})
    assert measured == {"val/bpb": 1.25, "val/bpb/web": 1.0, "val/bpb/own": 2.0}
    assert mixed_bpb({Part("web", "", 1): 1.5}) == {"val/bpb": 1.5}


def test_all_batches_of_an_evaluation_have_one_shape(monkeypatch):
    """Each other shape would be compiled. What fills the last one up counts for nothing."""
    shapes, forward = set(), Uniform.forward
    monkeypatch.setattr(
        Uniform, "forward", lambda self, idx, *a, **k: shapes.add(idx.shape) or forward(self, idx, *a, **k)
    )
    targets = torch.tensor([[0, 1], [3, 3], [1, 1]])
    batches = [(torch.zeros_like(t), t) for t in targets.split(2)]
    assert bits_per_byte(Uniform(), batches, np.array([1, 3, 0, 2])) == pytest.approx(6 * 2 / (1 + 3 + 2 + 2 + 3 + 3))
    assert shapes == {(2, 2)}


def test_the_longest_matching_gpu_name_counts():
    assert gpu_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_peak_flops("NVIDIA L4") == 121e12 and gpu_peak_flops("NVIDIA L40S") == 362e12
    assert gpu_peak_flops("h200") == 989e12 and gpu_peak_flops("NVIDIA GB200") == 2.5e15
    for unknown in ("TPU v9", "NVIDIA L40"):
        with pytest.raises(ValueError, match=unknown):
            gpu_peak_flops(unknown)


def test_mfu_of_fp32_is_against_the_peak_of_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    assert peak_flops(torch.device("cuda"), torch.float32) == 67e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
    assert math.isnan(peak_flops(torch.device("cuda"), torch.float32))


def test_a_resumed_log_drops_the_lines_of_lost_steps_and_a_torn_one(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a .netrc either: W&B runs offline
    run_dir = str(tmp_path / "run")
    log = MetricsLog(run_dir, {"depth": 2}, step=0)
    for step in range(1, 6):
        log.log({"step": step, "train/loss": 1 / step})
    log.close()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "tra')
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4, 5]
    log = MetricsLog(run_dir, {"depth": 2}, step=3)
    log.log({"step": 4, "train/loss": 9.0})
    log.close()
    assert [line["train/loss"] for line in read_metrics(run_dir)][-2:] == [1 / 3, 9.0]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_wandb_without_a_network_is_one_warning_and_files_to_sync(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in (("API_KEY", "0" * 40), ("BASE_URL", "http://127.0.0.1:9"), ("INIT_TIMEOUT", "2")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    said, began = [], time.monotonic()
    log = MetricsLog(str(tmp_path / "run"), {"depth": 2}, step=0, say=said.append)
    log.log({"step": 1, "train/loss": 2.0})
    log.close()
    assert time.monotonic() - began < 30
    assert len(said) == 1 and said[0].startswith("warning: W&B does not answer; logging to files")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(read_metrics(str(tmp_path / "run"))) == 1


def test_wandb_that_fails_in_mid_run_is_one_warning_and_a_resumed_run_has_our_steps_as_its_axis(tmp_path, monkeypatch):
    """W&B drops what is logged with a step below one that it has."""
    import wandb

    class Run:
        def __init__(self):
            self.axes, self.logged = {}, []

        def define_metric(self, name, step_metric=None):
            self.axes[name] = step_metric

        def log(self, metrics, **more):
            if metrics["step"] == 3:
                raise BrokenPipeError("the service is gone")
            self.logged.append((metrics["step"], more))

    run, said = Run(), []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    log = MetricsLog(str(tmp_path), {}, step=0, say=said.append)
    for step in (1, 2, 1, 3, 4):
        log.log({"step": step})
    log.close()
    assert run.axes == {"step": None, "*": "step"} and run.logged == [(1, {}), (2, {}), (1, {})]
    assert said == ["warning: W&B failed: BrokenPipeError: the service is gone; the run continues without it"]


def test_numbers_that_json_has_no_words_for_are_null(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = MetricsLog(str(tmp_path), {}, step=0)
    log.log({"step": 1, "train/mfu": math.nan, "val/bpb": math.inf, "train/loss": 2.0})
    log.close()
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "train/mfu": null, "val/bpb": null, "train/loss": 2.0}\n'
    storage.write_json(str(tmp_path / "meta.json"), {"a": [math.nan, (1.5, -math.inf)], "b": {"c": 1}})
    assert json.loads((tmp_path / "meta.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, [1.5, None]],
        "b": {"c": 1},
    }


def test_a_log_whose_folder_is_deleted_or_that_a_crash_tore_keeps_its_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run_dir = tmp_path / "run"
    log = MetricsLog(str(run_dir), {}, step=0)
    log.log({"step": 1})
    shutil.rmtree(run_dir)
    log.log({"step": 2})
    log.close()
    assert [line["step"] for line in read_metrics(str(run_dir))] == [1, 2]
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "tr\xff\n{"step": 3}\n7\n{"step": 4')
    assert [line["step"] for line in read_metrics(str(run_dir))] == [1, 3]
