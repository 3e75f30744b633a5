"""OpenAI's, ShareGPT's and Alpaca's formats, as the turns that the tokenizer renders."""

import json

import pytest

from nanochat_ray.data import messages
from nanochat_ray.data.tokenizer import Tokenizer

QUESTION = {"role": "user", "content": "What is 2+3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}


def call(name, arguments):
    return {"type": "function", "id": "call_1", "function": {"name": name, "arguments": arguments}}


def asked(name, arguments, content=None):
    return {"role": "assistant", "content": content, "tool_calls": [call(name, arguments)]}


def told(text):
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


def parts(*texts):
    return [{"type": kind, "text": text} for kind, text in texts]


@pytest.mark.parametrize(
    ("record", "name", "expected"),
    [
        ({"messages": [QUESTION, ANSWER]}, "OpenAI", [QUESTION["content"], "It is 5."]),
        ([QUESTION, ANSWER], "OpenAI", [QUESTION["content"], "It is 5."]),
        ({"messages": [ANSWER]}, "OpenAI", ["", "It is 5."]),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, QUESTION, QUESTION, ANSWER, ANSWER]},
            "OpenAI",
            ["Be brief.\n\nWhat is 2+3?\n\nWhat is 2+3?", "It is 5.\n\nIt is 5."],
        ),
        (
            {"messages": [{"role": "user", "content": parts(("input_text", "Hi "), ("text", "you"))}, ANSWER]},
            "OpenAI",
            ["Hi you", "It is 5."],
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
            "OpenAI",
            [QUESTION["content"], "No."],
        ),
        (  # a tool that says nothing, twice
            {"messages": [QUESTION, asked("add", "{}"), told(""), told(""), ANSWER]},
            "OpenAI",
            [QUESTION["content"], "add({})", "", "It is 5."],
        ),
        (  # a tool of the user's own
            {"messages": [QUESTION, asked("add", '{"a": 2, "b": 3}'), told("5"), ANSWER], "tools": []},
            "OpenAI",
            [QUESTION["content"], 'add({"a": 2, "b": 3})', "5", "It is 5."],
        ),
        (  # the model's own calculator, asked with a text before, and twice
            {
                "messages": [
                    QUESTION,
                    asked("python", '{"code": "2+3"}', "Let me see. "),
                    told("5"),
                    asked("calculator", "5*1"),
                    told(""),
                    ANSWER,
                ]
            },
            "OpenAI",
            [
                QUESTION["content"],
                parts(
                    ("text", "Let me see. "),
                    ("python", "2+3"),
                    ("python_output", "5"),
                    ("python", "5*1"),
                    ("python_output", ""),
                    ("text", "It is 5."),
                ),
            ],
        ),
        (
            {"messages": [QUESTION, {**ANSWER, "content": None, "nanochat_parts": parts(("python", "2+3"))}]},
            "OpenAI",
            [QUESTION["content"], parts(("python", "2+3"))],
        ),
        (
            {"messages": [QUESTION, {**ANSWER, "weight": 0}, QUESTION, {**ANSWER, "weight": 1}]},
            "OpenAI",
            [QUESTION["content"], [*parts(("text", "It is 5."))], QUESTION["content"], "It is 5."],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}], "system": "Be."},
            "ShareGPT",
            ["Be.\n\nHi", "Yes?"],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi", "role": None}, {"from": "gpt", "value": "Yes?"}]},
            "ShareGPT",
            ["Hi", "Yes?"],
        ),
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, "Alpaca", ["Add.\n\n2, 3", "5"]),
        ({"instruction": "Say hi.", "input": "", "output": "Hi."}, "Alpaca", ["Say hi.", "Hi."]),
        ({"instruction": "Say hi.", "input": None, "output": "Hi."}, "Alpaca", ["Say hi.", "Hi."]),
    ],
)
def test_formats_are_told_apart_and_become_turns(record, name, expected, golden):
    found, conversation = messages.read(record)
    contents = [message["content"] for message in conversation["messages"]]
    assert (found, json.loads(json.dumps(contents).replace(', "weight": 0', ""))) == (name, expected)
    assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"] * (len(contents) // 2)
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    ids, mask = tokenizer.render_to_numpy(conversation)
    learned = tokenizer.decode([token for token, flag in zip(ids, mask, strict=True) if flag])
    assert learned.count("<|assistant_end|>") == len(contents) // 2 - ('"weight": 0' in json.dumps(record))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("Hi", "neither a list of messages nor an object"),
        ({"text": "Hi", "id": 1}, "no column messages, .*; its columns: text, id"),
        ({"messages": []}, "no messages in its column messages"),
        ({"messages": ["Hi"]}, "no messages"),
        ({"messages": [QUESTION]}, "ends before the assistant answers"),
        ({"messages": [QUESTION, asked("add", "{}"), told("5")]}, "ends before the assistant answers"),
        ({"messages": [QUESTION, {"role": "robot", "content": "Hi"}]}, "message 1 has role 'robot', expected"),
        ({"messages": [QUESTION, {"role": "assistant", "content": ""}]}, "message 1 has no text"),
        ({"messages": [QUESTION, {"role": "assistant", "content": 5}]}, "message 1 has a int where text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "message 0 .* not text"),
        ({"messages": [{"role": "user", "content": parts(("python", "1"))}, ANSWER]}, "only the assistant can call"),
        ({"instruction": "Add.", "output": None}, "no column"),
    ],
)
def test_what_is_wrong_is_said(record, said):
    with pytest.raises(ValueError, match=said):
        messages.read(record)
