"""An answer's text, parts and tokens as they come, without a service."""

import random

import pytest

from nanochat_ray.data.tokenizer import Tokenizer
from serving.answers import MIN_LOGPROB, Choice, completion_logprobs, finite, token_name

REPLACED = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    return Tokenizer.load(str(golden / "nanochat_d2"))


def answered(tokenizer, tokens: list[int], stops=(), cuts=()) -> tuple[Choice, list]:
    """The choice, and the pieces it came in."""
    choice, pieces = Choice(tokenizer, stops), []
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        logprobs = [(-float(i), [(0, -1.0)]) for i in range(begin, end)]
        pieces += choice.push(tokens[begin:end], logprobs, "stop" if end == len(tokens) else None)
    return choice, pieces


def test_tokens_are_those_of_the_text_however_it_comes(tokenizer):
    for seed in range(300):
        check_one(tokenizer, random.Random(seed))


def check_one(tokenizer, rng: random.Random) -> None:
    text = "".join(rng.choice(["né ", "🦊", "one ", " two", "stop", "ST", "op", "é", "1"]) for _ in range(12))
    tokens = tokenizer.encode(text)
    whole = [i for i in range(len(tokens) + 1) if REPLACED not in tokenizer.decode(tokens[:i])]
    calls = sorted(rng.choices(whole, k=rng.randrange(4)), reverse=True)  # of the calculator, also broken ones
    for at in calls:
        tokens.insert(at, tokenizer.special(rng.choice([*tokenizer.special_tokens][5:])))
    stops = rng.choice([(), ("STop",), ("pst", "né 1"), ("e two", "🦊")])
    cuts = sorted(rng.sample(range(1, len(tokens)), min(4, len(tokens) - 1)))
    choice, pieces = answered(tokenizer, tokens, stops, cuts)
    at_once, _ = answered(tokenizer, tokens, stops)
    assert (choice.text, choice.parts, choice.tokens) == (at_once.text, at_once.parts, at_once.tokens)
    assert calls or not any(stop in choice.text for stop in stops)
    told = b"".join(token.bytes for token in choice.tokens)
    assert told.decode(errors="replace") == choice.text
    assert "".join(piece.text for piece in pieces if piece.kind == "text") == choice.text
    said = 0
    for piece in pieces:  # in a stream, tokens come with their text
        if piece.kind == "text":
            said += len(piece.text)
        assert all(token.end <= said for token in piece.tokens) and (piece.kind == "text" or not piece.tokens)
    order = [-token.logprobs[0] for token in choice.tokens]
    assert order == sorted(order)  # each has its own
    for token in choice.tokens:
        told = token.bytes.decode(errors="replace")
        assert choice.text[token.start : token.end] == told or REPLACED in told


def test_a_token_that_a_stop_string_cuts_is_told_up_to_there(tokenizer):
    tokens = tokenizer.encode("one two")
    choice, _ = answered(tokenizer, tokens, stops=("wo",))
    assert choice.text == "one t" and b"".join(t.bytes for t in choice.tokens) == b"one t"
    assert [t.end for t in choice.tokens][-1] == 5


def test_no_token_is_lost_among_the_likeliest(tokenizer):
    fox = [tokenizer.ranks[bytes([byte])] for byte in "🦊".encode()]
    choice = Choice(tokenizer, ())
    everything = [(id, -1.0) for id in range(tokenizer.vocab_size)]
    choice.push(fox, [(-2.0, everything)] * 4, "stop")
    told = completion_logprobs(tokenizer, choice.tokens)
    assert all(len(likeliest) == tokenizer.vocab_size for likeliest in told["top_logprobs"])
    assert told["tokens"] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\xa6", r"bytes:\x8a"] and choice.text == "🦊"
    assert told["text_offset"] == [0, 0, 0, 0]
    assert len({token_name(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)}) == tokenizer.vocab_size


def test_an_infinite_logprob_is_a_number_in_json():
    assert finite(float("-inf")) == finite(float("nan")) == MIN_LOGPROB and finite(None) is None
