import pytest

from benchmarks.train import PARTS, Options, run


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
