import pytest

from nanochat_ray.train.plan import PlanOptions, run


def test_the_time_of_a_known_run_is_predicted(capsys):
    """Depth 24 on 8 H100 took 10,949 s of pure training for 4.330784e19 FLOPs."""
    prediction = run(PlanOptions(target_flops=4.330784e19))
    assert prediction.seconds == pytest.approx(10_949, rel=0.01)
    assert prediction.dollars == pytest.approx(10_949 / 3600 * 8 * 3, rel=0.01)
    shown = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer shard", "activations", "logits", "steps", "1,536", "10,9"):
        assert part in shown.replace("1536", "1,536"), part
    assert sum(prediction.memory.values()) < 80e9


def test_more_gpus_hold_less_of_the_optimizer_each():
    one, eight = (run(PlanOptions(depth=12, gpus=gpus)).memory["optimizer shard"] for gpus in (1, 8))
    assert one == pytest.approx(8 * eight)


def test_an_unknown_gpu_is_named():
    with pytest.raises(ValueError, match="Abacus"):
        run(PlanOptions(gpu="Abacus"))


def test_a_plan_for_this_machines_cpus(capsys):
    shape = {"depth": 4, "head_dim": 64, "window_pattern": "L", "sequence_len": 512, "vocab_size": 8192}
    full = run(PlanOptions(gpus=0, device_batch_size=32, dtype="bfloat16", **shape))
    shown = capsys.readouterr().out
    assert "this machine's CPUs" in shown and "32 rows" in shown and "cost" not in shown
    assert 2.2e9 < sum(full.memory.values()) < 3.4e9  # benchmarks/train.py measured 2.8e9
    wider = run(PlanOptions(gpus=0, device_batch_size=32, dtype="bfloat16", **shape | {"vocab_size": 65536}))
    assert wider.memory["activations"] == full.memory["activations"]
    assert wider.memory["logits"] - full.memory["logits"] < 0.5e9
