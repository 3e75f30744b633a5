"""Versions of the code as they go to the cluster, and a run with one that is not this one."""

import io
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from experiments import compare

REPOSITORY = Path(__file__).resolve().parents[2]


def names(code: bytes) -> set[str]:
    return set(zipfile.ZipFile(io.BytesIO(code)).namelist())


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git repository with a package of one file, a commit, and a change on top."""
    folder = tmp_path / "checkout"
    (folder / "nanochat_ray" / "train" / "__pycache__").mkdir(parents=True)
    (folder / "nanochat_ray" / "train" / "pretrain.py").write_text("speed = 1\n")
    (folder / "nanochat_ray" / "train" / "__pycache__" / "pretrain.pyc").write_text("")
    (folder / "pyproject.toml").write_text("")
    (folder / "notes.txt").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / "nanochat_ray" / "train" / "pretrain.py").write_text("speed = 2\n")
    return folder


def test_a_folder_is_taken_with_its_changes(checkout):
    code, commit = compare.archive(str(checkout))
    assert names(code) == {"code/nanochat_ray/train/pretrain.py", "code/pyproject.toml"}
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


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the folder of a checkout"):
        compare.archive(str(tmp_path))
