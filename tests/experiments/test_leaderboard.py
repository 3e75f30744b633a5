"""Who reached a target first, in runs of their own and in those of sweeps."""

import json

import pytest

from benchmarks import verdicts
from experiments.leaderboard import LeaderboardOptions, beside_nanochat, crossing, run, with_scores

PLAN = {"depth": 4, "num_iterations": 4, "total_batch_size": 1000, "scaling_params": 400}


def write_run(folder, seconds_per_step: float, bpbs: list[float], core: float | None = None, **config) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"plan": PLAN, "commit": "abc123", **config}))
    lines = [
        {"step": i, "total_training_time": i * seconds_per_step, "total_training_flops": 1e12 * i, "val/bpb": bpb,
         "train/world_size": 8}
        for i, bpb in enumerate(bpbs, 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if core is not None:
        (folder / "result.json").write_text(json.dumps({"core_metric": core}))


@pytest.fixture
def runs(nanochat_ray_home):
    folder = nanochat_ray_home / "runs"
    write_run(folder / "slow", 900, [3, 2, 1.5, 1.4], cluster="8 × H100")
    write_run(folder / "never", 1, [3, 2.9, 2.8, 2.7], cluster="2 CPUs")
    write_run(folder / "series" / "d4", 90, [3, 1.9, 1.8, 1.7], core=0.3, cluster="2 CPUs")
    (folder / "series" / "sweep.json").write_text("{}")
    (folder / "sft").mkdir()
    (folder / "sft" / "config.json").write_text("{}")


def test_by_bpb_the_moment_counts_at_which_it_was_reached(runs, capsys):
    lines = run(LeaderboardOptions(bpb=2.0))
    assert [(line["run"], line["step"], line["value"]) for line in lines] == [
        ("series/d4", "2", "1.7000"),
        ("slow", "2", "1.4000"),
    ]
    assert lines[0]["seconds"] == pytest.approx(90 * 2 ** (1 / 1.1))  # between 3 at 90 s and 1.9 at 180 s
    assert lines[1]["seconds"] == 1800
    assert (lines[0]["cost"], lines[1]["cost"]) == ("–", "$12.00")
    assert (lines[1]["cluster"], lines[1]["commit"], lines[1]["ratio"]) == ("8 × H100", "abc123", "10")
    assert "2 runs with val/bpb ≤ 2" in capsys.readouterr().out


@pytest.mark.parametrize("measurements", [5, 20, 100])
@pytest.mark.parametrize("sd", [0.0005, 0.004])
def test_neither_noise_nor_how_often_a_run_measures_moves_its_time(measurements, sd):
    """Curves that reach the target at time 1."""
    mean, _ = verdicts.times_to_target(200, measurements, sd)
    assert mean == pytest.approx(1, abs=0.02)


def test_a_run_that_does_not_end_at_the_target_has_no_time():
    lines = [{"step": i, "total_training_time": i, "total_training_flops": i, "val/bpb": v} for i, v in
             enumerate([3.0, 1.9, 1.9, 2.1])]  # fmt: skip
    assert crossing(lines, 2.0) is None
    reached = crossing([*lines, lines[1] | {"step": 4, "total_training_time": 4}], 2.0)
    assert reached["total_training_time"] > 1 / 1.1  # where a line from 3 to 1.9 crosses: some of that was luck


def test_a_broken_run_is_left_out_with_a_line(runs, nanochat_ray_home, capsys):
    folder = nanochat_ray_home / "runs"
    (folder / "slow" / "config.json").write_text('{"plan": ')
    (folder / "never" / "metrics.jsonl").write_text('{"step": 1, "val/bpb": 1.0}\n')
    assert [line["run"] for line in run(LeaderboardOptions(bpb=2.0))] == ["series/d4"]
    said = capsys.readouterr().out
    assert (
        "slow is left out: JSONDecodeError: " in said and "never is left out: KeyError: 'total_training_time'" in said
    )


def test_by_core_the_end_counts(runs):
    (line,) = run(LeaderboardOptions())
    assert (line["run"], line["value"], line["seconds"]) == ("series/d4", "0.3000", 360)
    with pytest.raises(ValueError, match="one target"):
        run(LeaderboardOptions(core=0.2, bpb=1))


def test_a_score_of_the_end_is_shown_beside_nanochats(runs, nanochat_ray_home):
    lines = with_scores(str(nanochat_ray_home / "runs" / "series" / "d4"), [{"step": 1, "total_training_time": 90.0}])
    assert lines[-1] == {"step": 1, "total_training_time": 90.0, "core_metric": 0.3}
    mine, theirs = beside_nanochat("d4", {"cluster": "2 CPUs"}, lines)
    assert (mine["reached"], mine["seconds"], theirs["reached"], theirs["seconds"]) == (True, 90.0, True, 10_949)
    assert not beside_nanochat("d4", {}, [lines[-1] | {"core_metric": 0.1}])[0]["reached"]
    assert beside_nanochat("d4", {}, lines[:1]) == []
