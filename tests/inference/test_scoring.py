"""Scores of a prompt's own tokens, penalties and biases, salted prefixes, and logits that are not numbers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT

SCORE = SamplingParams(0, prompt_logprobs=3)


@torch.no_grad()
def scores(model: GPT, prompt: list[int]) -> torch.Tensor:
    """(T - 1, V): the log probabilities after each token but the last, from one forward without a cache."""
    return model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)


def check(model: GPT, prompt: list[int], noted: list, most: int) -> None:
    assert noted[0] is None
    assert len(noted) == len(prompt)
    if len(prompt) == 1:
        return
    expected = scores(model, prompt)
    own = expected.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
    assert [value for value, _ in noted[1:]] == pytest.approx(own.tolist(), abs=2e-3)
    for (_, likeliest), row in zip(noted[1:], expected, strict=True):
        assert len(likeliest) == most
        assert [value for _, value in likeliest] == pytest.approx(row.topk(most).values.tolist(), abs=2e-3)


@pytest.mark.parametrize("options", [{}, {"chunk": 33}, {"max_batch_size": 2, "chunk": 200}], ids=str)
def test_a_prompts_scores_are_those_of_a_full_forward(lively, random_prompts, options):
    """Of prompts that are read in parts, together, beside others that decode, and a second time."""
    engine = Engine(lively, None, **options)
    prompts = random_prompts(1, 2, 40, 33, 300, 64)
    [beside] = engine.submit(prompts[2], SamplingParams(90, temperature=0))
    for _ in range(2):
        sequences = [engine.submit(prompt, SCORE)[0] for prompt in prompts]
        while any(s.finish_reason is None for s in sequences):
            engine.step()
        for sequence, prompt in zip(sequences, prompts, strict=True):
            check(lively, prompt, sequence.completion().prompt_logprobs, 3)
            assert (sequence.tokens, sequence.finish_reason, sequence.cached_tokens) == ([], "length", 0)
    while engine.busy:
        engine.step()
    assert engine.counts["generated_tokens"] == beside.generated == 90
    assert engine.manager.used_pages == 0


def test_scores_and_an_answer_of_several_samples(lively, random_prompts):
    """The first sample scores the prompt, and the others find it in the cache."""
    [prompt] = random_prompts(70)
    params = SamplingParams(5, n=3, prompt_logprobs=0, logprobs=1)
    engine = Engine(lively, None, chunk=50)
    sequences = engine.submit(prompt, params)
    while engine.busy:
        engine.step()
    check(lively, prompt, sequences[0].prompt_logprobs, 0)
    assert [s.cached_tokens for s in sequences] == [0, 64, 64]
    assert [s.prompt_logprobs for s in sequences[1:]] == [None, None]
    assert [len(s.logprobs) for s in sequences] == [5, 5, 5]
    plain = Engine(lively, None).generate([prompt], SamplingParams(5, n=3))
    assert [s.tokens for s in sequences] == [c.tokens for c in plain]


def test_scores_survive_preemption(lively, random_prompts):
    prompts = random_prompts(150, 90, 140)
    engine = Engine(lively, None, 4, chunk=40)
    sequences = [engine.submit(prompt, SamplingParams(20, prompt_logprobs=1))[0] for prompt in prompts]
    while engine.busy:
        engine.step()
        if engine.scheduler.preemptions < 12:
            engine.scheduler.preempt()
    assert {s.generated for s in sequences} == {20}
    for sequence, prompt in zip(sequences, prompts, strict=True):
        check(lively, prompt, sequence.prompt_logprobs, 1)


def test_penalties_and_biases_are_openais(lively, random_prompts):
    """Against the formula step by step: what was said counts, the prompt does not."""
    [prompt] = random_prompts(30)
    params = SamplingParams(
        25, temperature=0, presence_penalty=2, frequency_penalty=1.5, logit_bias=((7, -100), (11, 6.5), (7, 3), (3, 4))
    )
    [completion] = Engine(lively, None).generate([prompt], params)
    said = []
    for token in completion.tokens:
        with torch.no_grad():
            logits = lively(torch.tensor([prompt + said]))[0, -1]
        logits[[11, 7, 3]] += torch.tensor([6.5, 3, 4])
        for other in set(said):
            logits[other] -= 2 + 1.5 * said.count(other)
        assert logits[token] == pytest.approx(logits.max().item(), abs=1e-3)
        said.append(token)
    engine = Engine(lively, None)
    ban = tuple((token, -100) for token in range(300))
    assert engine.generate([prompt], SamplingParams(9, logit_bias=ban, seed=4))[0].tokens == (
        engine.generate([prompt], SamplingParams(9, seed=4))[0].tokens  # all alike is none
    )
    only = SamplingParams(9, logit_bias=((42, 100),), temperature=2)
    assert engine.generate([prompt], only)[0].tokens == [42] * 9
    for token in (300, -1):
        with pytest.raises(ValueError, match="logit_bias holds token ids outside 0 … 299"):
            engine.submit(prompt, SamplingParams(1, logit_bias=((token, 1),)))


def test_values_that_mean_off_or_greedy(lively, random_prompts):
    [prompt] = random_prompts(20)
    engine = Engine(lively, None)

    def said(**params) -> list[int]:
        return engine.generate([prompt], SamplingParams(20, **params))[0].tokens

    assert said(top_k=0) == said(top_k=-1) == said(top_k=None) == said()
    assert said(top_p=0, seed=3) == said(top_p=0.0, top_k=9) == said(temperature=0)
    assert SamplingParams(0, prompt_logprobs=0).max_tokens == 0
    for wrong in ({"max_tokens": 0}, {"max_tokens": -1, "prompt_logprobs": 1}, {"top_k": -2}, {"top_p": -0.5}):
        with pytest.raises(ValueError, match=r"must be"):
            SamplingParams(**wrong)
    assert SamplingParams(**vars(SamplingParams(top_k=-1, top_p=0))) == SamplingParams(temperature=0)


def test_a_prefix_is_shared_among_requests_of_one_salt_alone(lively, random_prompts):
    [prompt] = random_prompts(100)
    engine = Engine(lively, None)

    def cached(*salts: str) -> list[int]:
        sequences = [engine.submit(prompt, SamplingParams(3, cache_salt=salt))[0] for salt in salts]
        while engine.busy:
            engine.step()
        assert len({tuple(s.tokens) for s in sequences}) == 1
        return [s.cached_tokens for s in sequences]

    assert cached("") == [0]
    assert cached("", "alice", "bob", "alice") == [96, 0, 0, 96]
    assert cached("bob", "carol", "alice", "") == [96, 0, 96, 96]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_numbers_end_their_own_request_with_an_error(lively, random_prompts, monkeypatch, bad):
    prompts = random_prompts(20, 30, 10)
    engine = Engine(lively, None)
    sequences = [engine.submit(prompt, SamplingParams(12))[0] for prompt in prompts]
    kinds = [{}, {"logprobs": 2}, {"top_k": 5}, {"repetition_penalty": 1.2}, {"temperature": 0}]
    broken = [engine.submit(prompts[0], SamplingParams(12, **kind))[0] for kind in kinds]
    while engine.scheduler.waiting:
        engine.step()
    logits = engine.runner.model.logits

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        out[[row for row, sequence in enumerate(engine.rows) if sequence in broken]] = bad
        return out

    monkeypatch.setattr(engine.runner.model, "logits", failing)
    while engine.busy:
        engine.step()
    assert [s.completion() for s in sequences] == Engine(lively, None).generate(prompts, SamplingParams(12))
    assert {s.finish_reason for s in broken} == {"error"}
    assert all("not a number" in s.error and s.generated and min(s.tokens) >= 0 for s in broken)


def test_the_engine_works_without_asserts():
    """python -O leaves them out, and whatever they do."""
    code = """
import torch
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(64, 40, 1, 1, 1, 32, "L"))
model.init_weights()
tokens = [c.tokens for c in Engine(model, None, 2).generate([[1, 2, 3], [4], [5, 6]], SamplingParams(6))]
"""
    known = {}
    exec(code, known)
    code += "print(__debug__, tokens)"
    said = subprocess.check_output([sys.executable, "-O", "-c", code], text=True, timeout=120)
    assert said == f"False {known['tokens']}\n"


def test_asserts_do_nothing_but_look():
    for package in ("nanochat_ray", "serving", "experiments"):
        for path in (Path(__file__).parents[2] / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Assert):
                    kinds = {type(part) for part in ast.walk(node.test)}
                    assert not kinds & {ast.Call, ast.NamedExpr, ast.Await}, f"{path}:{node.lineno}"
