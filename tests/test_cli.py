"""The commands as a user runs them: help that teaches, and one clear line for what can be mended."""

import subprocess
import sys

import pytest


def nanochat_ray(*args):
    command = [sys.executable, "-m", "nanochat_ray.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_names_every_stage_and_option():
    shown = nanochat_ray("--help")
    assert shown.returncode == 0
    for stage in ("prepare", "pretrain", "sft", "eval", "chat", "plan", "doctor", "leaderboard", "import"):
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
        (["pretrain"], "nanochat-ray prepare"),
        (["eval", "core", "--checkpoint", "{tmp}/missing", "--bundle", "{tmp}"], "missing"),
        (["pretrain", "--core-every", "1", "--bundle", "{tmp}/missing"], "core.yaml"),
        (["chat", "--checkpoint", "{tmp}/missing"], "missing"),
        (["plan", "--gpu", "Abacus"], "Abacus"),
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
