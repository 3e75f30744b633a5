import math
from inspect import signature

import pytest
import torch

from nanochat_ray.model.scaling import plan_run
from nanochat_ray.train.plan import (
    PlanOptions,
    decode_seconds,
    gpu_bandwidth,
    gpu_memory,
    plan_shards,
    predict_memory,
    predict_rl,
    predict_step,
    rows_that_fit,
    run,
)
from nanochat_ray.train.rl import RlOptions


def test_the_time_of_a_known_run_is_predicted(capsys):
    """Depth 24 on 8 H100 took 10,949 s of pure training for 4.330784e19 FLOPs."""
    prediction = run(PlanOptions(target_flops=4.330784e19))
    assert prediction.seconds == pytest.approx(10_949, rel=0.01)
    assert prediction.dollars == pytest.approx(10_949 / 3600 * 8 * 3, rel=0.01)
    shown = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer shard", "activations", "logits", "steps", "1,536", "10,9"):
        assert part in shown.replace("1536", "1,536"), part
    assert sum(prediction.memory.values()) < 80e9


def test_a_run_of_rl_is_predicted_with_the_defaults_of_its_options(capsys):
    """The times of decoding steps were measured on one H200, in milliseconds."""
    for depth, rows, measured in ((12, 1, 0.429), (12, 32, 0.508), (20, 1, 0.785), (20, 32, 0.946), (20, 256, 1.993)):
        predicted = 1e3 * decode_seconds(plan_run(depth).config, rows, 256, gpu_bandwidth("H200"))
        assert predicted == pytest.approx(measured, rel=0.1)
    ours = {name: p.default for name, p in signature(predict_rl).parameters.items() if p.default is not p.empty}
    assert len(ours) == 6 and ours == {name: getattr(RlOptions(""), name) for name in ours}

    one, many = (run(PlanOptions(gpus=gpus)).rl for gpus in (1, 8))
    assert one.steps == many.steps == 468
    assert 6 < one.learning / many.learning < 8.1 and one.rollouts > many.rollouts and one.measuring > many.measuring
    assert "RL, 468 steps" in capsys.readouterr().out
    assert run(PlanOptions(nodes=4)).rl.learning > many.learning / 2  # 16 questions keep 16 GPUs busy
    for without in (PlanOptions(rl_questions=0), PlanOptions(gpus=0, depth=1), PlanOptions(gpu="H100 PCIe")):
        assert run(without).rl is None


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


def memory_of(depth, workers=1, rows=16, on_cpu=False, dtype=torch.bfloat16, **more):
    return predict_memory(plan_run(depth).config, workers, rows, on_cpu, dtype, **more)


def test_on_a_gpu_the_optimizer_uses_the_memory_of_the_activations_again():
    assert memory_of(24)["optimizer's copies"] == 0
    few = memory_of(24, rows=1)
    copies = 32 * 4 * 24 * 1536**2
    assert few["optimizer's copies"] == copies - few["activations"] - few["logits"] > 0
    assert memory_of(24, on_cpu=True)["optimizer's copies"] == copies


def test_a_gpus_plan_counts_its_context_and_the_matrices_that_blocks_save_in_bf16():
    assert memory_of(12)["process"] == 2**30 and memory_of(12, workers=2)["process"] == 2**31
    saved = memory_of(12)["activations"] - memory_of(12, dtype=torch.float32)["activations"] / 2
    assert saved == 2 * plan_run(12).param_counts["transformer_matrices"]
    assert memory_of(12, recompute=True)["activations"] < 0.5 * memory_of(12)["activations"]


def test_rows_are_halved_until_they_fit():
    """Depth 24 is known to fit an 80 GB card with 16 rows, and depth 26 not to."""
    config = {depth: plan_run(depth).config for depth in (12, 24, 26)}

    def fit(depth, gib, rows=999, **more):
        options = {"on_cpu": False, "dtype": torch.bfloat16, "recompute": False} | more
        return rows_that_fit(config[depth], rows, 1, memory=gib * 2**30, **options)

    assert fit(24, 0.9 * 79) == 16 and fit(26, 0.9 * 79) == 8
    assert fit(26, 0.9 * 79, recompute=True) == fit(26, math.inf) == 16
    assert fit(26, 1) == 1 and fit(12, math.inf, rows=3) == 3
    assert fit(12, math.inf, on_cpu=True) == 2


def test_a_gpu_has_less_memory_than_its_name_says():
    assert gpu_memory("H100") == 79 * 2**30 and gpu_memory("h200") == 139 * 2**30
    assert gpu_memory("A100-80G") == 79 * 2**30 and gpu_memory("A100-40G") == gpu_memory("A100") == 39 * 2**30
    assert gpu_memory("Abacus") == math.inf


def test_nodes_wait_for_the_network(capsys):
    fast = run(PlanOptions(depth=12, nodes=4, gpus=8, network=3200)).steps
    slow = run(PlanOptions(depth=12, nodes=4, gpus=8, network=10)).steps
    assert list(fast) == list(slow) == [1, 2, 4]
    assert fast[1] == slow[1] and slow[4].seconds > 10 * fast[4].seconds
    assert "more than one node hardly pay" in capsys.readouterr().out


def test_what_a_worker_sends_follows_from_the_shards():
    """On 2 ranks nothing of depth 2 is padded: half of all weights there, and half of all gradients."""
    small = plan_run(2, head_dim=64, vocab_size=512, sequence_len=64)

    def sent(workers, dtype=torch.float32, config=small.config):
        return sum(sum(shard.bytes_sent()) for shard in plan_shards(config, workers, dtype))

    assert sent(2) == pytest.approx(4 * small.param_counts["total"], rel=0.01)
    assert sent(1) == 0
    assert sent(64) > 2 * sent(2)  # shards of nothing but padding
    d24 = plan_run(24)
    masters = d24.param_counts["transformer_matrices"] + d24.param_counts["lm_head"]
    tables = d24.param_counts["total"] - masters
    for workers in (8, 16, 32):  # gradients in fp32 and weights in bf16, tables in bf16 both ways
        expected = (6 * masters + 4 * tables) * (workers - 1) / workers
        assert sent(workers, torch.bfloat16, d24.config) == pytest.approx(expected, rel=0.001)


def test_most_of_what_travels_is_hidden():
    """Two nodes of 8 H100s on 400 Gbit/s: 0.13 s on the wire in a step of 0.64 s, of which little is waited for."""
    plan = plan_run(24)
    shards = plan_shards(plan.config, 16, torch.bfloat16)
    step = predict_step(shards, 2, 0.64, 0.004, 1, 400e9, 3e-5)
    assert 8 * step.sent / 400e9 > 0.1 and step.waiting < 0.06
    more = predict_step(shards, 2, 0.64, 0.004, 4, 400e9, 3e-5)  # only the last backward and the first forward hide it
    assert step.waiting < more.waiting < 8 * step.sent / 400e9
    slow = predict_step(shards, 2, 0.64, 0.004, 1, 40e9, 3e-5)
    assert slow.waiting == pytest.approx(8 * slow.sent / 40e9 - 0.64, rel=0.2)
