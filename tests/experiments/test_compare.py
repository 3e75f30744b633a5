"""Versions of the code as they go to the cluster, a run with one that is not this one, and data of its own."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from experiments import compare, sweep
from nanochat_ray import storage
from nanochat_ray.data import sources
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.train import checkpoint
from nanochat_ray.train.pretrain import PretrainOptions

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
    with pytest.raises(ValueError, match="'nowhere' is neither a folder nor a revision"):
        compare.archive("nowhere")


RUN = """
import sys, ray
from experiments import compare

with compare.ray_started_elsewhere():
    print(ray.get(compare._train_there(f"file://{sys.argv[1]}").remote({"depth": 3}, None)))
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


def test_options_of_the_stage_are_by_name():
    o = compare.with_options(compare.RlTrial(checkpoint="a", task="b"), ["staleness=1", "advantage_by_std=True"])
    assert (o.checkpoint, o.task, o.staleness, o.advantage_by_std) == ("a", "b", 1, True)
    with pytest.raises(ValueError, match="'staleness' is not NAME=VALUE"):
        compare.with_options(o, ["staleness"])
    with pytest.raises(ValueError, match="'seed=3': --both and --change can't set run, seed, depth, rows"):
        compare.with_options(o, ["seed=3"])


@pytest.mark.parametrize("given", [{"change": ["task=counting"]}, {"change": ["checkpoint=c"]}, {"data": ["text"]}])
def test_sides_of_rl_do_not_differ_in_what_they_are_judged_by(given):
    options = compare.CompareOptions(stage="rl", both=["checkpoint=b", "task=letters"], **given)
    with pytest.raises(ValueError, match="one checkpoint and one task for both sides, and no --data"):
        compare.reinforcement(options)


@pytest.mark.cluster
def test_a_change_of_rl_is_judged_by_held_out_questions(golden, nanochat_ray_home):
    """By a model that knows no answer."""
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(256, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.init_weights()
    start = checkpoint.save_checkpoint(str(nanochat_ray_home / "start"), 1, model, None, tokenizer, {})
    of_both = [f"checkpoint={start}", "task=letters", "steps=2", "prompts_per_step=2", "max_new_tokens=4"]
    versions = ["--baseline", REPOSITORY, "--candidate", REPOSITORY, "--seeds", "7", "--name", "rl"]
    options = ["--both", *of_both, "num_samples=4", "eval_questions=4", "eval_samples=2", "--change", "num_samples=2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", "--stage", "rl", *versions, *options],
        cwd=REPOSITORY,
        env=os.environ | {"WANDB_MODE": "disabled", "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "over all depths: +0.000, one pair: no test in pass@1; reward +0.000" in done.stdout
    assert "num_samples=2 against" in (nanochat_ray_home / "runs" / "rl" / "compare.md").read_text()
    runs = [storage.read_json(str(path)) for path in sorted(nanochat_ray_home.glob("runs/rl/*-s*/result.json"))]
    assert [(run["side"], run["seed"], run["answers"]) for run in runs] == [("baseline", 7, 16), ("candidate", 7, 8)]


@pytest.mark.slow
def test_a_trial_is_scored_outside_of_its_placement_group(rows, ray_session, golden, tmp_path):
    """Tune places what a trial starts in the trial's group, which has no CPU."""
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    trained = checkpoint.save_checkpoint(str(tmp_path / "start"), 1, model, None, tokenizer, {})
    group = ray.util.placement_group([sweep.HEAD])
    captures = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    score = ray.remote(num_cpus=0, resources=sweep.HEAD, scheduling_strategy=captures)(compare.score)
    options = PretrainOptions(eval_tokens=1024, use_gpu=False)
    assert 1 < ray.get(score.remote(trained, rows, options)) < 20
    ray.util.remove_placement_group(group)


def write_texts(folder: Path, splits: dict[str, list[str]]) -> sources.Source:
    for split, texts in splits.items():
        (folder / split).mkdir(parents=True)
        (folder / split / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sources.resolve(str(folder))


def test_data_must_not_have_what_it_is_scored_on(tmp_path):
    """A filtered copy that holds out other documents is refused; with the same val/ beside it, it is taken."""
    texts = [f"document {i} of the baseline" for i in range(100)]
    baseline = write_texts(tmp_path / "all", {"train": texts[10:], "val": texts[:10]})
    filtered = write_texts(tmp_path / "filtered", {"train": texts[10:60], "val": texts[:10]})
    unsplit = write_texts(tmp_path / "unsplit", {".": [*texts[10:60], " document 3 of the baseline\n", *texts[4:6]]})
    compare.check_held_out([baseline], [baseline, filtered])
    with pytest.raises(ValueError, match="unsplit has 3 of the 10 documents that both sides are scored on"):
        compare.check_held_out([baseline], [unsplit])
