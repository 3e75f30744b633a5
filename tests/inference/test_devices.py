"""The engine on a CPU and, marked gpu, on a GPU with CUDA graphs and without: tokens are those of a full forward."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import Controls, SamplingParams, sample
from nanochat_ray.model.gpt import GPT, GPTConfig

GREEDY = SamplingParams(max_tokens=40, temperature=0)
LENGTHS = (1, 31, 32, 33, 100, 250)  # of prompts: up to several pages of 32 tokens and beyond the window of 128


@pytest.fixture(params=["eager", *(pytest.param(p, marks=pytest.mark.gpu) for p in ("graphs", "graphs midway"))])
def make_engine(request, device, monkeypatch):
    """Engines without CUDA graphs, with all of them captured first, and with each captured at its size's third step."""
    if device.type == "cpu" and request.param != "eager":
        pytest.skip("a CPU has no CUDA graphs")
    if device.type == "cuda":
        monkeypatch.setattr(
            "nanochat_ray.inference.gpu_runner.EAGER_STEPS", 3 if request.param == "graphs midway" else math.inf
        )

    def make(model, *arguments, **options) -> Engine:
        engine = Engine(model, *arguments, **options)
        if request.param == "graphs":
            engine.compile()
        return engine

    return make


@pytest.fixture(params=[64, 128])
def wide(request, device):
    """Random weights, two query heads of this size to a key head, windows of 128 and 256, two value embeddings."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 300, n_layer=4, n_head=4, n_kv_head=2, n_embd=4 * request.param, window_pattern="SL"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1 if "lambda" in name else 3.2 / model.config.n_embd**0.5)
    return model.to(device)


@torch.no_grad()
def full_forward(model: GPT, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits (T, V) that each token was chosen by, from one forward without a cache."""
    return model(torch.tensor([prompt + tokens], device=model.cos.device))[0, len(prompt) - 1 : -1].cpu()


def test_greedy_equals_nanochats(reference, make_engine, device):
    model, cases = reference
    for size in (1, 4):
        engine = make_engine(model.to(device), max_batch_size=size)
        completions = engine.generate([case["prompt"] for case in cases], GREEDY)
        assert [completion.tokens for completion in completions] == [case["greedy"] for case in cases]


def test_greedy_equals_a_full_forward(wide, random_prompts, make_engine):
    """Alone, and in batches in which some wait until others end."""
    prompts = random_prompts(*LENGTHS)
    for size in (1, 4, 6):
        completions = make_engine(wide, max_batch_size=size).generate(prompts, GREEDY)
        for prompt, completion in zip(prompts, completions, strict=True):
            assert completion.tokens == full_forward(wide, prompt, completion.tokens).argmax(-1).tolist()
    assert len({token for completion in completions for token in completion.tokens}) > 40


def test_samples_equal_those_drawn_from_a_full_forward(wide, random_prompts, make_engine):
    """Past the windows and the model's context. A draw may fall where rounding decides."""
    prompts, params = random_prompts(1, 100, 250), SamplingParams(max_tokens=160, seed=3)
    keys = np.array([(params.seed, 0, step) for step in range(160)], dtype=np.uint64)
    for prompt, completion in zip(prompts, make_engine(wide).generate(prompts, params), strict=True):
        drawn = sample(full_forward(wide, prompt, completion.tokens), Controls([params] * 160, 300), keys)
        assert (drawn == torch.tensor(completion.tokens)).sum() >= 158
        assert len(set(completion.tokens)) > 40


def test_greedy_in_bf16_takes_tokens_that_are_likeliest_but_for_rounding(wide, random_prompts, make_engine):
    """By a full forward in bf16 no other token has a logit that is larger by more than 0.5; logits spread over 30."""
    model = copy.deepcopy(wide).set_compute_dtype(torch.bfloat16)
    prompts = random_prompts(*LENGTHS)
    for prompt, completion in zip(prompts, make_engine(model).generate(prompts, GREEDY), strict=True):
        logits = full_forward(model, prompt, completion.tokens)
        chosen = logits.gather(1, torch.tensor(completion.tokens).unsqueeze(1)).squeeze(1)
        assert (logits.amax(-1) - chosen).max() < 0.5


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(wide, random_prompts, make_engine):
    prompts = random_prompts(70, 5, 60, 140)
    for params in (
        SamplingParams(20, seed=5, n=2),
        SamplingParams(20, seed=5, top_k=50),
        SamplingParams(20, seed=5, top_p=0.9, temperature=1.5),
    ):
        alone = [make_engine(wide, max_batch_size=1).generate([prompt], params) for prompt in prompts]
        together = make_engine(wide, max_batch_size=8).generate(prompts, params)
        assert together == list(itertools.chain(*alone))
        assert len({tuple(completion.tokens) for completion in together}) == len(together)
        other = SamplingParams(20, params.temperature, params.top_k, params.top_p, seed=6)
        assert make_engine(wide).generate(prompts[:1], other)[0] not in together


def test_prompts_read_in_parts_beside_sequences_that_decode(wide, random_prompts, make_engine):
    """Most steps decode some rows and read a part of a prompt; some prompts begin alike and find their pages."""
    prompts = random_prompts(*LENGTHS)
    prompts += [prompts[-1][:160] + prompts[-2]]
    engine = make_engine(wide, max_batch_size=3, chunk=40)
    completions = engine.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.tokens == full_forward(wide, prompt, completion.tokens).argmax(-1).tolist()
    assert engine.counts["cached_tokens"] > 0
