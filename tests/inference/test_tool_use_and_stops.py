"""What interrupts and ends an answer, with a runner that says a script in place of a model."""

import math

import pytest
import torch

from nanochat_ray.inference.engine import Completion, Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig


class ScriptedRunner:
    """Says script[p] at position p, whatever it reads; remembers what it was given to read."""

    device, filters = torch.device("cpu"), False

    def __init__(self, script: list[int], vocab_size: int, runs_ahead: bool):
        self.script, self.vocab_size, self.runs_ahead, self.read, self.said = script, vocab_size, runs_ahead, {}, []

    def place(self, row, table):
        pass

    def fetch(self, drawn):
        return drawn

    def run(self, rows, prompts):
        tokens = [self.said[s.slot] if s.last_token is None else s.last_token for s in rows]
        positions = [s.length - 1 for s in rows]
        self.read |= dict(zip(positions, tokens, strict=True))
        for sequence, end in prompts:
            self.read |= {at: sequence.ids[at] for at in range(sequence.table.length, end)}
            positions.append(end - 1)
        # A step that is launched ahead may go one token beyond the script.
        said = torch.tensor([[*self.script, 0][position + 1] for position in positions])
        self.said = said.tolist()
        return torch.nn.functional.one_hot(said, self.vocab_size).float(), said


@pytest.fixture(params=[False, True], ids=["each step collected", "a step ahead"])
def scripted(request, tokenizer):
    """Makes an engine that says a script."""
    model = GPT(GPTConfig(256, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))

    def make(script: list[int], **options) -> Engine:
        engine = Engine(model, tokenizer, **options)
        engine.runner = ScriptedRunner(script, tokenizer.vocab_size, request.param)
        return engine

    return make


@pytest.fixture
def counting(tokenizer):
    """A prompt; an answer with calls of the calculator, its ids and mask; and what a model might say in its place."""
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": []}]
    prompt = tokenizer.render_for_completion({"messages": messages[:1]})
    messages[1]["content"] = [
        {"type": "text", "text": "Let me count: "},
        {"type": "python", "text": "'strawberry'.count('r') * 1,000"},
        {"type": "text", "text": " no, "},
        {"type": "python", "text": "import os"},  # has no result: nothing is forced
        {"type": "python", "text": "12/4"},
        {"type": "python_output", "text": "3.0"},
        {"type": "text", "text": " Three."},
    ]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    ids, mask = ids[len(prompt) :], mask[len(prompt) :]
    # What the model would say where the tool speaks, a stop and a python_start among it, must not matter.
    junk = [tokenizer.bos_id, tokenizer.special("<|python_start|>"), *tokenizer.encode("99 and more words")]
    said = [token if m else junk[i % len(junk)] for i, (token, m) in enumerate(zip(ids, mask, strict=True))]
    return prompt, ids, mask, said


def test_the_calculators_answer_is_forced_in(scripted, counting):
    prompt, ids, mask, said = counting
    engine = scripted(prompt + said)
    [completion] = engine.generate([prompt], SamplingParams(temperature=0))
    assert (completion.tokens, completion.mask, completion.finish_reason) == (ids[:-1], mask[:-1], "stop")
    assert [engine.runner.read[p] for p in range(len(prompt) + len(ids) - 1)] == prompt + ids[:-1]
    engine = scripted(prompt + said)
    [completion] = engine.generate([prompt], SamplingParams(temperature=0, logprobs=1))
    assert (completion.tokens, completion.mask, completion.finish_reason) == (ids[:-1], mask[:-1], "stop")
    assert [engine.runner.read[p] for p in range(len(prompt) + len(ids) - 1)] == prompt + ids[:-1]
    # Of each token its own log probability: forced ones are not what the model found likeliest.
    likely = [own == likeliest[0][1] for own, likeliest in completion.logprobs]
    assert [bool(m) for m in completion.mask] == likely

    output = mask.index(0) + 1  # max_tokens ends the sequence in the middle of the tool's output
    [completion] = scripted(prompt + said).generate([prompt], SamplingParams(output, temperature=0))
    assert completion == Completion(ids[:output], mask[:output], "length")


def test_a_tools_output_outlasts_preemption_and_stops_nobody_else(scripted, counting, monkeypatch):
    """The youngest row is preempted before each of its tokens; an older one gets a token in every step."""
    prompt, ids, mask, said = counting
    engine = scripted(prompt + said, max_batch_size=2, chunk=512)
    older, younger = engine.submit(prompt, SamplingParams(temperature=0, n=2))
    make_room, pending = engine.scheduler.make_room, 0

    def preempt_then_make_room():
        nonlocal pending
        if len(engine.scheduler.running) == 2:
            pending += bool(younger.forced)
            engine.scheduler.preempt()
        return make_room()

    monkeypatch.setattr(engine.scheduler, "make_room", preempt_then_make_room)
    while older.finish_reason is None:
        before = older.length
        engine.step()
        assert older.length > before or older.finish_reason == "stop"
    while engine.busy:
        engine.step()
    assert engine.manager.used_pages == 0
    # A step ahead, a preempted sequence waits one step for the token that is in flight.
    assert engine.scheduler.preemptions >= (len(ids) - 2) // (1 + engine.runner.runs_ahead)
    if not engine.runner.runs_ahead:
        assert pending == mask.count(0)
    for sequence in (older, younger):
        assert sequence.completion() == Completion(ids[:-1], mask[:-1], "stop")


def test_assistant_end_and_bos_stop(scripted, tokenizer):
    for stop in (tokenizer.special("<|assistant_end|>"), tokenizer.bos_id):
        for said, tokens in (([65, 66, stop, 67], [65, 66]), ([stop, 67], [])):
            [completion] = scripted([1, *said]).generate([[1]], SamplingParams(temperature=0, logprobs=0))
            assert (completion.tokens, completion.finish_reason) == (tokens, "stop")
            assert len(completion.logprobs) == len(completion.mask) == len(tokens)


def test_rows_that_end_at_different_times_leave_the_others_alone(scripted, tokenizer):
    """Prompts are prefixes of one script, so that each has its own number of steps to the stop."""
    script = [*range(40, 80), tokenizer.special("<|assistant_end|>")]
    lengths = [38, 3, 39, 20, 1, 40, 37, 12]
    engine = scripted(script, max_batch_size=3)
    completions = engine.generate([script[:length] for length in lengths], SamplingParams(temperature=0))
    assert [c.tokens for c in completions] == [script[length:40] for length in lengths]


def test_a_stop_string_ends_every_sample_with_the_token_that_completes_it(scripted, tokenizer):
    singles = [tokenizer.ranks[bytes([byte])] for byte in "so: 🙂 STOP and more".encode()]
    for stop, said in ((("STOP",), "so: 🙂 STOP"), (("no", "🙂"), "so: 🙂"), (("s",), "s")):
        params = SamplingParams(temperature=0, n=2, stop=stop, logprobs=0)
        completions = scripted([1, *singles]).generate([[1]], params)
        for completion in completions:
            assert tokenizer.decode(completion.tokens) == said
            assert completion.finish_reason == "stop"
            assert len(completion.logprobs) == len(completion.mask) == len(said.encode())
    length = len("so: 🙂 STO".encode())  # max_tokens comes first
    [completion] = scripted([1, *singles]).generate([[1]], SamplingParams(length, 0, stop=("STOP",)))
    assert (len(completion.tokens), completion.finish_reason) == (length, "length")


def test_for_training_a_tools_output_has_no_probability_and_the_end_has_its_own(scripted, counting, tokenizer):
    prompt, ids, mask, said = counting
    end = tokenizer.special("<|assistant_end|>")
    engine = scripted([*prompt, *said])
    [completion] = engine.generate([prompt], SamplingParams(max_tokens=99, for_training=True))
    assert completion.tokens == ids and ids[-1] == end and completion.finish_reason == "stop"
    assert completion.mask == mask
    by_chance = 1 - math.log(math.e + tokenizer.vocab_size - 1)  # of the one token whose logit is 1, and not 0
    assert completion.drawn_logprobs == pytest.approx([by_chance * drawn for drawn in mask], abs=1e-5)
