from itertools import chain

import pytest

from nanochat_ray.inference.text import AnswerStream
from serving.messages import merged


def say(tokenizer, tokens: list[int], *stop: str) -> tuple[list[list[tuple[str, str]]], bool]:
    """What each token completes, then what finish() adds; whether a stop string was said."""
    stream = AnswerStream(tokenizer, stop)
    return [*(stream.push(token) for token in tokens), stream.finish()], stream.stopped


def text(parts: list[list[tuple[str, str]]]) -> str:
    return "".join(text for some in parts for _, text in some)


def singles(tokenizer, text: str) -> list[int]:
    """A token for each byte."""
    return [tokenizer.ranks[bytes([byte])] for byte in text.encode()]


def call(tokenizer, code: str, output: str | None = None) -> list[int]:
    ids = [tokenizer.special("<|python_start|>"), *tokenizer.encode(code), tokenizer.special("<|python_end|>")]
    if output is not None:
        ids += [tokenizer.special("<|output_start|>"), *tokenizer.encode(output), tokenizer.special("<|output_end|>")]
    return ids


def test_parts_are_those_of_a_conversation(tokenizer):
    tokens = [*tokenizer.encode("So:"), *call(tokenizer, "6*7", "42"), *call(tokenizer, ""), *tokenizer.encode(" done")]
    parts, stopped = say(tokenizer, tokens)
    assert all(piece for some in parts for _, piece in some)
    assert merged(chain(*parts)) == [("text", "So:"), ("python", "6*7"), ("python_output", "42"), ("text", " done")]
    assert not stopped


def test_bytes_wait_for_the_rest_of_their_character(tokenizer):
    parts, _ = say(tokenizer, singles(tokenizer, "a🙂b"))
    assert parts == [[("text", "a")], [], [], [], [("text", "🙂")], [("text", "b")], []]
    broken = singles(tokenizer, "🙂")[:2]
    assert text(say(tokenizer, broken)[0]) == "\ufffd"  # bytes that never become a character
    parts, _ = say(tokenizer, [*broken, *call(tokenizer, "1")])
    assert parts[2] == [("text", "\ufffd")]  # in the part they began in
    assert text(parts) == "\ufffd1"


@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),  # whichever is said first
        ("one two three", ("one two three",), ""),
        ("one two three", ("e",), "on"),
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),  # a beginning that turns out to be none has another within it
        ("price: 5€ 6€", ("€ 6",), "price: 5"),
        ("a🙂b", ("🙂",), "a"),
    ],
)
def test_nothing_of_a_stop_string_is_shown(tokenizer, said, stop, shown):
    for tokens in (tokenizer.encode(said), singles(tokenizer, said)):
        parts, stopped = say(tokenizer, tokens, *stop)
        assert (text(parts), stopped) == (shown, True)
        assert parts[-1] == []


def test_only_what_may_be_a_stop_string_is_held_back(tokenizer):
    parts, stopped = say(tokenizer, singles(tokenizer, "x st stop"), "stops", "!")
    shown = [text([some]) for some in parts]
    assert shown == ["x", " ", "", "", "st ", "", "", "", "", "stop"]
    assert not stopped


def test_a_stop_string_is_looked_for_within_one_part(tokenizer):
    parts, stopped = say(tokenizer, [*tokenizer.encode("ST"), *call(tokenizer, "OP")], "STOP")
    assert (text(parts), stopped) == ("STOP", False)
    parts, stopped = say(tokenizer, call(tokenizer, "1+1", "2"), "+")
    assert ([part for some in parts for part in some], stopped) == ([("python", "1")], True)


@pytest.mark.parametrize("stop", [(), ("3",), ("2+2",), ("cd", "xy")])
def test_tokens_at_once_say_what_they_say_one_by_one(tokenizer, stop):
    tokens = [
        *singles(tokenizer, "a🙂b"),
        *call(tokenizer, "1+2", "3"),
        *call(tokenizer, "2+2"),
        *tokenizer.encode("c"),
    ]
    tokens += [*singles(tokenizer, "d 🙂")[:-1], *call(tokenizer, "")]
    said, stopped = say(tokenizer, tokens, *stop)
    for size in (2, 3, 7, len(tokens)):
        stream = AnswerStream(tokenizer, stop)
        parts = [stream.push(*tokens[i : i + size]) for i in range(0, len(tokens), size)]
        assert merged(chain(*parts, stream.finish())) == merged(chain(*said))
        assert stream.stopped == stopped
