"""What RL needs of the engine: the probabilities that tokens were drawn with, and other weights between answers."""

import shutil
from dataclasses import replace

import pytest
import torch

from nanochat_ray.inference import model_runner
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import Controls, SamplingParams, drawn_logprobs

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="the attention needs a C++ compiler")


@pytest.mark.parametrize(
    "params", [SamplingParams(12), SamplingParams(12, 1.3, top_k=7), SamplingParams(12, top_p=0.8)]
)
def test_each_token_has_the_log_probability_that_a_full_forward_draws_it_with(lively, random_prompts, params):
    engine = Engine(lively, max_batch_size=3, chunk=16)  # also while others read a part of their prompts
    prompts, told = random_prompts(40, 5, 33, 90), replace(params, n=2, for_training=True)
    for i, completion in enumerate(engine.generate(prompts, told)):
        prompt = prompts[i // 2]
        ids = torch.tensor([*prompt, *completion.tokens])
        with torch.no_grad():
            logits = lively(ids[None, :-1])[0, len(prompt) - 1 :]
        expected = drawn_logprobs(logits, ids[len(prompt) :], Controls([params] * len(logits), 300))
        assert completion.drawn_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert engine.generate(prompts, replace(told, for_training=False))[0].drawn_logprobs is None


def test_probabilities_are_those_of_the_tokens_that_sample_draws():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    controls = Controls([SamplingParams(temperature=0.5, top_k=2)], 4)
    given = [drawn_logprobs(logits, torch.tensor([token]), controls).exp().item() for token in range(4)]
    first = torch.tensor(2.0).sigmoid().item()  # logits 4 and 2 after the temperature
    assert given == pytest.approx([first, 1 - first, 0, 0])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_refreshed_weights_are_those_of_a_new_engine(lively, random_prompts, compiled, monkeypatch):
    model, prompts, params = lively, random_prompts(70, 70), SamplingParams(10, temperature=0.0)
    prompts[1] = prompts[0]  # the second finds the first's blocks
    before, engine = {name: p.clone() for name, p in model.named_parameters()}, Engine(model, max_batch_size=1)
    in_torch = model_runner._attend
    if compiled:
        engine.compile_attention()
        monkeypatch.setattr(model_runner, "_attend", None)  # attention in plain torch would fail
    old = engine.generate(prompts, params)
    assert engine.counts["cached_tokens"] > 0
    try:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        engine.submit(prompts[0], params)
        with pytest.raises(RuntimeError, match="only when all of them have ended"):
            engine.refresh_weights(model)
        while engine.busy:
            engine.step()
        engine.refresh_weights(model)
        assert engine.manager.used_pages == 0 and len(engine.manager.free) == engine.manager.num_pages
        new = engine.generate(prompts, params)
        monkeypatch.setattr(model_runner, "_attend", in_torch)
        assert new == Engine(model, max_batch_size=1).generate(prompts, params) != old
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
