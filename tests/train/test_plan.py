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
