"""ChatCORE: right answers are found and judged, in batches as one by one, and the mean is as defined."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals import chat
from nanochat_ray.evals.chat import evaluate_chat, load_problems
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.train import checkpoint

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to share among threads, which would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


@pytest.fixture(scope="module")
def problems(hub, offline):
    return load_problems(datasets_dir=hub)


@pytest.fixture(scope="module")
def untrained(tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 2, 64, "SL"))
    model.init_weights()
    for p in model.parameters():  # weights at which every part of the model has a say
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def knowing(tokenizer, problems):
    """A model that has learned the problems' answers by heart."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(128, tokenizer.vocab_size, 2, 2, 2, 64, "L"))
    model.init_weights()
    rendered = [tokenizer.render_conversation(c) for conversations in problems.values() for c in conversations]
    longest = max(len(ids) for ids, _ in rendered)
    idx = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rendered])
    learned = torch.tensor([flags[1:] + [0] * (longest - len(flags)) for _, flags in rendered]) == 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0)
    loss = math.inf
    while loss > 0.02:
        loss = F.cross_entropy(model.logits(model.hidden(idx[:, :-1])[learned]), idx[:, 1:][learned])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_model_that_knows_the_answers_scores_one(knowing, tokenizer, problems, capsys):
    result = evaluate_chat(knowing, tokenizer, problems, SamplingParams(max_tokens=80, temperature=0.0))
    assert result.accuracy == dict.fromkeys(chat.TASKS, 1.0)
    assert result.centered == result.accuracy
    assert result.chatcore_metric == 1
    # The calculator was called and its result put in, not made up.
    (answer,) = (a["answer"] for a in result.answers["GSM8K"] if "600" in a["answer"])
    assert answer.startswith(
        "Ann has 600+634 = <|python_start|>600+634<|python_end|><|output_start|>1234<|output_end|>1234 eggs."
    )
    assert "HumanEval's programs run in a sandbox of " in capsys.readouterr().out


def test_wrong_answers_score_zero_and_the_mean_is_centered(knowing, tokenizer, problems):
    wrong = json.loads(json.dumps(problems))
    for name in ("ARC-Easy", "ARC-Challenge", "MMLU"):
        for conversation in wrong[name]:
            letters, answer = conversation["letters"], conversation["messages"][1]
            answer["content"] = letters[letters.index(answer["content"]) - 1]
    wrong["MMLU"][0] = problems["MMLU"][0]  # one of four is right: as good as guessing
    wrong["GSM8K"][0]["messages"][1]["content"][-1]["text"] += "0"
    wrong["HumanEval"][1]["test"] += "    assert candidate(0) == 1\n"
    result = evaluate_chat(knowing, tokenizer, wrong, SamplingParams(max_tokens=80, temperature=0.0))
    expected = {"ARC-Easy": 0, "ARC-Challenge": 0, "MMLU": 0.25, "GSM8K": 0.5, "HumanEval": 0.5}
    assert result.accuracy == expected
    assert result.centered == pytest.approx(
        {"ARC-Easy": -1 / 3, "ARC-Challenge": -1 / 3, "MMLU": 0, "GSM8K": 0.5, "HumanEval": 0.5}
    )
    assert result.chatcore_metric == pytest.approx((-2 / 3 + 1) / 5)
    assert [a["correct"] for a in result.answers["HumanEval"]] == [True, False]
    assert result.metrics()["chatcore/GSM8K"] == 0.5


def test_letters_in_batches_are_those_one_by_one(untrained, tokenizer, problems):
    conversations = [c for name in ("ARC-Easy", "ARC-Challenge", "MMLU") for c in problems[name]]
    expected = []
    for conversation in conversations:
        ids = tokenizer.render_for_completion({"messages": conversation["messages"][:1]})
        logits = untrained(torch.tensor([ids]))[0, -1]
        letters = conversation["letters"]
        expected.append(max(letters, key=lambda letter: logits[tokenizer.encode(letter)[0]].item()))
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 32):
        assert chat.choose(untrained, tokenizer, conversations, batch_size) == expected


def test_a_question_longer_than_the_models_reach_is_wrong_and_the_rest_goes_on(knowing, tokenizer, problems, capsys):
    some = {}
    for name in ("ARC-Easy", "GSM8K"):
        first, *rest = problems[name]
        question, answer = first["messages"]
        long = first | {"messages": [question | {"content": question["content"] + " and" * 2000}, answer]}
        some[name] = [long, *rest]
    result = evaluate_chat(knowing, tokenizer, some, SamplingParams(max_tokens=64, temperature=0.0))
    shown = capsys.readouterr().out
    for name, conversations in some.items():
        assert result.answers[name][0] == {"correct": False, "answer": None}
        assert all(answer["correct"] for answer in result.answers[name][1:])
        of = f"1 of {len(conversations)} questions longer than the model's reach are counted as wrong"
        assert f"{name}: {of}" in shown


def test_equal_logits_take_the_first_letter(untrained, tokenizer, problems):
    with torch.no_grad():
        head = untrained.lm_head.weight.clone()
        untrained.lm_head.weight.zero_()
        chosen = chat.choose(untrained, tokenizer, problems["ARC-Challenge"], 8)
        untrained.lm_head.weight.copy_(head)
    assert chosen == [c["letters"][0] for c in problems["ARC-Challenge"]]


def test_answers_in_batches_are_those_one_by_one(untrained, tokenizer, problems):
    conversations = problems["GSM8K"] + problems["HumanEval"]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    expected = []
    for conversation in conversations:
        ids = tokenizer.render_for_completion({"messages": conversation["messages"][:1]})
        (completion,) = Engine(untrained, tokenizer).generate([ids], params)
        expected.append(tokenizer.decode(completion.tokens))
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 32):
        assert chat.generate(untrained, tokenizer, conversations, params, batch_size) == expected


RANK = """
import json, sys
import torch, torch.distributed as dist
from nanochat_ray.evals.chat import evaluate_chat
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.train.checkpoint import load_model
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model, tokenizer, _ = load_model(f"{folder}/step_000001")
with open(f"{folder}/problems.json") as f:
    result = evaluate_chat(model, tokenizer, json.load(f), SamplingParams(max_tokens=8, temperature=0.0))
print(json.dumps(result.answers))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def saved(knowing, tokenizer, tmp_path_factory):
    """The knowing model as a checkpoint."""
    return checkpoint.save_checkpoint(str(tmp_path_factory.mktemp("run")), 1, knowing, None, tokenizer, {})


@pytest.mark.slow
def test_ranks_share_the_problems(knowing, tokenizer, problems, saved, tmp_path):
    some = {name: problems[name] for name in ("ARC-Easy", "ARC-Challenge", "GSM8K")}
    some["GSM8K"] = some["GSM8K"][:1]  # fewer than ranks
    (tmp_path / "problems.json").write_text(json.dumps(some))
    (tmp_path / "step_000001").symlink_to(saved)
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    shown = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    expected = evaluate_chat(knowing, tokenizer, some, SamplingParams(max_tokens=8, temperature=0.0))
    assert shown == [expected.answers, expected.answers]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({}, OSError, "ARC-Easy: allenai/ai2_arc.*--datasets-dir.*--tasks"),
        ({"tasks": ["MMLU"], "datasets_dir": "{tmp}"}, OSError, "MMLU: cais/mmlu is not in .*--tasks"),
        ({"tasks": ["GSM8K", "MMMU"]}, ValueError, "no task MMMU; there are ARC-Easy"),
        ({"max_problems": 0}, ValueError, "max_problems 0"),
    ],
)
def test_tasks_that_cannot_be_had_are_named(options, error, named, tmp_path):
    options = {name: str(tmp_path) if value == "{tmp}" else value for name, value in options.items()}
    with pytest.raises(error, match=named):
        load_problems(**options)


def test_max_problems_are_the_first_of_all(hub, problems):
    assert load_problems(["MMLU", "GSM8K"], 1, hub) == {name: problems[name][:1] for name in ("MMLU", "GSM8K")}


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_answers(hub, saved, tmp_path):
    command = [sys.executable, "-m", "nanochat_ray.cli", "eval", "chat", "--checkpoint", saved, "--out", str(tmp_path)]
    options = ["--tasks", "GSM8K", "MMLU", "--max-problems", "3", "--datasets-dir", hub, "--dtype", "float32"]
    shown = subprocess.run(command + options, capture_output=True, text=True, check=True, timeout=120).stdout
    assert [line.split()[:4] for line in shown.splitlines()[:3]] == [
        ["task", "problems", "accuracy", "centered"],
        ["GSM8K", "2", "1.0000", "1.0000"],
        ["MMLU", "3", "1.0000", "1.0000"],
    ]
    assert "ChatCORE" in shown and "the mean of 2 of its 5 tasks" in shown
    assert json.loads((tmp_path / "chatcore.json").read_text())["chatcore_metric"] == 1
    lines = [json.loads(line) for line in (tmp_path / "chatcore_answers.jsonl").read_text().splitlines()]
    assert [(line["task"], line["index"], line["correct"]) for line in lines] == [
        *(("GSM8K", i, True) for i in range(2)),
        *(("MMLU", i, True) for i in range(3)),
    ]


@pytest.mark.slow
def test_without_the_hub_the_commands_end_on_one_line(saved):
    for command, hints in (["eval", "chat"], ["--datasets-dir", "--tasks"]), (["sft"], ["--mixture offline", "--data"]):
        shown = subprocess.run(
            [sys.executable, "-m", "nanochat_ray.cli", *command, "--checkpoint", saved],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert shown.returncode == 1
        (line,) = shown.stderr.splitlines()
        assert line.startswith("error: ")
        assert all(hint in line for hint in hints)
