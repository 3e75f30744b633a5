"""Conversations of one's own, from files: who the assistant is, for one."""

from collections.abc import Iterator

from nanochat_ray.data import files, tables
from nanochat_ray.data.files import DataFile, shown
from nanochat_ray.evals.tasks.smoltalk import checked

# What others call the roles and fields of a message.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


def conversations(source: str) -> list[dict]:
    """The conversations of files, a folder of them or a pattern: see files.find.

    A row of a table has a list of messages as its column `messages`, else `conversations`. A value of JSON is a list
    of messages, or an object that has one. Raises OSError, or ValueError naming the file and the line or row."""
    chosen = [file for found in files.find(source) for file in found.files]
    column = _column(chosen)
    found = []
    for file in chosen:
        for where, _, messages in _json_messages(file) if file.kind == "json" else tables.values(file.uri, column):
            where = f"{shown(file.uri)} {where}"
            try:
                found.append({"messages": checked([_message(message) for message in messages], where)})
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"{where} is neither a list of messages nor an object with one") from None
    if not found:
        raise ValueError(f"{shown(source)} holds no conversations")
    return found


def _column(chosen: list[DataFile]) -> str | None:
    """The column of messages of all tables that are not JSON. Raises ValueError naming a file without it."""
    schemas = {file.uri: tables.schema(file.uri) for file in chosen if file.kind != "json"}
    columns = [name for name in tables.MESSAGE_COLUMNS if any(name in schema for schema in schemas.values())]
    column = columns[0] if columns else tables.MESSAGE_COLUMNS[0]
    for uri, schema in schemas.items():
        if column not in schema or not tables.is_list(schema[column]):
            listed = ", ".join(f"{name} ({kind})" for name, kind in schema.items()) or "none"
            names = " or ".join(columns or tables.MESSAGE_COLUMNS)
            raise ValueError(f"{shown(uri)} has no column {names} with lists of messages; its columns: {listed}")
    return column


def _json_messages(file: DataFile) -> Iterator[tuple[str, str, list]]:
    """As tables.values. A file that is one array is a list of conversations, unless it is one of messages."""
    values = list(tables.json_values(file.uri, split_arrays=False))
    if len(values) == 1 and isinstance(values[0][1], list) and not _is_message(values[0][1][:1]):
        values = [(values[0][0], value) for value in values[0][1]]
    for number, value in values:
        if isinstance(value, dict):
            value = next((value[name] for name in tables.MESSAGE_COLUMNS if name in value), None)
        yield f"line {number}", "", value


def _is_message(first: list) -> bool:
    return bool(first) and isinstance(first[0], dict) and ("role" in first[0] or "from" in first[0])


def _message(message: dict) -> dict:
    """{"from": "human", "value": …} is a spelling of {"role": "user", "content": …}."""
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message["value"]}
    return {"role": ROLES.get(message["role"], message["role"]), "content": message["content"]}
