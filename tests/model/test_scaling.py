import json

import pytest

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import lr_multiplier, muon_momentum, muon_weight_decay, plan_run


def table(golden):
    return json.loads((golden / "scaling.json").read_text())


def test_every_row_of_the_depth_table(golden):
    for row in table(golden):
        plan = plan_run(row["depth"], target_param_data_ratio=row["target_param_data_ratio"])
        mine = {name: getattr(plan, name) for name in row if hasattr(plan, name)}
        mine |= {"window_sizes": plan.config.window_sizes, "lr_batch_scale": plan.lr_scale}
        compared = set(row) - {"group_lrs", "decode_flops_1024", "prefill_flops_1024"}
        for name in compared:
            expected = pytest.approx(row[name], rel=1e-9) if isinstance(row[name], float) else row[name]
            assert mine[name] == expected, (row["depth"], name)


@pytest.mark.parametrize("index", [0, 1])
def test_group_rates_of_the_depth_table(golden, index):
    row = table(golden)[index]
    plan = plan_run(row["depth"], target_param_data_ratio=row["target_param_data_ratio"])
    optimizer = build_optimizer(GPT(plan.config), **plan.lrs, weight_decay=plan.weight_decay)
    assert len(optimizer.param_groups) == len(row["group_lrs"])
    for group, expected in zip(optimizer.param_groups, row["group_lrs"], strict=True):
        assert (group["kind"], len(group["params"])) == (expected["kind"], expected["n"])
        assert list(group["params"][0].shape) == expected["shape"]
        assert group["lr"] == group["initial_lr"] == pytest.approx(expected["lr"], rel=1e-9)


def test_the_horizon_is_steps_then_flops_then_ratio():
    by_ratio = plan_run(4)
    by_flops = plan_run(4, target_flops=1e16)
    assert by_flops.num_iterations == round(1e16 / (by_flops.flops_per_token * by_flops.total_batch_size))
    assert plan_run(4, target_flops=1e16, num_iterations=7).num_iterations == 7
    assert by_flops.total_batch_size == by_ratio.total_batch_size
    assert by_flops.weight_decay == by_ratio.weight_decay
    with pytest.raises(ValueError, match="0 steps"):
        plan_run(4, target_flops=1.0)
    with pytest.raises(ValueError, match="depth"):
        plan_run(0)


def test_schedules_at_their_corners():
    n = 1000  # the warmdown begins at 350
    assert [lr_multiplier(t, n) for t in (0, 39, 40, 350)] == [1 / 40, 1, 1, 1]
    assert lr_multiplier(675, n) == pytest.approx(0.5 + 0.05 * 0.5)
    assert lr_multiplier(n, n) == pytest.approx(0.05)
    assert muon_momentum(0, n) == 0.85
    assert muon_momentum(399, n) == pytest.approx(0.85 + 0.12 * 399 / 400)  # the warmup wins over the warmdown
    assert muon_momentum(675, n) == pytest.approx(0.97 - 0.07 * 0.5)
    assert muon_momentum(n, n) == pytest.approx(0.90)
    assert muon_weight_decay(0, n, 0.2) == 0.2
    assert muon_weight_decay(500, n, 0.2) == pytest.approx(0.1)


def test_value_embeddings_and_windows_at_odd_depth():
    config = GPTConfig(sequence_len=512, n_layer=5, window_pattern="SSSL")
    assert [config.has_value_embedding(i) for i in range(5)] == [True, False, True, False, True]
    assert config.window_sizes == [128, 128, 128, 512, 512]
