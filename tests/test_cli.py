"""The commands as a user runs them: help that teaches, and one clear line for what can be mended."""

import os
import subprocess
import sys

import forked
import pytest

from nanochat_ray import measuring, session


def nanochat_ray(*args):
    return forked.run("nanochat_ray.cli", *args, environment=dict(os.environ))


def test_help_names_every_stage_and_option():
    shown = nanochat_ray("--help")
    assert shown.returncode == 0
    for stage in ("prepare", "pretrain", "sft", "eval", "chat", "plan", "doctor", "leaderboard", "import", "export"):
        assert f"\n  {stage} " in shown.stdout
    options = nanochat_ray("pretrain", "--help").stdout
    assert "--depth" in options
    assert "The dial" in options


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["pertrain"], "pertrain"),
        (["prepare", "--source", "{tmp}/missing"], "missing"),
        (["prepare", "--source", "{tmp}/bad"], "bad.parquet"),
        (["prepare", "--source=pydocs", "--source=climbmix"], "--source A B"),
        (["pretrain"], "nanochat-ray prepare"),
        (["eval", "core", "--checkpoint", "{tmp}/missing", "--bundle", "{tmp}"], "missing"),
        (["pretrain", "--core-every", "1", "--bundle", "{tmp}/missing"], "core.yaml"),
        (["chat", "--checkpoint", "{tmp}/missing"], "missing"),
        (["plan", "--gpu", "Abacus"], "Abacus"),
        (["rl", "--checkpoint", "{tmp}/missing", "--task", "letters"], "missing"),
        (["export", "--checkpoint", "{tmp}/missing", "{tmp}/out"], "missing"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(args, named, tmp_path, nanochat_ray_home):
    (tmp_path / "bad").mkdir()
    for name in ("bad.parquet", "worse.parquet"):
        (tmp_path / "bad" / name).write_bytes(b"PAR1 no parquet")
    result = nanochat_ray(*[arg.replace("{tmp}", str(tmp_path)) for arg in args])
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ")
    assert named in line
    assert "Traceback" not in result.stderr
    assert not [path for path in nanochat_ray_home.rglob("*") if path.is_file()]


def test_a_measurement_that_failed_is_the_exit_status_of_a_command_that_did_all_else(capsys):
    def command():
        with measuring.measuring("CORE of step 20"):
            raise FileNotFoundError("core.yaml is missing")
        print("checkpoint saved")

    with pytest.raises(
        SystemExit, match=r"^error: everything else is done, but CORE of step 20 failed: .*core\.yaml is missing$"
    ):
        session.one_line_errors(command)()
    warned, done = capsys.readouterr().out.splitlines()
    assert warned.startswith("warning: CORE of step 20 failed: ") and done == "checkpoint saved"
    session.one_line_errors(lambda: None)()


def test_a_long_tmpdir_is_not_where_rays_sockets_are(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/t")
    assert "_temp_dir" not in session.local_ray()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    assert session.local_ray()["_temp_dir"] == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 80)))
    with pytest.raises(ValueError, match="set RAY_TMPDIR to a folder of at most"):
        session.local_ray()


@pytest.mark.slow
def test_a_ray_of_its_own_takes_the_cpus_that_it_may_asks_for_a_token_and_leaves_sigterm_to_its_driver(tmp_path):
    """In a session of its own, with a long TMPDIR, an empty HOME and one CPU, as under a supervisor."""
    script = """
import os, signal, subprocess, sys, time
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
from nanochat_ray import session
import ray
session.connect()
import grpc
gcs = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
try:
    gcs.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=20)
except grpc.RpcError as error:
    print(error.code().name)
try:
    os.killpg(0, signal.SIGTERM)
    time.sleep(5)
except KeyboardInterrupt:
    print("asked to stop", ray.cluster_resources()["CPU"], ray.get(ray.remote(lambda: "alive").remote()))
"""
    temporary = tmp_path / ("x" * 80)
    temporary.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"TMPDIR": str(temporary), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, start_new_session=True, timeout=100
    )
    assert done.stdout == "UNAUTHENTICATED\nasked to stop 1.0 alive\n", done.stderr
    assert not (tmp_path / ".ray").exists()
