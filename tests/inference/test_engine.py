import json
from types import SimpleNamespace

import pytest
import torch

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.engine import Completion, Engine
from nanochat_ray.inference.kv_cache import KVCache
from nanochat_ray.inference.sampling import SamplingParams, sample
from nanochat_ray.model.gpt import GPT, GPTConfig

GREEDY = SamplingParams(max_tokens=40, temperature=0)


@pytest.fixture
def reference(golden, reference_model):
    return reference_model, json.loads((golden / "greedy.json").read_text())


@pytest.fixture(scope="module")
def lively():
    """Random weights all through (init_weights leaves blocks and smear off), GQA, windows of 128 and 256."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 300, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("max_batch_size", [1, 2, 32])
def test_greedy_equals_nanochats(reference, max_batch_size):
    model, cases = reference
    completions = Engine(model, None, max_batch_size).generate([case["prompt"] for case in cases], GREEDY)
    assert completions == [Completion(case["greedy"], [1] * 40, "length") for case in cases]


def test_generation_equals_full_recompute_past_windows_and_context(lively):
    prompts, params = random_prompts(1, 100, 250), SamplingParams(max_tokens=180, seed=3)
    for prompt, completion in zip(prompts, Engine(lively, None).generate(prompts, params), strict=True):
        with torch.no_grad():
            logits = lively(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        keys = torch.tensor([(params.seed, 0, step) for step in range(180)])
        agree = sample(logits, params, keys) == torch.tensor(completion.tokens)
        assert len(set(completion.tokens)) > 20  # not stuck in a loop that any cache would get right
        assert agree.sum() >= 179  # a draw may fall where rounding decides


def test_uneven_chunks_through_the_cache_equal_one_forward(lively):
    prompts = random_prompts(360, 330)
    cache = KVCache(lively.config, batch_size=4, max_len=400)
    cache.keys.fill_(50.0)  # what an earlier sequence left behind
    with torch.no_grad():
        expected = [lively.hidden(torch.tensor([prompt]))[0] for prompt in prompts]
        at = [0, 0]
        for counts in ([7, 30], [1, 9], [160, 120], [1, 1], [190, 150], [1, 20]):
            idx = torch.zeros(2, max(counts), dtype=torch.long)
            for row, count in enumerate(counts):
                idx[row, :count] = torch.tensor(prompts[row][at[row] : at[row] + count])
            hidden = lively.hidden(idx, cache.chunk(1, counts))
            for row, count in enumerate(counts):
                torch.testing.assert_close(
                    hidden[row, :count], expected[row][at[row] : at[row] + count], atol=1e-4, rtol=0
                )
                at[row] += count
    assert cache.lengths == [0, 360, 330, 0]
    with pytest.raises(ValueError, match="401 tokens"):
        cache.chunk(1, [41, 1])


def test_samples_share_a_prefill_and_do_not_depend_on_the_batch(reference, monkeypatch):
    model, _ = reference
    first, second, third = random_prompts(30, 5, 60)
    forwards, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: forwards.append(tuple(idx.shape)) or hidden(idx, cache))

    params = SamplingParams(max_tokens=12, n=3, top_k=50, seed=5)
    samples = Engine(model, None).generate([first], params)
    assert forwards == [(1, 30)] + [(3, 1)] * 11
    assert len({tuple(sample.tokens) for sample in samples}) == 3

    forwards.clear()
    crowd = Engine(model, None, max_batch_size=5).generate([second, first, third], params)
    assert sum(rows for rows, length in forwards if length > 1) == 3
    assert max(rows for rows, _ in forwards) <= 5
    assert crowd[3:6] == samples
    assert Engine(model, None, max_batch_size=9).generate([second, first, third], params) == crowd  # one prefill
    assert Engine(model, None, max_batch_size=2).generate([first], params) == samples  # more samples than places
    other = SamplingParams(max_tokens=12, top_k=50, seed=6)
    assert Engine(model, None).generate([first], other)[0] not in samples
    one = SamplingParams(max_tokens=12, top_k=50, seed=5)
    assert list(Engine(model, None).stream(first, one)) == samples[0].tokens


def test_bad_prompts_and_the_end_of_the_reach(reference):
    model, _ = reference
    engine, reach = Engine(model, None), 2560
    assert engine.generate([], GREEDY) == []
    for prompt, message in (([], "empty"), ([5] * reach, "2560 tokens"), ([300], "0 … 299"), ([-1], "0 … 299")):
        with pytest.raises(ValueError, match=message):
            engine.generate([[1], prompt], GREEDY)
        with pytest.raises(ValueError, match=message):
            engine.stream(prompt, GREEDY)  # before the first token is asked for
    [completion] = engine.generate([[5] * (reach - 3)], GREEDY)
    assert (len(completion.tokens), completion.finish_reason) == (3, "length")
    with pytest.raises(ValueError, match="max_batch_size 0"):
        Engine(model, None, max_batch_size=0)


class ScriptedModel:
    """Says script[p] at position p, whatever it reads; remembers what it was given to read."""

    def __init__(self, script: list[int], vocab_size: int):
        self.config = GPTConfig(256, vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
        self.cos, self.compute_dtype = torch.zeros(2560, 1), torch.float32
        self.script, self.read = torch.tensor(script), {}

    def hidden(self, idx, cache):
        positions = cache.positions(idx.size(1))
        self.read |= dict(zip(positions[0].tolist(), idx[0].tolist(), strict=True))
        return positions.unsqueeze(-1)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(self.script[hidden.squeeze(-1) + 1], self.config.vocab_size).float()


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


def answer_by_script(tokenizer, said: list[int], **options) -> tuple[SimpleNamespace, list[int], ScriptedModel]:
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "How many?"}]})
    model = ScriptedModel(prompt + said, tokenizer.vocab_size)
    [completion] = Engine(model, tokenizer).generate([prompt], SamplingParams(temperature=0, **options))
    return completion, prompt, model


def test_the_calculators_answer_is_forced_in(tokenizer):
    conversation = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": []}]}
    conversation["messages"][1]["content"] = [
        {"type": "text", "text": "Let me count: "},
        {"type": "python", "text": "'strawberry'.count('r') * 1,000"},
        {"type": "text", "text": " no, "},
        {"type": "python", "text": "import os"},  # has no result: nothing is forced
        {"type": "python", "text": "12/4"},
        {"type": "python_output", "text": "3.0"},
        {"type": "text", "text": " Three."},
    ]
    ids, mask = tokenizer.render_conversation(conversation)
    prompt = tokenizer.render_for_completion({"messages": conversation["messages"][:1]})
    ids, mask = ids[len(prompt) :], mask[len(prompt) :]
    # What the model would say where the tool speaks, a stop and a python_start among it, must not matter.
    junk = [tokenizer.bos_id, tokenizer.special("<|python_start|>"), *tokenizer.encode("99 and more words")]
    said = [token if m else junk[i % len(junk)] for i, (token, m) in enumerate(zip(ids, mask, strict=True))]
    completion, prompt, model = answer_by_script(tokenizer, said)
    assert completion == Completion(ids[:-1], mask[:-1], "stop")
    assert [model.read[p] for p in range(len(prompt) + len(ids) - 1)] == prompt + ids[:-1]

    output = mask.index(0) + 1  # max_tokens ends the sequence in the middle of the tool's output
    completion, _, _ = answer_by_script(tokenizer, said, max_tokens=output)
    assert completion == Completion(ids[:output], mask[:output], "length")


def test_assistant_end_and_bos_stop(tokenizer):
    for stop in (tokenizer.special("<|assistant_end|>"), tokenizer.bos_id):
        completion, _, _ = answer_by_script(tokenizer, [65, 66, stop, 67])
        assert completion == Completion([65, 66], [1, 1], "stop")
        assert answer_by_script(tokenizer, [stop])[0] == Completion([], [], "stop")


def test_rows_that_end_at_different_times_leave_the_others_alone(tokenizer):
    """Prompts are prefixes of one script, so that each has its own number of steps to the stop."""
    script = [*range(40, 80), tokenizer.special("<|assistant_end|>")]
    engine = Engine(ScriptedModel(script, tokenizer.vocab_size), tokenizer, max_batch_size=3)
    lengths = [38, 3, 39, 20, 1, 40, 37, 12]
    completions = engine.generate([script[:length] for length in lengths], SamplingParams(temperature=0))
    assert [c.tokens for c in completions] == [script[length:40] for length in lengths]
