"""Conversations to finetune on, rendered by Ray tasks and packed into rows."""

import hashlib
import json
import os
import tempfile
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from random import Random

import numpy as np
import ray

from nanochat_ray import storage
from nanochat_ray.data.loader import write_rows
from nanochat_ray.data.packing import pack_conversations, split_conversation
from nanochat_ray.data.tokenizer import Tokenizer

TASK_CONVERSATIONS = 500
PROGRESS_CONVERSATIONS = 100_000  # between lines

Piece = tuple[np.ndarray, np.ndarray]  # ids and mask of a conversation, or of a part that fits into a row


class Conversations(Sequence):
    """Conversations in an order in which some may come several times. They are in a temporary file, as there may be
    gigabytes of them, and in memory when they are asked for."""

    def __init__(self, conversations: Iterable[dict] = ()):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.ends, self.order = array("q", [0]), array("q")
        self.add(conversations)

    def add(self, conversations: Iterable[dict], times: int = 1) -> None:
        first = len(self.ends) - 1
        self.file.seek(self.ends[-1])
        for conversation in conversations:
            written = self.file.write(json.dumps(conversation, sort_keys=True, default=str).encode())
            self.ends.append(self.ends[-1] + written)
        self.file.flush()
        self.order.extend([*range(first, len(self.ends) - 1)] * times)

    def shuffle(self, random: Random) -> None:
        random.shuffle(self.order)

    def lines(self) -> Iterator[bytes]:
        """Each conversation once, as JSON, in the order in which they were added."""
        for begin, end in pairwise(self.ends):
            yield os.pread(self.file.fileno(), end - begin, begin)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self.ends[self.order[index]], self.ends[self.order[index] + 1]
        return json.loads(os.pread(self.file.fileno(), end - begin, begin))


def prepare_conversations(splits: dict[str, Conversations], tokenizer: Tokenizer, sequence_len: int) -> str:
    """Render and pack conversations into a folder of rows, unless the same ones are there; returns the folder.

    A conversation longer than a row goes on in another; no token is dropped, which manifest.json counts. One that is
    in a split several times is rendered once.
    """
    contents = {split: _digest(conversations) for split, conversations in splits.items()}
    fingerprint = storage.fingerprint(contents, tokenizer.sha, sequence_len)
    folder = storage.join(storage.home(), "conversations", f"{fingerprint[:8]}-T{sequence_len}")
    manifest_uri = storage.join(folder, "manifest.json")
    if storage.exists(manifest_uri):
        return folder
    counts = {}
    for split, conversations in splits.items():
        order = conversations.order
        if not order:
            raise ValueError(f"no {split} conversations to finetune on")
        rendered = _render_all(split, conversations, tokenizer, sequence_len + 1)
        pieces = list(chain.from_iterable(rendered[index] for index in order))
        tokens, mask = pack_conversations(pieces, sequence_len + 1)
        write_rows(storage.join(folder, split, "rows_00000.arrow"), tokens, mask)
        # Counted in the rows: a conversation has one bos, its first token, and all others that rows hold are added.
        packed = int((tokens != tokenizer.bos_id).sum()) + len(order)
        added = len(pieces) - len(order)
        counts[split] = count = {
            "conversations": len(order),
            "rows": len(tokens),
            "tokens": packed,
            "dropped_tokens": sum(len(ids) for ids, _ in pieces) - added - packed,
            "learned_tokens": int(np.count_nonzero(mask)),
            "split_conversations": sum(len(rendered[index]) > 1 for index in order),
        }
        print("sft: " + split + " " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in count.items()))
    storage.write_json(manifest_uri, {"tokenizer_sha256": tokenizer.sha, "sequence_len": sequence_len, **counts})
    return folder


def _digest(conversations: Conversations) -> str:
    """sha256 of the conversations in order."""
    digests = [hashlib.sha256(line).digest() for line in conversations.lines()]
    together = hashlib.sha256()
    for index in conversations.order:
        together.update(digests[index])
    return together.hexdigest()


def _render_all(split: str, conversations: Conversations, tokenizer: Tokenizer, row_len: int) -> list[list[Piece]]:
    """The pieces of each conversation, as they were added. 3 bytes a token, and of the tasks no more at once than keep
    all CPUs busy."""
    render, constants = ray.remote(_render), (ray.put(tokenizer), row_len)
    at_once = 2 * int(ray.cluster_resources()["CPU"])
    running, rendered, next_line = deque(), [], PROGRESS_CONVERSATIONS

    def collect() -> None:
        result = ray.get(running.popleft())
        if isinstance(result, ValueError):
            raise result
        ids, mask, lengths, counts = map(np.array, result)  # copies: Ray's own stay in its store while they are used
        ends = np.cumsum(lengths)[:-1]
        pieces = iter(zip(np.split(ids, ends), np.split(mask, ends), strict=True))
        rendered.extend([next(pieces) for _ in range(count)] for count in counts)

    lines = conversations.lines()
    while batch := list(islice(lines, TASK_CONVERSATIONS)):
        if len(running) == at_once:
            collect()
        running.append(render.remote(batch, *constants))
        if len(rendered) >= next_line:
            of = len(conversations.ends) - 1
            print(f"sft: {split} {len(rendered):,}/{of:,} conversations rendered", flush=True)
            next_line += PROGRESS_CONVERSATIONS
    while running:
        collect()
    return rendered


def _render(lines: list[bytes], tokenizer: Tokenizer, row_len: int) -> tuple[np.ndarray, ...] | ValueError:
    """(ids, mask, length of each piece, pieces of each conversation), or what is wrong: raised, Ray would wrap it."""
    try:
        split = [split_conversation(*tokenizer.render_to_numpy(json.loads(c)), row_len) for c in lines]
    except ValueError as error:
        return error
    ids, masks = zip(*chain.from_iterable(split), strict=True)
    return np.concatenate(ids), np.concatenate(masks), np.array([*map(len, ids)]), np.array([*map(len, split)])
