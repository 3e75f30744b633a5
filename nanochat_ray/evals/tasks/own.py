"""Conversations of one's own, from a jsonl file: who the assistant is, for one."""

import json

from nanochat_ray import storage
from nanochat_ray.evals.tasks.smoltalk import checked


def conversations(uri: str) -> list[dict]:
    """A line is a list of messages, or an object with `messages`. Raises OSError, or ValueError naming the line."""
    found = []
    for number, line in enumerate(storage.read_text(storage.absolute(uri)).splitlines(), 1):
        if line.strip():
            where = f"{uri} line {number}"
            try:
                value = json.loads(line)
                messages = value["messages"] if isinstance(value, dict) else value
                found.append({"messages": checked(messages, where)})
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{where} is neither a list of messages nor an object with one") from None
    if not found:
        raise ValueError(f"{uri} holds no conversations")
    return found
