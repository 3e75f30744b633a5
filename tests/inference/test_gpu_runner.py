"""The GPU's forwards, on a GPU or in Triton's interpreter: in fp32, as the interpreter's bf16 matmuls are wrong."""

import copy

import pytest
import torch

from nanochat_ray.inference import engine as engine_module
from nanochat_ray.inference import grammar
from nanochat_ray.inference.engine import GPU_MAX_PREFILL_TOKENS, Engine
from nanochat_ray.inference.kv_cache import page_bytes
from nanochat_ray.inference.model_runner import ModelRunner
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig


@pytest.fixture(autouse=True)
def gpu_runner(monkeypatch, kernel_device):
    """Engines run the GPU's forwards."""
    from nanochat_ray.inference.gpu_runner import GPURunner

    monkeypatch.setattr(engine_module, "runner_of", lambda model: GPURunner)


@pytest.fixture
def small(kernel_device):
    """Random weights, grouped heads, windows of 128 and 160, value embeddings. Small: one program takes a ms here."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(160, 300, n_layer=2, n_head=2, n_kv_head=1, n_embd=48, window_pattern="SL"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.to(kernel_device)


def test_greedy_equals_nanochats(reference, kernel_device):
    model, cases = reference
    model.to(kernel_device)
    prompts = [case["prompt"] for case in cases[:3]]
    completions = Engine(model, None, 3, chunk=30).generate(prompts, SamplingParams(max_tokens=5, temperature=0))
    assert [c.tokens for c in completions] == [case["greedy"][:5] for case in cases[:3]]


def test_logits_are_those_of_a_full_forward(small, random_prompts):
    """Prompts of one token, of a page, and of more than a window."""
    engine = Engine(small, None, 4)
    for prompt in random_prompts(1, 32, 170):
        [sequence] = engine.submit(prompt, SamplingParams(3, temperature=0, logprobs=3))
        while engine.busy:
            engine.step()
        with torch.no_grad():
            logits = small(torch.tensor([prompt + sequence.tokens], device=small.cos.device))[
                0, len(prompt) - 1 : -1
            ].cpu()
        assert sequence.tokens == logits.argmax(-1).tolist()
        own = [logprob for logprob, _ in sequence.logprobs]
        torch.testing.assert_close(torch.tensor(own), logits.log_softmax(-1).amax(-1), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_answers_are_the_cpus_whoever_comes_and_goes(small, random_prompts, monkeypatch):
    """With so few pages that sequences are preempted."""
    kinds = [{"temperature": 0}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.1}]
    kinds += [{"repetition_penalty": 1.3}, {"temperature": 1.4}]
    prompts = random_prompts(30, 3, 31, 9, 28, 1, 17)
    asked = [(p, SamplingParams(8 + i, seed=i, **kind)) for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))]
    engine, sequences = Engine(small, None, 3, kv_bytes=5 * page_bytes(small.config, 4), chunk=20), []
    for prompt, params in asked:
        sequences += engine.submit(prompt, params)
        [bystander] = engine.submit(prompt[:3], SamplingParams(30))
        engine.step()
        engine.cancel(bystander)
    while engine.busy:
        engine.step()
    assert engine.manager.used_pages == 0
    assert engine.scheduler.preemptions > 0
    small.to("cpu")
    monkeypatch.setattr(engine_module, "runner_of", lambda model: ModelRunner)
    for sequence, (prompt, params) in zip(sequences, asked, strict=True):
        [expected] = Engine(small, None, 1).generate([prompt], params)
        assert sequence.tokens == expected.tokens, params


def test_a_step_is_launched_before_the_last_ones_tokens_are_known(small, random_prompts):
    engine = Engine(small, None, 2)
    [first] = engine.submit(random_prompts(3)[0], SamplingParams(4, temperature=0))
    assert engine.step() == []
    assert (first.generated, first.in_flight) == (0, 1)
    assert engine.step() == [first]
    assert (first.generated, first.in_flight) == (1, 1)
    while engine.busy:
        engine.step()
    assert (first.generated, first.in_flight, first.finish_reason) == (4, 0, "length")


def test_steps_padded_to_the_size_of_a_graph_are_the_same(small, random_prompts, monkeypatch):
    """Prompts alone and beside sequences that decode, and a prompt's scores. In the interpreter a graph is a call."""
    monkeypatch.setattr("nanochat_ray.inference.gpu_runner.READ_SIZES", (8,))
    monkeypatch.setattr("nanochat_ray.inference.gpu_runner.LEAST_PROMPTS", 2)
    answers = []
    for compiled in (False, True):
        engine = Engine(small, None, 5, chunk=8)
        if compiled:
            engine.compile()
        sequences = []
        for lengths, scores in (((3, 1), 2), ((2,), None)):
            params = SamplingParams(2, seed=len(lengths), prompt_logprobs=scores)
            sequences += [engine.submit(prompt, params)[0] for prompt in random_prompts(*lengths, seed=len(lengths))]
            engine.step()
        while engine.busy:
            engine.step()
        used = [engine.runner.graphs[size] for size in engine.runner.uses if size in engine.runner.graphs]
        assert len([graph for graph in used if graph.ends is not None]) == compiled
        answers.append(sequences)
    for ours, theirs in zip(*answers, strict=True):
        assert ours.tokens == theirs.tokens
        for one, other in zip(ours.prompt_logprobs or [None], theirs.prompt_logprobs or [None], strict=True):
            assert one == other or one[0] == pytest.approx(other[0], abs=1e-4)
    assert torch.isfinite(engine.runner.keys).all() and torch.isfinite(engine.runner.values).all()


def test_every_row_of_a_steps_inputs_is_aligned(small, random_prompts):
    """Else Triton would compile each kernel again for another mix of aligned and other pointers."""
    from nanochat_ray.inference import kernels

    engine, seen = Engine(small, None, 4, chunk=9), set()
    embed = kernels.embed

    def noted(*tensors):
        seen.update(tensor.data_ptr() % 16 for tensor in tensors)
        return embed(*tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "embed", noted)
        engine.generate(random_prompts(7, 13, 1), SamplingParams(3))
    assert seen == {0}
    assert all(table[i].data_ptr() % 16 == 0 for table in engine.runner.tables for i in range(len(table)))


def test_scores_penalties_and_grammars_are_the_cpus(kernel_device, tokenizer, random_prompts, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    kinds = [
        {"max_tokens": 0, "prompt_logprobs": 3},
        {"grammar": grammar.from_regex("[a-z]{9}")},
        {"grammar": grammar.json_object(), "top_k": 20, "presence_penalty": 1.0},
        {"frequency_penalty": 2, "logit_bias": ((9, 4.0),), "prompt_logprobs": 0},
        {"for_training": True, "top_k": 9},
        {},
    ]
    prompts = random_prompts(9, 4, 6, 12, 5, 5)
    asked = [(p, SamplingParams(**{"max_tokens": 4} | k)) for p, k in zip(prompts, kinds, strict=True)]
    answers = []
    for runner in (None, ModelRunner):
        if runner:
            monkeypatch.setattr(engine_module, "runner_of", lambda model: ModelRunner)
        engine = Engine(model.to("cpu" if runner else kernel_device), tokenizer, 3, chunk=7)
        sequences = [engine.submit(prompt, params)[0] for prompt, params in asked]
        while engine.busy:
            engine.step()
        answers.append(sequences)
    for ours, theirs in zip(*answers, strict=True):
        assert (ours.tokens, ours.finish_reason) == (theirs.tokens, theirs.finish_reason)
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        assert (ours.drawn_logprobs or []) == pytest.approx(theirs.drawn_logprobs or [], abs=1e-3)
        for (own, likeliest), (expected, others) in zip(
            (ours.prompt_logprobs or [])[1:], (theirs.prompt_logprobs or [])[1:], strict=True
        ):
            assert own == pytest.approx(expected, abs=1e-3)
            assert [value for _, value in likeliest] == pytest.approx([value for _, value in others], abs=1e-3)


def test_no_token_is_drawn_from_nan(small, random_prompts):
    engine = Engine(small, None, 2)
    sequences = [
        engine.submit(prompt, SamplingParams(3, **kind))[0]
        for prompt, kind in zip(random_prompts(3, 2), ({}, {"top_k": 5, "top_p": 0.5}), strict=True)
    ]
    engine.step()
    engine.runner.head = engine.runner.head * float("nan")
    while engine.busy:
        engine.step()
    assert [s.finish_reason for s in sequences] == ["error", "error"]
    assert all(0 <= min(s.tokens) for s in sequences)


def test_few_graph_sizes_with_little_padding():
    from nanochat_ray.inference.gpu_runner import READ_SIZES, graph_sizes

    assert READ_SIZES[-1] == GPU_MAX_PREFILL_TOKENS
    for most in (1, 2, 5, 32, 100, 256, 1000):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) < 40
        for S in range(1, most + 1):
            assert next(size for size in sizes if size >= S) < 2 * S or S == most


def test_refreshed_weights_go_where_the_graphs_read_them(kernel_device, lively, random_prompts, monkeypatch):
    model, prompts, params = copy.deepcopy(lively).to(kernel_device), random_prompts(40, 9), SamplingParams(6)
    engine = Engine(model, max_batch_size=2)
    old, places = engine.generate(prompts, params), [layer.qkv.data_ptr() for layer in engine.runner.layers]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    engine.refresh_weights(model)
    assert [layer.qkv.data_ptr() for layer in engine.runner.layers] == places
    new = engine.generate(prompts, params)
    monkeypatch.setattr(engine_module, "runner_of", lambda model: ModelRunner)
    assert new == Engine(model.to("cpu"), max_batch_size=2).generate(prompts, params) != old
