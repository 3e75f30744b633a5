"""lm-eval, which these tests install, agrees with `eval core` on each example of a served checkpoint."""

import json
import os
import subprocess
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import yaml

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals import bundle, core
from nanochat_ray.train.checkpoint import import_nanochat, load_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
LM_EVAL = "lm-eval[api]==0.4.13"
TASKS, EXAMPLES = ("copa", "bigbench_operators"), 60  # two choices an example; one continuation, after 10 shots


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory) -> Path:
    """The command, in an environment that also has the packages of this one."""
    folder = tmp_path_factory.mktemp("lm-eval")
    venv.create(folder, with_pip=True)
    [site_packages] = folder.glob("lib/python*/site-packages")
    (site_packages / "these.pth").write_text(sysconfig.get_path("purelib"))
    began = time.monotonic()
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", LM_EVAL]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=600)
    if "No matching distribution found" in installed.stderr:
        pytest.skip(f"no package index has {LM_EVAL}")
    assert installed.returncode == 0, installed.stderr
    print(f"installed in {time.monotonic() - began:.0f} s")
    return folder / "bin" / "lm-eval"


@pytest.fixture(scope="module")
def checkpoint(shared, tmp_path_factory) -> str:
    """nanochat's reference model of depth 2."""
    source, folder = shared / "golden" / "nanochat_d2" / "nanochat", str(tmp_path_factory.mktemp("d2"))
    import_nanochat(str(source / "base_checkpoints" / "d2"), folder, str(source / "tokenizer"))
    return folder


def split_texts(texts: list[str], tokenizer: Tokenizer, opening: str | None) -> tuple[str, list[str], list[int]]:
    """The text before the choices, the choices, and how many tokens CORE compares of each."""
    ids = [tokenizer.encode(text) for text in texts]
    others = [tokenizer.encode(opening.rstrip())] if opening is not None else []
    shared = next(i for i in range(10_000) if len({tuple(tokens[i : i + 1]) for tokens in [*ids, *others]}) > 1)
    before = tokenizer.decode(ids[0][:shared])
    return before, [text.removeprefix(before) for text in texts], [len(tokens) - shared for tokens in ids]


def write_task(folder: Path, task: bundle.Task, tokenizer: Tokenizer) -> list[list[int]]:
    """Write a task of lm-eval with CORE's prompts. Returns how many tokens CORE compares of each choice."""
    lines, lengths = [], []
    for i, example in enumerate(task.examples):
        shots = [task.examples[j] for j in core.draw_shots(i, len(task.examples), task.shots)]
        before = "".join(shot.texts[shot.gold] + "\n\n" for shot in shots)
        opening = None if example.opening is None else before + example.opening
        context, choices, compared = split_texts([before + text for text in example.texts], tokenizer, opening)
        lines.append(json.dumps({"context": context, "choices": choices, "gold": example.gold, "choice": choices[0]}))
        lengths.append(compared)
    data = folder / f"{task.name}.jsonl"
    data.write_text("\n".join(lines))
    config = {
        "task": f"own_{task.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    if task.kind == "multiple_choice":
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    else:
        config |= {"output_type": "loglikelihood", "doc_to_target": "{{choice}}"}
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(config))
    return lengths


def test_local_completions_decides_as_core_does(lm_eval, checkpoint, shared, deploy, tmp_path):
    model, tokenizer, _ = load_model(checkpoint, "cpu", "float32")
    folder = str(shared / "eval_bundle")
    expected = core.evaluate_core(model, tokenizer, folder, EXAMPLES, list(TASKS)).examples
    lengths = {task.name: write_task(tmp_path, task, tokenizer) for task in bundle.read_tasks(folder, EXAMPLES, TASKS)}
    url = deploy("scored", checkpoint=f"d2={checkpoint}")
    arguments = f"model=d2,base_url={url}/v1/completions,tokenizer_backend=remote,tokenized_requests=False"
    command = [lm_eval, "run", "--model=local-completions", f"--model_args={arguments},num_concurrent=4,max_length=512"]
    command += ["--tasks", ",".join(f"own_{name}" for name in TASKS), f"--include_path={tmp_path}"]
    command += [f"--output_path={tmp_path / 'out'}", "--log_samples"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "none"}
    ran = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    for name in TASKS:
        [written] = (tmp_path / "out").glob(f"**/samples_own_{name}_*.jsonl")
        samples = sorted(map(json.loads, written.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert len(samples) == EXAMPLES
        for sample, decision, compared in zip(samples, expected[name], lengths[name], strict=True):
            scores = [(float(score), str(greedy) == "True") for score, greedy in sample["filtered_resps"]]
            if "pred" not in decision:
                assert scores[0][1] == decision["correct"]
                continue
            losses = [-score / tokens for (score, _), tokens in zip(scores, compared, strict=True)]
            assert losses == pytest.approx(decision["mean_losses"], abs=1e-4)
            assert losses.index(min(losses)) == decision["pred"]
