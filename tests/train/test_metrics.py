import math

import numpy as np
import pytest
import torch

from nanochat_ray.train.metrics import MetricsLog, bits_per_byte, gpu_peak_flops, read_metrics


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


def test_the_longest_matching_gpu_name_counts():
    assert gpu_peak_flops("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    with pytest.raises(ValueError, match="TPU v9"):
        gpu_peak_flops("TPU v9")


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
