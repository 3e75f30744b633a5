import json
import re

import pytest
import torch

from nanochat_ray.inference import grammar
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.kv_cache import page_bytes
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def wild(tokenizer):
    """Random weights and the golden tokenizer: any token is about as likely as another, also python_start."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, window_pattern="SL"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def follows(value: dict) -> bool:
    """Whether JSON is what PERSON asks for."""
    name, age, likes = value["name"], value["age"], value["likes"]
    return (
        set(value) == {"name", "age", "likes"}
        and isinstance(name, str)
        and len(name) <= 12
        and type(age) is int
        and 0 <= age <= 150
        and len(likes) <= 3
        and set(likes) <= {"tea", "coffee"}
    )


def test_a_random_models_answers_are_json_of_the_schema(wild, tokenizer):
    engine = Engine(wild, tokenizer, 8)
    kinds = [{"temperature": t, "seed": s} for t in (0, 0.7, 1.5, 5.0) for s in range(3)]
    kinds += [{"top_k": 5}, {"top_p": 0.5, "min_p": 0.1}, {"frequency_penalty": 2, "repetition_penalty": 1.5}]
    kinds += [{"logit_bias": tuple((token, 100) for token in tokenizer.special_tokens.values())}]
    schema = grammar.from_json_schema(PERSON)
    prompt = [tokenizer.bos_id, *tokenizer.encode("Who are you?")]
    sequences = [s for kind in kinds for s in engine.submit(prompt, SamplingParams(300, grammar=schema, n=2, **kind))]
    [plain] = engine.submit(prompt, SamplingParams(40, seed=3))
    while engine.busy:
        engine.step()
    texts = [tokenizer.decode(s.tokens) for s in sequences]
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.finish_reason == "stop"
        assert follows(json.loads(text)), text
        assert not set(sequence.tokens) & set(tokenizer.special_tokens.values())
        assert sequence.mask == [1] * sequence.generated
    assert len(set(texts)) > 15
    assert plain.completion() == Engine(wild, tokenizer, 1).generate([prompt], SamplingParams(40, seed=3))[0]


def test_an_answer_cut_short_is_the_beginning_of_one_that_is_not(wild, tokenizer):
    schema = grammar.from_json_schema(PERSON)
    for n, whole in enumerate(Engine(wild, tokenizer).generate([[1]], SamplingParams(300, grammar=schema, n=4))):
        for most in (1, 7, len(whole.tokens) - 1, len(whole.tokens)):
            *_, short = Engine(wild, tokenizer).generate([[1]], SamplingParams(most, grammar=schema, n=n + 1))
            assert short.tokens == whole.tokens[:most]
            assert short.finish_reason == ("stop" if most == len(whole.tokens) else "length")


def test_whatever_is_beside_it_a_seed_gives_the_same_answer_also_after_preemption(wild, tokenizer, random_prompts):
    schema = grammar.from_json_schema(PERSON)
    kinds = [
        {"grammar": schema},
        {"grammar": grammar.json_object()},
        {"grammar": grammar.from_regex("[a-z]{40,60}"), "top_k": 9, "stop": ("zz",)},
        {"logit_bias": ((5, 3.0), (7, -100)), "presence_penalty": 1.5},
        {"frequency_penalty": -0.5, "top_p": 0.6},
        {"grammar": schema, "repetition_penalty": 1.2, "logprobs": 2},
        {},
    ]
    asked = [
        (prompt, SamplingParams(50, seed=i, **kind))
        for i, (prompt, kind) in enumerate(zip(random_prompts(33, 5, 40, 20, 64, 9, 31), kinds, strict=True))
    ]
    alone = [Engine(wild, tokenizer, 1).generate([prompt], params)[0] for prompt, params in asked]
    for count in (2000, 10):
        kv_bytes = (1 + count) * page_bytes(wild.config, 4)
        engine = Engine(wild, tokenizer, 5, kv_bytes, chunk=16)
        sequences = [engine.submit(prompt, params)[0] for prompt, params in asked]
        while engine.busy:
            engine.step()
        assert (engine.scheduler.preemptions > 0) == (count == 10)
        for sequence, expected in zip(sequences, alone, strict=True):
            assert (sequence.tokens, sequence.finish_reason) == (expected.tokens, expected.finish_reason)


def test_tokens_are_drawn_as_likely_as_among_those_that_the_grammar_allows(wild, tokenizer):
    letters = [tokenizer.encode(letter)[0] for letter in "abcdefgh"]
    params = SamplingParams(1, grammar=grammar.from_choices(list("abcdefgh")), n=4000, logprobs=0, temperature=3)
    logits = wild(torch.tensor([[1, 2, 3]]))[0, -1, letters].double()
    expected = (logits / 3).softmax(0) * 4000
    completions = Engine(wild, tokenizer, 64).generate([[1, 2, 3]], params)
    counts = torch.tensor([sum(c.tokens == [letter] for c in completions) for letter in letters])
    assert counts.sum() == 4000
    assert ((counts - expected) ** 2 / expected).sum() < 24.4  # the 0.1 % quantile with 7 degrees of freedom
    assert {c.finish_reason for c in completions} == {"stop"}


def test_choices_and_expressions_are_matched_as_a_whole(wild, tokenizer):
    engine = Engine(wild, tokenizer)

    def said(text: str, **more) -> set[str]:
        completions = engine.generate([[3]], SamplingParams(60, n=40, grammar=text, **more))
        assert {c.finish_reason for c in completions} == {"stop"}
        return {tokenizer.decode(c.tokens) for c in completions}

    choices = ["yes", "yes, but", 'a"b', "<|bos|>", "[x]*\n", "é🙂"]
    assert said(grammar.from_choices(choices)) <= set(choices)
    assert len(said(grammar.from_choices(choices), temperature=20)) >= 4
    pattern = r"[0-9]{3}-[a-c]+x|\d\.5"
    assert all(re.fullmatch(pattern, text) for text in said(grammar.from_regex(pattern), temperature=0.1))
    assert said(grammar.from_regex("")) == {""}
    assert said(grammar.from_regex("(ab){3}c")) == {"abababc"}
    cut = said(grammar.from_regex("(ab){3}c"), stop=("ba",))  # a stop string ends it before
    assert all("ba" in text and len(text) < 6 for text in cut)


def test_json_of_many_kinds_of_schema(wild, tokenizer):
    """As pydantic writes them, and what has no end if the model does not end it."""
    engine = Engine(wild, tokenizer, 64)
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}
    schemas = [
        {},
        {"type": "object"},
        {"type": "array", "items": {"type": "number"}},
        {"enum": ["a", 1, None, [True]]},
        {"const": {"a": "\u0001é"}},
        {"type": ["integer", "null"], "title": "T", "description": "d", "default": None},
        {"type": "string", "pattern": "^[a-f]{2,4}$"},
        {"type": "string", "format": "date"},
        {"$defs": {"Node": node}, "$ref": "#/$defs/Node"},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "minLength": 2, "maxLength": 5}]},
        {"x-guidance": {"whitespace_flexible": True}, "type": "array", "items": {"type": "null"}},
    ]
    sequences = [
        (s, schema)
        for schema in schemas
        for s in engine.submit([1], SamplingParams(150, n=3, grammar=grammar.from_json_schema(schema)))
    ]
    while engine.busy:
        engine.step()
    stopped = set()
    for sequence, schema in sequences:
        text = tokenizer.decode(sequence.tokens)
        assert "\n" not in text and "  " not in re.sub(r'"(\\.|[^"\\])*("|$)', "", text)
        if sequence.finish_reason == "stop":
            value = json.loads(text)
            stopped.add(str(schema))
            if "enum" in schema:
                assert value in schema["enum"]
            if "const" in schema:
                assert value == schema["const"]
            if "pattern" in schema:
                assert re.fullmatch("[a-f]{2,4}", value)
        else:
            assert sequence.finish_reason == "length"
    assert len(stopped) >= 8


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (grammar.from_json_schema, {"type": "objekt"}, "objekt"),
        (grammar.from_json_schema, {"type": "object", "properties": 3}, "."),
        (grammar.from_json_schema, {"$ref": "#/$defs/none"}, "none"),
        (grammar.from_json_schema, {"$ref": "https://example.org/schema.json"}, "."),
        (grammar.from_json_schema, {"not": {"type": "string"}}, "not"),
        (grammar.from_json_schema, ["a"], "is an object, not list"),
        (grammar.from_json_schema, {"type": "string", "pattern": "(a"}, "."),
        (grammar.from_regex, "(a", "unclosed group"),
        (grammar.from_regex, "(?=a)b", "look-around"),
        (grammar.from_regex, r"\bfoo", "lookarounds not supported"),
        (grammar.from_choices, [], "one or more"),
        (grammar.from_choices, ["a", ""], "not empty"),
    ],
)
def test_what_cannot_be_kept_to_is_named_in_a_line(make, given, message):
    with pytest.raises(ValueError, match=message) as raised:
        make(given)
    assert "\n" not in str(raised.value)


def test_a_wrong_grammar_is_refused_and_the_engine_goes_on(wild, tokenizer):
    engine = Engine(wild, tokenizer)
    [other] = engine.submit([1], SamplingParams(5))
    for wrong in ("start: (", "{", "no grammar at all"):
        with pytest.raises(ValueError, match="grammar"):
            engine.submit([1], SamplingParams(5, grammar=wrong))
    with pytest.raises(ValueError, match="need a tokenizer"):
        Engine(wild, None).submit([1], SamplingParams(5, grammar=grammar.json_object()))
    while engine.busy:
        engine.step()
    assert other.finish_reason == "length"
