"""The checks of a GPU, with tiny sizes on a CPU: what they do, and that one which fails costs the others nothing."""

import json
import subprocess
import sys
import time

import psutil
import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.gpu import Options, measure, result_table, run
from benchmarks.gpu_checks import CHECKS, Check, Target, function_of

INFERENCE = {"without_graphs", "with_graphs", "ms_per_token", "bandwidth_share"}
FIGURES = {
    "machine": {"bf16_tflops", "copy_gb_per_s", "fp8_tflops"},
    "golden": {"passed", "failed", "skipped", "failures"},
    "train_d12": {"tokens_per_s", "mfu", "optimizer_share", "attention"},
    "train_d24": {"tokens_per_s", "mfu", "optimizer_share"},
    "fp8_d24": {"bf16", "fp8", "speed_over_bf16", "loss_difference"},
    "decode_d12": INFERENCE,
    "decode_d20": INFERENCE,
    "prefill": {"seconds_to_first_token", "mfu", "least_mfu_from_2048"},
    "speedrun": {"killed_after_step", "as_if_nothing_happened", "answers", "steps"},
    "service": {"engine_tokens_per_s", "over_engine", "least_over_engine", "failed"},
    "rl": {"asking_over_engine", "step_seconds", "learning_seconds"},
    "core": {"examples", "examples_per_s"},
}
JOBS = ("speedrun", "service")  # have a Ray of their own
SAME = ("train_d24", "decode_d20")  # differ from others in depth alone, which is the same when tiny


def check_lines(lines: list[dict], out) -> dict[str, dict]:
    """The lines are in the file as they were returned, have no errors and all their figures; returns the figures."""
    assert [json.loads(line) for line in out.read_text().splitlines()] == json.loads(json.dumps(lines))
    for line in lines:
        assert line["error"] is None, line
        assert FIGURES[line["name"]] <= line["figures"].keys()
        assert line["torch"] and line["commit"] and line["date"] and line["gpu"] is None
    return {line["name"]: line["figures"] for line in lines}


@pytest.mark.slow
def test_a_check_without_ray_reports_its_figures_from_a_process_of_its_own(tmp_path):
    options = Options(only=("core",), out=str(tmp_path / "gpu.jsonl"), tiny=True)
    figures = check_lines(run(options), tmp_path / "gpu.jsonl")
    assert figures["core"]["examples"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("check", [c for c in CHECKS if c.name not in (*JOBS, *SAME, "core")], ids=lambda c: c.name)
def test_every_other_check_without_ray_reports_its_figures(check):
    figures = {}
    with torch.compiler.set_stance("force_eager"):  # as in the process of a tiny check
        function_of(check)(lambda **more: figures.update(more), True, **check.arguments)
    assert FIGURES[check.name] <= figures.keys()
    if check.name == "golden":
        assert figures["failed"] == 0 < figures["passed"]
    if check.name == "train_d12":
        assert set(figures["attention"]) == {"blocks", "sdpa"}
        assert figures["optimizer_share"] > 0
    if check.name == "fp8_d24":
        assert figures["loss_difference"] < 0.01


@pytest.mark.cluster
def test_a_speedrun_that_loses_a_worker_and_the_service(tmp_path):
    options = Options(only=JOBS, out=str(tmp_path / "gpu.jsonl"), tiny=True)
    figures = check_lines(run(options), tmp_path / "gpu.jsonl")
    assert 0 < figures["speedrun"]["killed_after_step"] <= figures["speedrun"]["steps"]
    assert figures["speedrun"]["as_if_nothing_happened"] == 1 and figures["speedrun"]["answers"] > 0
    assert figures["service"]["failed"] == 0 < figures["service"]["least_over_engine"]


REPORT = """import subprocess, sys, time
file = sys.argv[4]
open(file, "w").write('{"a": 1}\\n{"a": 2, "b": 3}\\n{"c')
"""
CRASH = "raise ValueError('no such kernel')"
HANG = "print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid); time.sleep(600)"


@pytest.mark.parametrize(("end", "error"), [(CRASH, "ValueError: no such kernel"), (HANG, "stopped after 4 s")])
def test_a_check_that_ends_badly_keeps_its_figures_and_leaves_nothing_running(tmp_path, monkeypatch, end, error):
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-uc", REPORT + end, *command[1:]], **options)

    monkeypatch.setattr(gpu, "commit", str)  # it starts a process, too
    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    line = measure(Check("bad", "", "", 1), 4, Options(out=str(tmp_path / "gpu.jsonl"), tiny=True))
    assert line["figures"] == {"a": 2, "b": 3}
    assert line["error"] == error
    if end is HANG:
        assert not runs(int((tmp_path / "logs" / "bad.log").read_text()))


def runs(pid: int) -> bool:
    """Whether a process is alive; one that was killed a moment ago may not have ended yet."""
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.1)
    return True


def test_checks_that_do_not_fit_into_the_minutes_are_not_run(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu, "measure", lambda check, limit, options: ran.append((check.name, limit)) or LINE)
    options = Options(only=("machine", "speedrun", "core"), minutes=0.5, out=str(tmp_path / "gpu.jsonl"), tiny=True)
    run(options)
    assert [name for name, _ in ran] == ["machine", "core"] and all(limit <= 30 for _, limit in ran)
    assert "speedrun: not run" in capsys.readouterr().out


LINE = {"name": "machine", "figures": {}, "seconds": 1.0, "error": None}


def test_all_checks_fit_into_two_calls_of_six_minutes():
    seconds = [check.seconds for check in CHECKS]
    assert min(max(sum(seconds[:i]), sum(seconds[i:])) for i in range(len(seconds))) <= 360


def test_each_check_has_figures_here():
    assert {check.name for check in CHECKS} == FIGURES.keys()


def test_targets_and_names(tmp_path):
    share = Target("share", least=0.9, most=1.1)
    assert [share.holds(value) for value in (0.89, 0.9, 1.1, 1.11)] == [False, True, True, False]
    assert str(share) == ">= 0.9 and <= 1.1"
    with pytest.raises(ValueError, match="no check 'train_d99'; there are machine, golden"):
        run(Options(only=("train_d99",), tiny=True))


@pytest.mark.parametrize(("mfu", "holds"), [(0.6, "yes"), (0.4, "NO"), (None, "–")])
def test_the_table_says_which_targets_hold(mfu, holds):
    figures = {"optimizer_share": 0.05} | ({"mfu": mfu} if mfu else {})
    table = result_table([LINE | {"name": "train_d12", "figures": figures}], Options(only=("train_d12", "golden")))
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["golden", "train_d12", "train_d12"] and columns[1][0] == "not run"
    assert columns[4][1:] == [holds, "yes"]


def test_each_check_names_a_function():
    for check in CHECKS:
        assert callable(gpu_checks.function_of(check)), check.name
