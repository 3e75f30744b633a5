"""Versions of the code as they go to the cluster, and a run with one that is not this one."""

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments import compare

REPOSITORY = Path(__file__).resolve().parents[2]


def names(code: bytes) -> set[str]:
    return set(zipfile.ZipFile(io.BytesIO(code)).namelist())


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git repository with a package of one module, a commit, and a change on top."""
    folder = tmp_path / "checkout"
    (folder / "nanochat_ray" / "train" / "__pycache__").mkdir(parents=True)
    (folder / "nanochat_ray" / "train" / "pretrain.py").write_text("speed = 1\n")
    (folder / "nanochat_ray" / "train" / "__pycache__" / "pretrain.pyc").write_text("")
    for empty in ("nanochat_ray/__init__.py", "nanochat_ray/train/__init__.py", "pyproject.toml"):
        (folder / empty).write_text("")
    (folder / "notes.txt").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "nanochat_ray" / "train" / "pretrain.py").write_text("speed = 2\n")
    return folder


def test_a_folder_is_taken_with_its_changes(checkout):
    code, commit = compare.archive(str(checkout))
    package = {f"code/nanochat_ray/{name}" for name in ("__init__.py", "train/__init__.py", "train/pretrain.py")}
    assert names(code) == {*package, "code/pyproject.toml"}
    assert zipfile.ZipFile(io.BytesIO(code)).read("code/nanochat_ray/train/pretrain.py") == b"speed = 2\n"
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", commit)
    assert compare.archive(str(checkout)) == (code, commit)


def test_a_revision_is_taken_as_it_was_committed(checkout, monkeypatch):
    monkeypatch.setattr(compare, "__file__", str(checkout / "experiments" / "compare.py"))
    code, commit = compare.archive("HEAD")
    assert zipfile.ZipFile(io.BytesIO(code)).read("code/nanochat_ray/train/pretrain.py") == b"speed = 1\n"
    assert re.fullmatch(r"[0-9a-f]{12}", commit)
    with pytest.raises(ValueError, match="'nowhere' is no folder, and no revision"):
        compare.archive("nowhere")


RUN = """
import sys, ray
from experiments import compare

with compare.ray_started_elsewhere():
    print(ray.get(compare._pretrain_there(f"file://{sys.argv[1]}").remote({"depth": 3})))
"""
FAKE = """
from types import SimpleNamespace

PretrainOptions = dict

def run(options):
    return SimpleNamespace(checkpoint=f"{__name__} of another version was given {options}")
"""


@pytest.mark.slow
def test_a_version_is_what_runs(checkout, tmp_path):
    """A folder whose pretraining only says what it was given."""
    (checkout / "nanochat_ray" / "train" / "pretrain.py").write_text(FAKE)
    (tmp_path / "code.zip").write_bytes(compare.archive(str(checkout))[0])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "code.zip")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "nanochat_ray.train.pretrain of another version was given {'depth': 3}" in done.stdout, done.stderr


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the folder of a checkout"):
        compare.archive(str(tmp_path))
