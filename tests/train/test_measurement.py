"""CORE and ChatCORE during training: the numbers are those of the checkpoints, and training is as without."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import assert_same_weights, steps

from benchmarks.eval import make_bundle
from nanochat_ray import measuring
from nanochat_ray.data.conversations import Conversations, prepare_conversations
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals import chat, core
from nanochat_ray.evals.tasks import arithmetic
from nanochat_ray.train import pretrain, sft
from nanochat_ray.train.checkpoint import load_model
from nanochat_ray.train.loop import Measurement
from nanochat_ray.train.metrics import read_metrics

pytestmark = pytest.mark.slow


def measured(run_dir: str, name: str) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(run_dir) if name in line}


def test_core_during_pretraining(uninterrupted, tiny, tmp_path, capsys):
    bundle = make_bundle(str(tmp_path))
    measurement = core.in_training(core.CoreInTraining(core_every=8, core_max_per_task=6, bundle=bundle))
    result = pretrain.run(tiny(run="core"), measurement)
    lines = measured(result.run_dir, "core_metric")
    assert list(lines) == [8, 16, 20]
    model, tokenizer, _ = load_model(result.checkpoint, "cpu", "float32")
    expected = core.evaluate_core(model, tokenizer, bundle, 6).metrics()
    assert len(expected) == 4
    assert {name: lines[20][name] for name in expected} == pytest.approx(expected)
    assert f"pretrain: step 20: core_metric {expected['core_metric']:.4f}" in capsys.readouterr().out
    assert_same_weights(result.run_dir, uninterrupted.run_dir)
    timed = sum(line["train/dt"] for line in steps(result.run_dir) if line["step"] > 10)
    assert lines[20]["total_training_time"] == pytest.approx(timed)


def test_a_measurement_that_fails_costs_nothing_and_the_same_command_makes_up_for_it(uninterrupted, tiny, capsys):
    def fails(model, tokenizer):
        raise OSError("core.yaml is gone")

    def works(model, tokenizer):
        return {"core_metric": 0.5}

    measuring.failed.clear()
    result = pretrain.run(tiny(run="measured"), Measurement(10, fails, "CORE"))
    assert measuring.failed == [f"CORE of step {step} failed: OSError: core.yaml is gone" for step in (10, 20)]
    assert capsys.readouterr().out.count("warning: CORE of step") == 2
    assert result.step == 20 and result.val_bpb == uninterrupted.val_bpb
    assert_same_weights(result.run_dir, uninterrupted.run_dir)
    measuring.failed.clear()
    assert pretrain.run(tiny(run="measured"), Measurement(10, works, "CORE")) == result
    assert list(measured(result.run_dir, "core_metric")) == [20] and not measuring.failed
    assert pretrain.run(tiny(run="measured"), Measurement(10, fails, "CORE")) == result
    assert "nothing to do" in capsys.readouterr().out and not measuring.failed


@pytest.fixture
def hub(tmp_path) -> str:
    """Eight questions of ARC-Easy and two of GSM8K in the Hub's layout."""
    choices = {"text": ["a cat", "a dog"], "label": ["A", "B"]}
    science = [{"question": f"What is {i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(8)]
    problems = [
        {"question": f"{i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in (1, 2)
    ]
    for name, config, rows in (("allenai/ai2_arc", "ARC-Easy", science), ("openai/gsm8k", "main", problems)):
        (tmp_path / name / config).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / config / "test.parquet")
        files = f"  data_files:\n  - split: test\n    path: {config}/test.parquet\n"
        (tmp_path / name / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")
    return str(tmp_path)


def test_chatcore_during_finetuning_by_two_workers(uninterrupted, hub, nanochat_ray_home):
    wanted = chat.ChatCoreInTraining(chatcore_every=2, chatcore_tasks=["ARC-Easy", "GSM8K"])
    conversations = {split: Conversations(arithmetic.conversations(split, 40)) for split in ("train", "val")}
    rows = prepare_conversations(conversations, Tokenizer.load(uninterrupted.checkpoint), 64)
    options = sft.SftOptions(
        uninterrupted.checkpoint, run="tuned", steps=3, workers=2, eval_tokens=512, dtype="float32", compile=False
    )
    result = sft.run(options, rows, chat.in_training(wanted, hub))
    assert result.step == 3
    lines = measured(result.run_dir, "chatcore_metric")
    assert list(lines) == [2, 3]
    model, tokenizer, _ = load_model(result.checkpoint, "cpu", "float32")
    problems = chat.load_problems(wanted.chatcore_tasks, wanted.chatcore_max_problems, hub)
    expected = chat.evaluate_chat(model, tokenizer, problems).metrics()
    assert set(expected) == {"chatcore_metric", "chatcore/ARC-Easy", "chatcore/GSM8K"}
    assert {name: lines[3][name] for name in expected} == pytest.approx(expected)


def test_what_is_missing_is_known_before_the_training(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"core\.yaml is missing"):
        core.in_training(core.CoreInTraining(core_every=1, bundle=str(tmp_path / "none")))
    with pytest.raises(OSError, match="MMLU: cais/mmlu is not in"):
        chat.in_training(chat.ChatCoreInTraining(chatcore_every=1, chatcore_tasks=["MMLU"]), hub)
    assert core.in_training(core.CoreInTraining(bundle="none")) is None
    assert chat.in_training(chat.ChatCoreInTraining(), "none") is None
