"""The user's own conversations, from files or data sets of the Hub, and the number of copies of each."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from nanochat_ray import storage
from nanochat_ray.data import files, messages, tables
from nanochat_ray.data.files import shown
from nanochat_ray.evals.tasks.common import hub_rows

MIXTURE = "mixture"  # stands for --mixture among the sources
HUB = "hub:"
MAX_BAD = 0.01  # share of a source's conversations
MAX_SHOWN_BAD = 3  # bad conversations in a message
HUB_FORM = "hub:owner/name[:config[:split]]"


def parse(argument: str) -> tuple[str, float]:
    """Return (source, number of copies of each conversation) from SOURCE[=WEIGHT]. An existing path is a SOURCE.

    Raises ValueError if the source or the weight is not valid, and FileNotFoundError if files do not exist."""
    source, weight = argument, 1.0
    if not _exists(argument) and "=" in argument:
        before, _, after = argument.rpartition("=")
        with suppress(ValueError):  # "=" without a number after it belongs to the source
            source, weight = before, float(after)
    if not 0 < weight < math.inf or (source == MIXTURE and weight != 1):
        also = ", and the mixture has none" if source == MIXTURE else ""
        raise ValueError(f"--conversations {argument}: a weight is a number above 0{also}")
    if source.startswith(HUB):
        _hub_name(source)
    elif source != MIXTURE:
        _files(source)
    return source, weight


def conversations(source: str, datasets_dir: str | None = None) -> Iterator[dict]:
    """Yield the conversations of files, a folder or a pattern (see files.find), or of a data set of the Hub.

    Prints their formats, and the places of those that are left out. Raises OSError if something can't be read. Raises
    ValueError if a file is damaged, or if more than 1 % can't be used, with the first of these and their errors."""
    formats, bad, some = Counter(), 0, []
    for where, record in _records(source, datasets_dir):
        try:
            if isinstance(record, ValueError):
                raise record
            name, conversation = messages.read(record)
        except (ValueError, TypeError, AttributeError) as error:
            bad += 1
            if len(some) < MAX_SHOWN_BAD:
                some.append(str(error) if error is record else shown(f"{where} {error}"))
            continue
        formats[name] += 1
        yield conversation
    total = bad + formats.total()
    if not total:
        raise ValueError(f"{shown(source)} holds no conversations")
    left_out = "; ".join([*some, *(["…"] if bad > len(some) else [])])
    if bad > MAX_BAD * total:
        raise ValueError(
            f"{shown(source)}: {bad:,} of {total:,} conversations can't be used, more than {MAX_BAD:.0%}: {left_out}"
        )
    read = ", ".join(f"{count:,} in {name}'s format" for name, count in formats.items())
    print(f"conversations: {shown(source)}: {read}" + (f"; {bad:,} left out: {left_out}" if bad else ""), flush=True)


def _exists(source: str) -> bool:
    return not source.startswith(HUB) and storage.exists(storage.absolute(source))


def _records(source: str, datasets_dir: str | None) -> Iterator[tuple[str, object]]:
    """Yield (place, value) of each conversation. The place is a file and a line, or a row."""
    if source.startswith(HUB):
        rows = hub_rows(*_hub_name(source), datasets_dir, shuffled=False)
        yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
        return
    for file in _files(source):
        for where, record in tables.records(file.uri, messages.COLUMNS):
            yield f"{file.name} {where}", record


def _files(source: str) -> list[files.DataFile]:
    if not re.search(r"[,*?\[]", source) and not _exists(source):
        raise FileNotFoundError(
            f"--conversations: {shown(source)} does not exist: name a file that does, or {HUB_FORM}"
        )
    chosen = [file for found in files.find(source) for file in found.files]
    if text := [file.name for file in chosen if file.kind == "txt"]:
        raise ValueError(f"{files.some(text)}: conversations are read from jsonl, json, parquet, arrow or csv files")
    return chosen


def _hub_name(source: str) -> tuple[str, str | None, str]:
    """Return (name, config, split)."""
    name, *more = source.removeprefix(HUB).split(":")
    if name.count("/") != 1 or len(more) > 2:
        raise ValueError(f"--conversations {source}: a data set of the Hub is {HUB_FORM}")
    config, split = [*more, "", ""][:2]
    return name, config or None, split or "train"
