"""The engine's bookkeeping under random use, with a model whose answer depends on every token it can find in its pages.

In place of keys and values a page holds, of each token, a number made of it and all before it. The next token is a
function of the last such number, so that a page that is not the sequence's own changes what is said.
"""

import random

import numpy as np
import pytest
import torch

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.kv_cache import NULL_PAGE, PAGE, page_bytes
from nanochat_ray.inference.model_runner import ModelRunner
from nanochat_ray.inference.sampling import SamplingParams, draw
from nanochat_ray.model.gpt import GPT, GPTConfig

V = 50
CONFIG = GPTConfig(60, V, n_layer=3, n_head=1, n_kv_head=1, n_embd=24, window_pattern="SL")  # windows of 128 and 60


def mix(before, token):
    """Works on Python's numbers and on arrays alike."""
    return (before * 1103515245 + token * 12345 + 7) % 2147483647


class CheckedRunner(ModelRunner):
    """The tables are the real ones; the forward is made of numbers that can be checked."""

    def __init__(self, model: GPT, manager, max_rows: int):
        super().__init__(model, manager, max_rows)
        self.windows = [manager.windows[group] for group, _ in self.groups]
        self.stored = np.zeros((CONFIG.n_layer, manager.num_pages + 1, PAGE), dtype=np.int64)
        self.tokens = np.zeros_like(self.stored)
        self.said: list[int] = []

    def run(self, rows, prompts):
        """As a GPU does: it knows the last tokens of its own step before the engine does."""
        ahead = [s for s in rows if s.in_flight]
        for s in ahead:
            s.ids.append(self.said[s.slot] if s.last_token is None else s.last_token)
            s.in_flight -= 1
        logits, drawn = super().run(rows, prompts)
        for s in ahead:
            s.ids.pop()
            s.in_flight += 1
        self.said = drawn.tolist()
        return logits, drawn

    def _forward(self, idx, step, *draws):
        said, begin = [], 0
        for row, last in enumerate(step.last.tolist()):
            span, begin = slice(begin, last + 1), last + 1
            inputs = [x[0, span].numpy() for x in (idx, step.previous, step.at)]
            pages = [step.pages[group][place, row].numpy() for group, place in self.groups]
            offsets = [step.first[group][row].item() * PAGE for group, _ in self.groups]
            if (pages[0] == NULL_PAGE).all():  # padding
                said.append(0)
                continue
            tokens = {self._store(i, pages[i], offsets[i], *inputs) for i in range(CONFIG.n_layer)}
            assert len(tokens) == 1
            said += tokens
        logits = torch.nn.functional.one_hot(torch.tensor(said), V).float()
        return logits, draw(logits, *draws), None  # no hidden states

    def _store(self, layer, pages, offset, tokens, before, positions) -> int:
        """Note the tokens in a layer's pages and check all that they see; the next token."""

        def at(position: int) -> tuple:
            page = pages[(position - offset) // PAGE]
            assert page != NULL_PAGE
            return layer, page, position % PAGE

        start = int(positions[0])
        assert (positions == np.arange(start, start + len(tokens))).all()
        number = self.stored[at(start - 1)] if start else 0
        for i, (token, last) in enumerate(zip(tokens, before, strict=True)):
            assert start + i == 0 or self.tokens[at(start + i - 1)] == last
            number = mix(number, token)
            self.stored[at(start + i)], self.tokens[at(start + i)] = number, token
        seen = [at(position) for position in range(max(0, start - self.windows[layer]), start + len(tokens))]
        seen = tuple(np.array(seen).T)
        numbers = self.stored[seen]
        assert (mix(numbers[:-1], self.tokens[seen][1:]) == numbers[1:]).all()
        return int(number % V)


def answer(prompt: list[int], length: int) -> list[int]:
    number, said = 0, []
    for token in prompt:
        number = mix(number, token)
    for _ in range(length):
        said.append(number % V)
        number = mix(number, said[-1])
    return said


@pytest.fixture(scope="module")
def model():
    model = GPT(CONFIG)
    model.init_weights()
    return model


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize(("chunk", "pages"), [(None, 25), (None, 40), (1, 25), (7, 25), (50, 40), (512, 25)])
def test_each_answer_is_made_of_its_own_pages(model, chunk, pages, runs_ahead):
    choose = random.Random(pages)
    engine = Engine(model, None, 6, kv_bytes=pages * page_bytes(CONFIG, 4), chunk=chunk)
    engine.runner = CheckedRunner(model, engine.manager, 6)
    engine.runner.runs_ahead = runs_ahead
    texts = [[choose.randrange(V) for _ in range(300)] for _ in range(3)]
    sequences, most = [], 0
    for _ in range(600):
        if len(engine.scheduler.waiting) < 4 and choose.random() < 0.2:
            length = choose.choice([1, 32, 33, 64, choose.randrange(1, 200)])
            prompt = [*choose.choice(texts)[: length - 1], choose.randrange(3)]
            if len(prompt) < engine.manager.capacity:
                params = SamplingParams(choose.choice([1, 5, 40, 150]), temperature=0, n=choose.choice([1, 1, 2]))
                sequences += engine.submit(prompt, params)
        if sequences and choose.random() < 0.03:
            engine.cancel(choose.choice(sequences[-12:]))
        engine.step()
        most = max(most, len(engine.scheduler.running))
    while engine.busy:
        engine.step()
    assert engine.manager.used_pages == 0
    assert len(sequences) > 10
    assert most > 1
    assert engine.scheduler.preemptions > 0 or chunk in (None, 1)  # with None the clock decides, with 1 few run at once
    assert sum(sequence.cached_tokens > 0 for sequence in sequences) > 1
    for sequence in sequences:
        prompt = sequence.ids[: sequence.prompt_len]
        assert sequence.tokens == answer(prompt, sequence.generated)
        assert sequence.finish_reason in ("length", "cancelled")
        assert sequence.finish_reason == "cancelled" or sequence.generated == sequence.max_tokens
    assert sum(sequence.finish_reason == "length" for sequence in sequences) > len(sequences) / 2
