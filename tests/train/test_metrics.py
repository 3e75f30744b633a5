import math

import numpy as np
import pytest
import torch

from nanochat_ray.train.metrics import MetricsLog, bits_per_byte, gpu_peak_flops, peak_flops, read_metrics


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
