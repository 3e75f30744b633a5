"""The gpu preset's whole job on CPUs, from nothing to the report, against a Hub that is played and fails at times."""

import io
import json
import os
import pydoc_data.topics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import preflight
from nanochat_ray.data.sources import CLIMBMIX
from nanochat_ray.evals import bundle, chat
from nanochat_ray.evals.tasks import MixtureOptions, gsm8k, hub_mixture, humaneval
from nanochat_ray.train.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
TALKS = {
    ("HuggingFaceTB/smol-smoltalk", "default", split): [
        hub.talk(f"Say {i}, {split}", f"{i} it is. " * 60) for i in range(200)
    ]
    for split in ("train", "test")
}
CHOICES = {"choices": ["a dog", "a stone"], "gold": 0}
TASKS = {  # kind, shots, examples
    "barks": ("multiple_choice", 2, [{"query": f"What barks at {i}?"} | CHOICES for i in range(20)]),
    "goes_on": ("language_modeling", 0, [{"context": f"{i} and", "continuation": "one more"} for i in range(20)]),
}


@pytest.fixture
def played(tmp_path):
    """A Hub with ClimbMix, the datasets of the mixture and of ChatCORE, and CORE's bundle."""
    folder = tmp_path / "hub"
    hub.write_hub(folder, hub.ROWS | TALKS)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    for i, part in ((0, texts[::2]), (6542, texts[1::2])):
        file = folder / CLIMBMIX / f"shard_{i:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": part}), file)
    (folder / "eval_bundle.zip").write_bytes(zipped_bundle())
    with hub.serving(folder) as server:
        yield server


def zipped_bundle() -> bytes:
    entries = [
        {"label": name, "dataset_uri": f"{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        for name, (kind, shots, _) in TASKS.items()
    ]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("eval_bundle/core.yaml", json.dumps({"icl_tasks": entries}))  # JSON is YAML
        file.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\nbarks,50\ngoes_on,0\n")
        for name, (_, _, examples) in TASKS.items():
            file.writestr(f"eval_bundle/eval_data/{name}.jsonl", "".join(json.dumps(e) + "\n" for e in examples))
    return archive.getvalue()


def speedrun(played, tmp_path, *options: str) -> tuple[int, str]:
    """Exit code and all that was said so far."""
    command = [sys.executable, str(Path(__file__).with_name("rehearsal.py")), "--preset=gpu", "--use-gpu=False"]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": played.url, "HF_HOME": str(tmp_path / "hf"), "WANDB_MODE": "disabled"}
    env |= {"PYTHONPATH": str(REPOSITORY)}
    with open(tmp_path / "log", "a+") as log:
        done = subprocess.run([*command, *options], env=env, stdout=log, stderr=subprocess.STDOUT, timeout=500)
        log.seek(0)
        return done.returncode, log.read()


@pytest.mark.cluster
def test_the_whole_job_from_nothing_to_the_report(played, tmp_path, nanochat_ray_home):
    played.faults |= {
        "shard_00000.parquet": [None, 429, 503, "cut"],  # None: the preflight's
        "shard_06542.parquet": [503],
        "default/train-00000-of-00001.parquet": [None, 429, None, "cut"],
        "auxiliary_train/train-00000-of-00001.parquet": [503, None, None, "cut"],
        "gsm8k/resolve/main/README.md": [429, 503],
        "eval_bundle.zip": [None, 503, "cut"],
    }
    who = tmp_path / "identity.jsonl"
    who.write_text(json.dumps([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]) + "\n")
    options = ["--depth=2", "--rehearse", "--run=rehearsal", f"--identity={who}"]
    began = time.monotonic()
    code, said = speedrun(played, tmp_path, *options)
    print(f"{said}\n{time.monotonic() - began:.0f} s, faults: {played.injected}")
    assert code == 0
    assert not [fault for faults in played.faults.values() for fault in faults]  # all of them happened

    run = nanochat_ray_home / "runs" / "rehearsal"
    stages = {stage["stage"]: stage["result"] for stage in json.loads((run / "stages.json").read_text())}
    data = ["source", "tokenizer", "rows", "sft data", "rl data", "eval data"]
    assert list(stages) == [*data, "pretrain", "core", "sft", "chatcore", "rl", "chatcore after rl", "chat"]
    assert set(stages["core"]) == {"core_metric", "core/barks", "core/goes_on"}
    assert len(stages["chatcore"]) == 1 + 5
    for name in ("rehearsal", "rehearsal-sft"):
        assert read_metrics(str(run.parent / name))[-1]["step"] == 20
    page = (run / "report.html").read_text()
    for expected in ("CORE", "ChatCORE", "nanochat, d24, ratio 12", "not reached", "of 100 right in spelling"):
        assert expected in page, expected
    assert "epochs" in said  # 20 steps of few rows

    before = len(played.requests)
    code, said = speedrun(played, tmp_path, *options)
    assert code == 0, said[-3000:]
    assert len(played.requests) == before  # nothing is left to be downloaded, or to be looked at


@pytest.fixture
def here(played, monkeypatch, tmp_path, nanochat_ray_home):
    """The played Hub is the Hub of this process."""
    import datasets
    from huggingface_hub import constants

    for offline in (datasets.config, constants):  # another test may have imported them as if without a network
        monkeypatch.setattr(offline, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", played.url)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", played.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", played.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", played.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(bundle, "URL", f"{played.url}/eval_bundle.zip")
    return played


def parquet_files(server) -> set[str]:
    paths = {path for method, path in server.requests if method == "GET" and path.endswith(".parquet")}
    return {path.partition("/datasets/")[2].replace(hub.COMMIT, "main") for path in paths}


def test_the_preflight_looks_at_what_later_stages_download(here):
    preflight.run(preflight.datasets(preflight.SFT_DATASETS | preflight.CHATCORE_DATASETS, None))
    seen = parquet_files(here)
    here.requests.clear()
    for split in ("train", "val"):
        hub_mixture(split, MixtureOptions(spelling=20))
    chat.load_problems()
    assert parquet_files(here) == seen


def test_the_preflight_names_all_that_cannot_be_had_and_is_patient(here, capsys, monkeypatch):
    here.gated.add("HuggingFaceTB/smol-smoltalk")
    here.faults |= {"ARC-Easy/test-00000-of-00001.parquet": [429, 503], "eval_bundle.zip": [503]}
    for path in (here.folder / "openai" / "openai_humaneval").rglob("*"):
        path.unlink() if path.is_file() else None
    (here.folder / CLIMBMIX / "shard_06542.parquet").unlink()
    checks = {
        "climbmix": lambda: preflight.climbmix(1),
        "CORE bundle": lambda: preflight.core_bundle(None),
        "disk": lambda: preflight.disk({"rows": 1e18}),
        "packages": lambda: preflight.packages(fp8=True, use_gpu=False),
    }
    checks |= preflight.datasets(preflight.SFT_DATASETS | preflight.CHATCORE_DATASETS, None)
    with pytest.raises(ValueError, match=r"5 of 11 checks failed"):
        preflight.run(checks)
    said = capsys.readouterr().out
    failed = {line.split(": ")[0].removeprefix("  FAIL  "): line for line in said.splitlines() if "FAIL" in line}
    assert "shard_06542.parquet" in failed["climbmix"]
    assert "make room, or set NANOCHAT_RAY_HOME" in failed["disk"]
    assert "torchao" in failed["packages"]
    assert "HF_TOKEN" in failed["HuggingFaceTB/smol-smoltalk"]
    assert "openai_humaneval" in failed["openai/openai_humaneval openai_humaneval"]
    assert len(said.splitlines()) == 11 + 1
    monkeypatch.setenv("HF_TOKEN", here.token)
    preflight.run(preflight.datasets({("HuggingFaceTB/smol-smoltalk", None, "train")}, None))


def test_a_connection_that_breaks_off_is_made_again(here):
    here.faults["main/test-00000-of-00001.parquet"] = [None, "cut"]  # None: the HEAD
    assert len(gsm8k.conversations("test")) == 2
    here.faults["openai_humaneval/test-00000-of-00001.parquet"] = [None, *["cut"] * 20]
    with pytest.raises(OSError, match="openai/openai_humaneval openai_humaneval test: "):
        humaneval.conversations()
