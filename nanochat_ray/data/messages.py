"""Converts conversations in OpenAI's, ShareGPT's and Alpaca's formats to the format that the tokenizer renders.

The model knows only a user and an assistant who take turns. Roles are mapped to them as in the chat service.
"""

import json

ROLES = {"system": "user", "developer": "user", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
KINDS: dict = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "text"}
KINDS |= {"python": "python", "python_output": "python_output"}
CALCULATORS = ("python", "calculator")  # names of the tool that is built into the model
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system")
EXPECTED = "messages, conversations, or instruction and output"
BETWEEN = "\n\n"  # between texts that are joined to one turn


def read(record) -> tuple[str, dict]:
    """(format's name, {"messages": turns}) of a row or JSON value. Raises ValueError that says what is wrong."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ValueError("is neither a list of messages nor an object with one")
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for column in ("messages", "conversations"):
        messages = record.get(column)
        if isinstance(messages, list):
            if not messages or not all(isinstance(message, dict) for message in messages):
                raise ValueError(f"has no messages in its column {column}")
            return ("ShareGPT" if messages[0].get("from") else "OpenAI"), turns(system + messages)
    instruction, output = record.get("instruction"), record.get("output")
    if isinstance(instruction, str) and isinstance(output, str):
        question = BETWEEN.join(filter(None, (instruction, record.get("input"))))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return "Alpaca", turns(system + messages)
    raise ValueError(f"has no column {EXPECTED}; its columns: {', '.join(map(str, record)) or 'none'}")


def turns(messages: list[dict]) -> dict:
    """Convert messages to alternating turns. The user's turn is first and the assistant's is last.

    Neighbouring messages of one role are joined with a blank line. Calls of the calculator and their results become
    parts of the assistant's turn. Calls of other tools become text, name(arguments), and their results the user's text.
    Raises ValueError that says which message is wrong."""
    joined: list[tuple[str, list[dict]]] = [("user", [])]
    for i, message in enumerate(messages):
        name = message.get("role") or message.get("from")
        if name not in ROLES:
            raise ValueError(f"message {i} has role {name!r}, expected system, user, assistant or tool")
        role, parts = ROLES[name], _parts(message, i)
        if not parts and role != "tool":
            raise ValueError(f"message {i} has no text")
        last = joined[-1][1]
        if role == "tool" and (unanswered := _unanswered(last)):
            last.insert(unanswered, {"type": "python_output", "text": "".join(part["text"] for part in parts)})
            continue
        role = "user" if role == "tool" else role
        if role == "user" and any(part["type"] != "text" for part in parts):
            raise ValueError(f"message {i}: only the assistant can call a tool")
        if joined[-1][0] != role:
            joined.append((role, parts))
        elif parts and last and last[-1]["type"] != "python_output":
            last += [{**parts[0], "type": "text", "text": BETWEEN}, *parts]
        else:
            last += parts
    if joined[-1][0] != "assistant":
        raise ValueError("ends before the assistant answers")
    return {"messages": [{"role": role, "content": _content(parts)} for role, parts in joined]}


def _parts(message: dict, i: int) -> list[dict]:
    """The parts of a message without empty ones. Raises ValueError if a part is not text."""
    content = message.get("nanochat_parts") or message.get("content")
    content = message.get("value") if content is None else content
    parts = []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if not isinstance(part, dict) or part.get("type") not in KINDS:
            raise ValueError(f"message {i} has a part that is not text")
        text = part.get("refusal") if part.get("text") is None else part["text"]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"message {i} has a {type(text).__name__} where text is expected")
        if text:
            parts.append({"type": KINDS[part["type"]], "text": text})
    calls = [call.get("function") for call in message.get("tool_calls") or []]
    for call in filter(None, [*calls, message.get("function_call")]):
        arguments = call.get("arguments") or ""
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        if call.get("name") in CALCULATORS:
            parts.append({"type": "python", "text": _expression(arguments)})
        else:
            parts.append({"type": "text", "text": f"{call.get('name')}({arguments})"})
    return [part | {"weight": 0} for part in parts] if message.get("weight") == 0 else parts


def _expression(arguments: str) -> str:
    """The string among a call's JSON arguments if there is exactly one, else the arguments as they are."""
    try:
        values = [value for value in json.loads(arguments).values() if isinstance(value, str)]
    except (ValueError, AttributeError):
        return arguments
    return values[0] if len(values) == 1 else arguments


def _unanswered(parts: list[dict]) -> int | None:
    """The index at which to insert the output of the first call that has none; None if all have one."""
    for i, part in enumerate(parts, 1):
        if part["type"] == "python" and (i == len(parts) or parts[i]["type"] != "python_output"):
            return i
    return None


def _content(parts: list[dict]) -> str | list[dict]:
    """The parts with neighbouring texts merged, or a string if there is only text."""
    merged: list[dict] = []
    for part in parts:
        if merged and part["type"] == "text" == merged[-1]["type"] and part.get("weight") == merged[-1].get("weight"):
            merged[-1] = merged[-1] | {"text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    plain = all(part["type"] == "text" and "weight" not in part for part in merged)
    return "".join(part["text"] for part in merged) if plain else merged
