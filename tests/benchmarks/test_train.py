from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks.train import PARTS, Options, run, shares


@pytest.mark.slow
def test_the_training_benchmark_measures_the_real_loop(ray_session):
    result = run(Options(depth=1, seq=64, vocab=512, device_batch=2, steps=3, warmup=1, compile=False))
    assert result["tokens_per_step"] == 2 * 64
    assert result["tok_per_sec"] == pytest.approx(2 * 64 / result["step_seconds"])
    assert 0 < result["mfu"] < 1
    assert result["peak_rss_mb"] > 100
    assert set(result["shares"]) == set(PARTS)
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert min(result["shares"][part] for part in ("matmul", "loss", "optimizer", "data")) > 0


def event(name, device=DeviceType.CPU, parent=None, device_time=0.0, annotation=False):
    return SimpleNamespace(
        name=name,
        device_type=device,
        cpu_parent=parent,
        self_device_time_total=device_time,
        self_cpu_time_total=1.0,
        is_user_annotation=annotation,
    )


def test_a_kernels_time_counts_once():
    """A profile of a GPU has operators, the kernels that they launched, and spans of record_function on both sides."""
    step, gpu = event("Optimizer.step#MuonAdamW.step"), DeviceType.CUDA
    events = [
        step,
        event("aten::mm", device_time=60.0),
        event("aten::mm", parent=step, device_time=30.0),
        event("sm90_gemm", gpu, device_time=60.0),
        event("sm90_gemm", gpu, device_time=30.0),
        event("Optimizer.step#MuonAdamW.step", gpu, device_time=30.0, annotation=True),
        event("memset", gpu, device_time=10.0),
    ]
    found = shares(SimpleNamespace(events=lambda: events), on_gpu=True)
    assert {part: share for part, share in found.items() if share} == {"matmul": 0.6, "optimizer": 0.3, "other": 0.1}
