import random

import numpy as np
import pytest
import torch

from nanochat_ray.inference.engine import Completion, Engine
from nanochat_ray.inference.kv_cache import PAGE, page_bytes
from nanochat_ray.inference.sampling import Controls, SamplingParams, sample
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.gpt import GPT, GPTConfig

GREEDY = SamplingParams(max_tokens=40, temperature=0)


def pages(model: GPT, count: int) -> int:
    """The bytes of so many pages, beside the null page."""
    return (1 + count) * page_bytes(model.config, 4)


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()
        assert 0 <= engine.manager.used_pages <= engine.manager.num_pages
    assert engine.manager.used_pages == 0


def sampled_from(logits: torch.Tensor, params: SamplingParams, sample_index: int = 0) -> torch.Tensor:
    """What the rows (T, V) of one sequence's logits give at its steps 0 … T - 1."""
    keys = np.array([(params.seed, sample_index, step) for step in range(len(logits))], dtype=np.uint64)
    return sample(logits, Controls([params] * len(logits), logits.size(-1)), keys)


@torch.no_grad()
def recomputed(model: GPT, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits (T, V) that each of the tokens was chosen by, from one forward without a cache."""
    return model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize(
    "options",
    [{"max_batch_size": 1}, {"max_batch_size": 2}, {"max_batch_size": 32}, {"chunk": 7}, {"chunk": 1}],
    ids=str,
)
def test_greedy_equals_nanochats(reference, options):
    model, cases = reference
    completions = Engine(model, None, **options).generate([case["prompt"] for case in cases], GREEDY)
    assert completions == [Completion(case["greedy"], [1] * 40, "length") for case in cases]


def test_greedy_survives_preemption(reference):
    model, cases = reference
    for chunk in (64, 7):
        engine = Engine(model, None, kv_bytes=pages(model, 35), chunk=chunk)
        sequences = [engine.submit(case["prompt"], GREEDY)[0] for case in reversed(cases)]
        finish(engine)
        assert engine.scheduler.preemptions > 0
        assert [s.tokens for s in reversed(sequences)] == [case["greedy"] for case in cases]


@pytest.mark.parametrize("count", [2400, 48])  # pages: plenty, or so few that rows are preempted
def test_greedy_among_31_that_come_and_go(reference, random_prompts, count):
    model, cases = reference
    choose = random.Random(count)
    engine = Engine(model, None, 32, kv_bytes=pages(model, count), chunk=48)
    others, golden, waiting = [], [], [*cases, *cases]

    def crowd() -> None:
        while sum(s.finish_reason is None for s in others) < 31:
            [prompt] = random_prompts(choose.choice([1, 20, 64, 200]), seed=len(others) % 9)
            params = SamplingParams(choose.randrange(1, 90), choose.choice([0, 1.0]), top_p=0.9, seed=len(others))
            others.extend(engine.submit(prompt, params))

    while waiting or any(s.finish_reason is None for s in golden):
        crowd()
        if waiting:
            golden += engine.submit(waiting.pop(0)["prompt"], GREEDY)
        for _ in range(4):
            engine.step()
        for sequence in choose.sample(others, 2):
            engine.cancel(sequence)
    for sequence in others:
        engine.cancel(sequence)
    assert [s.tokens for s in golden] == [case["greedy"] for case in cases] * 2
    assert engine.manager.used_pages == 0
    assert (engine.scheduler.preemptions > 0) == (count == 48)


def test_greedy_from_a_known_prefix_and_after_its_eviction(reference, random_prompts):
    model, cases = reference
    engine = Engine(model, None, 4, kv_bytes=pages(model, 60))
    expected = [case["greedy"] for case in cases]

    def answer() -> tuple[list[list[int]], list[int]]:
        sequences = [engine.submit(case["prompt"], GREEDY)[0] for case in cases]
        finish(engine)
        return [s.tokens for s in sequences], [s.cached_tokens for s in sequences]

    whole_blocks = [0, 0, 32, 128]  # of prompts of 1, 2, 37 and 150 tokens
    assert answer() == (expected, [0, 0, 0, 32])  # the golden prompts begin alike
    assert answer() == (expected, whole_blocks)
    counts = {"requests": 8, "prompt_tokens": 2 * 190, "cached_tokens": 32 + 160, "generated_tokens": 320}
    assert engine.counts == counts
    # The next turn of a chat goes on from the answer before it.
    turn = [*cases[3]["prompt"], *expected[3], 1, 2, 3]
    [sequence] = engine.submit(turn, GREEDY)
    finish(engine)
    assert sequence.cached_tokens == 160
    assert sequence.tokens == recomputed(model, turn, sequence.tokens).argmax(-1).tolist()
    engine.generate(random_prompts(250, 240, 230, 220, 210, 200), SamplingParams(2))
    tokens, cached = answer()
    assert tokens == expected
    assert cached[3] < 128


@pytest.mark.parametrize("options", [{}, {"chunk": 33}, {"pages": 60, "chunk": 100}], ids=str)
def test_generation_equals_full_recompute_past_windows_and_context(lively, random_prompts, options):
    kv_bytes = pages(lively, options["pages"]) if "pages" in options else None
    engine = Engine(lively, None, 3, kv_bytes, options.get("chunk"))
    prompts, params = random_prompts(1, 100, 250), SamplingParams(max_tokens=160, seed=3)
    for prompt, completion in zip(prompts, engine.generate(prompts, params), strict=True):
        drawn = sampled_from(recomputed(lively, prompt, completion.tokens), params)
        assert len(set(completion.tokens)) > 20  # not stuck in a loop that any cache would get right
        assert (drawn == torch.tensor(completion.tokens)).sum() >= 159  # a draw may fall where rounding decides
    assert (engine.scheduler.preemptions > 0) == ("pages" in options)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 128, 129, 160, 256, 288])
def test_prompts_that_end_at_the_borders_of_pages_and_windows(lively, random_prompts, length):
    engine, params = Engine(lively, None, 2), SamplingParams(max_tokens=4, temperature=0)
    [prompt] = random_prompts(length)
    for known in (0, (length - 1) // PAGE * PAGE):
        [sequence] = engine.submit(prompt, params)
        finish(engine)
        assert sequence.cached_tokens == known
        assert sequence.tokens == recomputed(lively, prompt, sequence.tokens).argmax(-1).tolist()


def test_samples_share_their_prompts_pages_and_do_not_depend_on_the_batch(lively, random_prompts):
    first, second, third = random_prompts(70, 5, 60)
    params = SamplingParams(max_tokens=12, n=3, top_k=50, seed=5)
    engine = Engine(lively, None)
    sequences = engine.submit(first, params)
    finish(engine)
    assert [s.cached_tokens for s in sequences] == [0, 64, 64]
    samples = [s.completion() for s in sequences]
    assert len({tuple(sample.tokens) for sample in samples}) == 3
    for size in (2, 5, 9):  # fewer places than samples, and more
        crowd = Engine(lively, None, max_batch_size=size).generate([second, first, third], params)
        assert crowd[3:6] == samples
    one = SamplingParams(max_tokens=12, top_k=50, seed=5)
    assert Engine(lively, None).generate([first], one) == samples[:1]
    assert list(Engine(lively, None).stream(first, params)) == samples[0].tokens
    other = SamplingParams(max_tokens=12, top_k=50, seed=6)
    assert Engine(lively, None).generate([first], other)[0] not in samples


def test_every_row_of_a_batch_keeps_its_own_parameters(lively, random_prompts):
    """Also when rows move because others end, and when a penalty is for tokens chosen before a preemption."""
    kinds = [
        SamplingParams(30, temperature=0),
        SamplingParams(9, temperature=2.0, seed=1),
        SamplingParams(30, temperature=0, repetition_penalty=5.0),
        SamplingParams(14, top_k=3, seed=2),
        SamplingParams(30, min_p=0.2, top_p=0.7, seed=3, repetition_penalty=1.3),
    ]
    prompts = random_prompts(20, 40, 30, 10, 50)
    alone = [
        Engine(lively, None, 1).generate([prompt], params)[0].tokens
        for prompt, params in zip(prompts, kinds, strict=True)
    ]
    assert len(set(alone[2])) == 30  # with so high a penalty nothing is said twice
    assert not set(alone[2]) & set(prompts[2])
    for count in (2000, 18):
        engine = Engine(lively, None, 8, pages(lively, count), chunk=16)
        sequences = [engine.submit(prompt, params)[0] for prompt, params in zip(prompts, kinds, strict=True)]
        finish(engine)
        assert [s.tokens for s in sequences] == alone
        assert (engine.scheduler.preemptions > 0) == (count == 18)


def test_logprobs_are_those_of_a_full_forward(lively, random_prompts):
    prompts = random_prompts(40, 7, 90)
    kinds = [SamplingParams(20, logprobs=5, top_k=3), SamplingParams(20), SamplingParams(20, 0.5, logprobs=0, n=2)]
    engine = Engine(lively, None, 3, chunk=16)
    sequences = [s for prompt, params in zip(prompts, kinds, strict=True) for s in engine.submit(prompt, params)]
    finish(engine)
    assert sequences[1].completion().logprobs is None
    for sequence in [sequences[0], *sequences[2:]]:
        noted = sequence.completion().logprobs
        expected = recomputed(lively, sequence.ids[: sequence.prompt_len], sequence.tokens).log_softmax(-1)
        own = expected.gather(1, torch.tensor(sequence.tokens).unsqueeze(1)).squeeze(1)
        assert [value for value, _ in noted] == pytest.approx(own.tolist(), abs=1e-3)
        for (_, likeliest), row in zip(noted, expected, strict=True):
            assert len(likeliest) == sequence.params.logprobs
            assert [v for _, v in likeliest] == pytest.approx(row.topk(len(likeliest)).values.tolist(), abs=1e-3)
            assert [row[token].item() for token, _ in likeliest] == pytest.approx([v for _, v in likeliest], abs=1e-3)


def test_cancelling_frees_memory_in_every_state_and_leaves_the_others_alone(lively, random_prompts):
    prompts = random_prompts(90, 80, 200, 30)
    expected = Engine(lively, None, 1).generate(prompts[:1], GREEDY)[0].tokens

    def ends(engine: Engine, kept: Sequence, *cancelled: Sequence) -> None:
        for sequence in [*cancelled, *cancelled]:  # twice does nothing more
            engine.cancel(sequence)
            assert sequence.finish_reason == "cancelled"
            assert sequence.table is None
        finish(engine)
        assert (kept.tokens, kept.finish_reason) == (expected, "length")

    engine = Engine(lively, None, 2, chunk=64)
    kept, running, half_read, waiting = (engine.submit(prompt, GREEDY)[0] for prompt in prompts)
    engine.cancel(waiting)  # before any step
    while not running.generated:
        engine.step()
    engine.cancel(running)
    while not half_read.table:
        engine.step()
    assert 0 < half_read.table.length < 200
    ends(engine, kept, running, half_read, waiting)

    engine = Engine(lively, None, 4, pages(lively, 28), chunk=64)
    kept, preempted = (engine.submit(prompt, GREEDY)[0] for prompt in prompts[:2])
    while not engine.scheduler.preemptions:
        engine.step()
    assert preempted.generated > 0
    assert preempted.table is None
    ends(engine, kept, preempted)
    engine.cancel(kept)  # after its end
    assert kept.finish_reason == "length"


def test_a_stream_that_is_left_frees_its_memory(lively, random_prompts):
    [prompt] = random_prompts(40)
    engine = Engine(lively, None)
    expected = engine.generate([prompt], GREEDY)[0].tokens
    stream = engine.stream(prompt, GREEDY)
    assert [next(stream) for _ in range(3)] == expected[:3]
    assert engine.manager.used_pages > 0
    stream.close()
    assert (engine.manager.used_pages, engine.busy) == (0, False)


def test_memory_is_bounded_and_nobody_is_lost(lively, random_prompts):
    engine = Engine(lively, None, 6, pages(lively, 40), chunk=64)
    keys, values = engine.runner.keys, engine.runner.values
    places = keys.data_ptr(), values.data_ptr(), keys.shape, values.shape
    assert keys.nbytes + values.nbytes == pages(lively, 40)
    lengths = [1, 200, 33, 64, 150, 2, 90, 10] * 3
    sequences = [engine.submit(prompt, SamplingParams(90))[0] for prompt in random_prompts(*lengths)]
    finish(engine)
    assert all((s.finish_reason, s.generated) == ("length", 90) for s in sequences)
    assert engine.scheduler.preemptions > 0
    assert (engine.runner.keys.data_ptr(), engine.runner.values.data_ptr(), keys.shape, values.shape) == places


def test_a_step_tells_each_that_moved_once(lively, random_prompts):
    engine = Engine(lively, None, 4)
    sequences = [engine.submit(prompt, GREEDY)[0] for prompt in random_prompts(5, 6, 7)]
    told = dict.fromkeys(sequences, 0)
    while engine.busy:
        moved = engine.step()
        assert len(moved) == len(set(moved))
        for sequence in moved:
            assert sequence.generated > told[sequence]
            told[sequence] = sequence.generated
    assert set(told.values()) == {40}


def test_the_cached_part_of_a_prompt_is_no_longer_than_the_prompt(lively, random_prompts):
    """A sequence that was preempted finds its own answer in the cache, which is no part of its prompt."""
    engine = Engine(lively, None, 4, pages(lively, 28), chunk=64)
    sequences = [engine.submit(prompt, SamplingParams(70))[0] for prompt in random_prompts(33, 34)]
    finish(engine)
    assert engine.scheduler.preemptions > 0
    assert [s.cached_tokens for s in sequences] == [0, 0]


@pytest.mark.parametrize("chunk", [7, 31, 50, None])
def test_a_sequence_has_room_up_to_the_capacity_whatever_the_chunk(random_prompts, chunk):
    """In as few pages as hold a window of 100 tokens, which is no whole number of pages."""
    model = GPT(GPTConfig(100, 300, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.init_weights()
    [prompt] = random_prompts(960)
    for count, length, tokens in ((5, 960, 40), (4, 100, 28), (1, 30, 2)):
        engine = Engine(model, None, 1, pages(model, count), chunk=chunk)
        [sequence] = engine.submit(prompt[:length], SamplingParams(max_tokens=999))
        finish(engine)
        assert (sequence.generated, sequence.finish_reason) == (tokens, "length")


def test_bad_prompts_and_the_end_of_the_reach(reference):
    model, _ = reference
    engine, reach = Engine(model, None), 2560
    assert engine.generate([], GREEDY) == []
    for prompt, message in (([], "empty"), ([5] * reach, "2560 tokens"), ([300], "0 … 299"), ([-1], "0 … 299")):
        with pytest.raises(ValueError, match=message):
            engine.generate([[1], prompt], GREEDY)
        assert not engine.busy
        with pytest.raises(ValueError, match=message):
            engine.stream(prompt, GREEDY)  # before the first token is asked for
    [completion] = engine.generate([[5] * (reach - 3)], GREEDY)
    assert (len(completion.tokens), completion.finish_reason) == (3, "length")
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine.submit([1], SamplingParams(stop=("a",)))
    for options, message in (
        ({"max_batch_size": 0}, "max_batch_size 0"),
        ({"chunk": 0}, "chunk 0"),
        ({"kv_bytes": 5000}, "too few for 4 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, None, **options)
    small = Engine(model, None, kv_bytes=pages(model, 8))
    with pytest.raises(ValueError, match="64 tokens leaves no room within the cache's room of 64"):
        small.submit([1] * 64, GREEDY)


def test_how_much_of_a_prompt_is_read_follows_the_rows_beside_it(lively, random_prompts):
    """As many tokens as may make a step longer by half of what its rows take alone, or three times that to its end."""
    engine = Engine(lively, None, 4)
    beside, prompt = random_prompts(5, 270)
    for _ in range(2):
        engine.submit(beside, SamplingParams(200, temperature=0))
    while len(engine.rows) < 2:
        engine.step()
    [sequence] = engine.submit(prompt, SamplingParams(1))
    lengths = []
    while not sequence.generated:
        engine.decode_seconds, engine.prefill_seconds_per_token = {1: 0.1, 3: 0.3}, 0.002  # 0.2 s for two rows
        engine.step()
        lengths.append(sequence.table.length if sequence.table else len(prompt))
    assert lengths == [50, 100, 150, 270]

    sequences = [engine.submit(prompt, GREEDY)[0] for prompt in random_prompts(90, 170, 250, seed=2)]
    engine.decode_seconds, engine.prefill_seconds_per_token = {1: 0.1, 3: 0.3}, 0.001
    engine.cancel(engine.rows[0])
    engine.step()
    # One runs, three could join it: three times 0.5 of 0.1 s, and three times as much where prompts end
    assert [s.table and s.table.length for s in sequences] == [90, 170, None]


def test_where_many_run_a_prompt_waits_a_little_for_others(lively, random_prompts):
    engine = Engine(lively, None, 32, chunk=64)
    first, second, long, *many = random_prompts(5, 6, 100, *[4] * 24)
    sequences = [engine.submit(prompt, SamplingParams(200, temperature=0))[0] for prompt in many]
    while engine.scheduler.waiting:
        engine.step()
    [one] = engine.submit(first, GREEDY)
    assert one not in engine.step()
    [other] = engine.submit(second, GREEDY)
    assert engine.step() == sequences  # two steps at most
    assert engine.step() == [*sequences, one, other]

    [one] = engine.submit(long, GREEDY)
    lengths = []
    while not one.generated:
        engine.step()
        lengths.append(one.table and one.table.length)
    assert lengths == [None, None, 64, 100]  # none between its parts

    engine.step()
    others = [engine.submit(prompt, GREEDY)[0] for prompt in (first, second, many[0])]
    assert set(others) <= set(engine.step())  # three are not few
    for sequence in [*sequences[:16], *others, one]:
        engine.cancel(sequence)
    [one] = engine.submit(first, GREEDY)
    assert one in engine.step()  # eight are not many


def test_a_step_reads_several_prompts_within_its_budget(lively, random_prompts):
    engine = Engine(lively, None, 5, chunk=64)
    sequences = [engine.submit(prompt, GREEDY)[0] for prompt in random_prompts(20, 30, 20, 70, 5, 5)]
    assert engine.step() == sequences[:2]
    assert sequences[2].table.length == 14  # what was left of 64
    assert engine.step() == sequences[:3]
    assert sequences[3].table.length == 58
    assert engine.step() == sequences[:5]  # and there are no more places
    assert sequences[5].table is None
    finish(engine)
    alone = [Engine(lively, None).generate([s.ids[: s.prompt_len]], GREEDY)[0].tokens for s in sequences]
    assert [s.tokens for s in sequences] == alone


def test_prompts_that_begin_alike_are_not_read_twice(lively, random_prompts):
    """What one step reads for the first of them is there for the others in the next."""
    system, *users = random_prompts(PAGE + 8, 9, 10, 11)
    engine = Engine(lively, None, 4)
    sequences = [engine.submit(system + user, GREEDY)[0] for user in users]
    assert engine.step() == sequences[:1]
    assert engine.step() == sequences
    assert [s.cached_tokens for s in sequences] == [0, PAGE, PAGE]
