"""What is said of results: laws, predictions or why there is none, and verdicts in plain words."""

import functools
import json
import re
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks import verdicts
from experiments import findings, paired, sweep
from experiments.report import write_report
from nanochat_ray.model.scaling import plan_run

DIAL = {"target_param_data_ratio": 12, "sequence_len": 2048, "vocab_size": 32768, "head_dim": 128,
        "window_pattern": "SSSL", "total_batch_size": None}  # fmt: skip


@functools.cache
def planned(depth: int, target_flops: float | None):
    return plan_run(depth, **DIAL | {"target_flops": target_flops})


def result(run: str, depth: int, **more) -> dict:
    plan = planned(depth, more.pop("target_flops", None))
    row = dict.fromkeys(sweep.COLUMNS) | {f"params_{key}": count for key, count in plan.param_counts.items()}
    row |= {"run": run, "depth": depth, "flops": plan.total_flops, "tokens_trained": plan.total_tokens, "mfu": 0.5}
    return row | {"train_time_sec": 10.0, "tok_per_sec": 1e6, "peak_memory_mb": 4e4, "seed": 42, "notes": ""} | more


def write_sweep(folder, about: dict, rows: list[dict]) -> str:
    for row in rows:
        (folder / row["run"]).mkdir(parents=True)
        (folder / row["run"] / "result.json").write_text(json.dumps(row))
        config = {"plan": asdict(plan_run(row["depth"], **DIAL)), "total_batch_size": None}
        (folder / row["run"] / "config.json").write_text(json.dumps(config))
        line = {"step": 1, "total_training_flops": row["flops"], "total_training_time": 1.0, "val/bpb": row["val_bpb"]}
        (folder / row["run"] / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "sweep.json").write_text(json.dumps(about))
    sweep.write_results(str(folder), [{"name": row["run"]} for row in rows])
    return str(folder)


def miniseries(folder, core=lambda flops: None, depths=(12, 14, 16, 18, 20)) -> str:
    rows = []
    for depth in depths:
        flops = plan_run(depth, **DIAL).total_flops
        noise = 1 + 1e-3 * (-1) ** depth * (depth % 3 - 1)
        rows.append(result(f"d{depth}", depth, val_bpb=10 * flops**-0.06 * noise, core_metric=core(flops)))
    return write_sweep(folder, {"kind": "miniseries"}, rows)


def test_the_depth_that_reaches_gpt2_is_predicted(tmp_path):
    """CORE made by a law that crosses GPT-2's score at depth 24."""
    at_24 = plan_run(24, **DIAL).total_flops
    noise = iter([1.001, 0.999, 1.0, 1.001, 0.999])
    folder = miniseries(tmp_path, lambda flops: 1 - (1 - findings.GPT2_CORE) * (flops / at_24) ** -0.05 * next(noise))
    (said,) = [s for s in findings.read(folder).sentences if "CORE 0.256525" in s]
    depth, low, high = map(int, re.search(r"predicted at depth (\d+) \[(\d+), (\d+)\]", said).groups())
    assert low <= 24 <= high
    assert abs(depth - 24) <= 1


@pytest.mark.parametrize(
    ("core", "depths", "reason"),
    [
        (lambda flops: None, (12, 14, 16), "0 of them have a CORE score"),
        (lambda flops: 0.1 + 0.01 * np.sin(flops), (12, 14, 16, 18, 20), "CORE does not clearly rise with FLOPs"),
        (lambda flops: 1 - flops**-0.001, (12, 14, 16, 18, 20), "the largest run had"),
    ],
)
def test_or_it_is_said_why_not(core, depths, reason, tmp_path):
    (said,) = [s for s in findings.read(miniseries(tmp_path, core, depths)).sentences if "CORE 0.256525" in s]
    assert "can't be predicted" in said and reason in said


def test_a_depth_that_is_there_needs_no_prediction(tmp_path):
    enough = plan_run(18, **DIAL).total_flops
    folder = miniseries(tmp_path, lambda flops: 0.26 if flops >= enough else 0.2)
    said = [s for s in findings.read(folder).sentences if "is reached at depth 18 (CORE 0.2600)" in s]
    assert "but equal runs differ by 0.01" in said[0]


def test_a_law_says_whether_it_can_be_extrapolated(tmp_path):
    (tmp_path / "few").mkdir()
    few = findings.read(miniseries(tmp_path / "few", depths=(12, 14, 16))).sentences
    assert "assuming no floor" in few[0]
    (tmp_path / "some").mkdir()
    folder = miniseries(tmp_path / "some", depths=(12, 14, 16, 18, 20, 22))
    assert re.match(r"val_bpb = \S+ \[0, \S+\] \+ ", findings.read(folder).sentences[0])


def test_a_run_without_a_number_is_left_out_of_laws(tmp_path):
    rows = [result(f"d{depth}", depth, val_bpb=1 / depth) for depth in (12, 14, 16)]
    rows.append(result("d18", 18, val_bpb=None, notes="diverged: the loss is nan at step 7"))
    found = findings.read(write_sweep(tmp_path, {"kind": "miniseries"}, rows))
    assert "over 3 depths" in found.sentences[0]
    assert found.sentences[-1] == "d18 is left out: diverged: the loss is nan at step 7"
    assert len(found.table) == 4


def test_a_report_of_a_grid_says_which_budgets_are_used(tmp_path):
    """The second budget's best size is beyond its models."""
    rows = [
        result(f"{budget:.3g}-d{depth}", depth, target_flops=budget, val_bpb=1 + 0.05 * (np.log(depth / best) ** 2))
        for budget, best in ((1e18, 11.0), (4e18, 30.0), (1.6e19, 14.0))
        for depth in range(8, 20, 2)
    ]
    folder = write_sweep(tmp_path, {"kind": "scaling_laws", "budgets": [1e18, 4e18, 1.6e19]}, rows)
    said = findings.read(folder).sentences
    edge = "the budget of 4e+18 FLOPs is not used, the lowest loss is at the largest size"
    assert sum(edge in s for s in said) == len(findings.COUNTED)
    assert any("optimal N = " in s for s in said)
    assert not any("cleanest" in s for s in said)
    write_report([folder], str(tmp_path / "report.html"), "Grid")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 6
    assert "4e+18 (not used)" in page
    assert page.count("<details>") == 18


def comparison(changes: dict[int, float], noise=0.0, seeds=(1, 2, 3)) -> list[dict]:
    """By depth, the relative change of the candidate's loss."""
    random = np.random.default_rng(0)
    return [
        result(f"{side}-d{depth}-s{seed}", depth, seed=seed, side=side,
               val_bpb=(1 + 0.01 * seed) * (1 + change * (side == "candidate") + noise * random.normal()))
        for depth, change in changes.items() for seed in seeds for side in ("baseline", "candidate")
    ]  # fmt: skip


def test_verdicts():
    same = paired.verdicts(comparison({12: 0, 16: 0}))
    assert [line.split(" in ")[0] for line in same] == [
        "depth 12: +0.00% [-0.00%, +0.00%]",
        "depth 16: +0.00% [-0.00%, +0.00%]",
        "over all depths: not distinguishable (+0.00% [-0.00%, +0.00%], p 1, 3 seeds)",
    ]
    worse = paired.verdicts(comparison({12: 0.02, 16: 0.02}, noise=0.001))
    assert [re.search(": (.*?) ", line)[1] for line in worse] == ["worse"] * 3
    better = paired.verdicts(comparison({12: -0.02, 16: 0}, noise=0.001))
    assert "depth 12: better (-" in better[0] and "depth 16: not distinguishable" in better[1]
    mixed = paired.verdicts(comparison({12: -0.03, 16: 0.01}, noise=0.001))
    assert "depth 16: worse" in mixed[1] and "over all depths: better on average, worse at a depth (-" in mixed[2]
    assert "one pair: no test" in paired.verdicts(comparison({12: -0.02}, seeds=(1,)))[0]
    assert paired.verdicts(comparison({12: 0})[:1])[0] == "depth 12: no pair of runs is finished"


def test_a_test_that_finds_nothing_says_what_it_would_have_found():
    said = paired.verdicts(comparison({12: 0}, noise=0.003))[-1]
    low, high, least = re.search(r"\[(.*?)%, (.*?)%\].*; (.*?)% would be detected in 80 of 100", said).groups()
    assert float(low) < 0 < float(high) < float(least)


def test_differences_near_rounding_are_none():
    rows = comparison({12: 0})
    for i, row in enumerate(rows):
        row["val_bpb"] *= 1 + (1.2e-6 + 1e-8 * i) * (row["side"] == "candidate")
    assert "not distinguishable" in paired.verdicts(rows)[-1]
    assert paired.p_value([0.01, 0.01]) < 1e-3


def test_a_candidate_that_diverges_is_worse(tmp_path):
    rows = comparison({12: -0.02}, noise=0.001)
    rows[1] |= {"val_bpb": None, "notes": "diverged: the loss is nan at step 7"}
    said = paired.verdicts(rows)[-1]
    assert said.startswith("over all depths: worse, because the candidate diverged at depth 12 seed 1; other runs: ")
    folder = write_sweep(tmp_path, {"kind": "compare", "baseline": "a", "candidate": "b"}, rows)
    assert findings.read(folder).sentences[-1] == ("candidate-d12-s1 is left out: diverged: the loss is nan at step 7")
    rows[0]["val_bpb"] = float("nan")
    assert "worse" not in paired.verdicts(rows)[-1] and "the baseline diverged at depth 12" in paired.verdicts(rows)[-1]


def test_verdicts_of_rl_are_those_of_pass_at_1_which_may_begin_at_0():
    rows = [
        result(f"{side}-s{seed}", 4, seed=seed, side=side, val_bpb=None, **{"pass@1": up * (0.5 + 0.01 * seed)})
        for seed in (1, 2, 3)
        for side, up in (("baseline", 0), ("candidate", 1))
    ]
    assert re.match(r"depth 4: better \(\+0\.520 \[.*\], p .*, 3 seeds\) in pass@1", paired.verdicts(rows)[0])


@pytest.mark.parametrize(("depths", "together"), [(1, 0.0), (3, 0.0), (3, 0.5)])
def test_equal_codes_rarely_get_a_verdict_on_any_line(depths, together):
    """5 % is what is promised; 400 draws scatter by 1.1 %."""
    assert verdicts.share(400, verdicts.any_verdict, effects=[0.0] * depths, seeds=3, together=together) < 0.08


def test_a_small_gain_is_found_by_five_seeds():
    found = verdicts.share(100, lambda said: said[-1] == "better", effects=[-0.002] * 3, seeds=5, sd=0.001)
    assert found > 0.9


def test_a_machine_that_slows_down_favours_no_side():
    assert verdicts.time_differs(400, seeds=5, drift=0.002) < 0.08
    assert verdicts.time_differs(400, seeds=4, drift=0.005) < 0.08


def test_markdown_for_a_pull_request(tmp_path):
    rows = comparison({12: 0.02, 16: 0.02}, noise=0.001)
    text = paired.markdown(rows, "main (abc)", "HEAD (def)")
    assert text.startswith("## HEAD (def) against main (abc)\n\n- **over all depths: worse")
    assert text.count("### Depth") == 2
    table = [line for line in text.splitlines() if line.startswith("| val_bpb")]
    assert len(table) == 2 and all(line.count("|") == 5 and "±" in line and "[+" in line for line in table)
    folder = write_sweep(tmp_path, {"kind": "compare", "baseline": "a", "candidate": "b"}, rows)
    assert findings.read(folder).sentences == paired.verdicts(rows)
