"""Conversations for finetuning: shuffled, split into shards, then rendered and packed into rows by Ray tasks."""

import hashlib
import json
import math
import os
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from random import Random

import numpy as np
import ray

from nanochat_ray import storage
from nanochat_ray.data.loader import write_rows
from nanochat_ray.data.packing import pack_conversations, split_conversation
from nanochat_ray.data.tokenizer import Tokenizer

SHARD_BYTES = 8 << 20  # JSON in a shard, at most; it gives about 500 rows of 2,048 tokens
PROGRESS_LINES = 20  # per split
COUNTS = ("conversations", "rows", "tokens", "dropped_tokens", "learned_tokens", "split_conversations")


class Conversations(Sequence):
    """A sequence of conversations, some of them several times.

    They are kept in a temporary file, because there may be gigabytes, and are read from it one by one."""

    def __init__(self, conversations: Iterable[dict] = ()):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.ends, self.order, self.contents = array("q", [0]), array("q"), hashlib.sha256()
        self.add(conversations)

    def add(self, conversations: Iterable[dict], times: float = 1) -> None:
        """times: copies of each. 2.5 adds each twice, and half of them, chosen by a seed, a third time."""
        first = len(self.ends) - 1
        self.file.seek(self.ends[-1])
        for conversation in conversations:
            line = json.dumps(conversation, sort_keys=True, default=str).encode()
            self.contents.update(line + b"\n")
            self.ends.append(self.ends[-1] + self.file.write(line))
        self.file.flush()
        added = range(first, len(self.ends) - 1)
        for _ in range(int(times)):
            self.order.extend(added)
        self.order.extend(sorted(Random(42).sample(added, round(times % 1 * len(added)))))

    def shuffle(self, random: Random) -> None:
        random.shuffle(self.order)

    def line(self, index: int) -> bytes:
        """The JSON of a conversation, by the order in which they were added."""
        begin, end = self.ends[index], self.ends[index + 1]
        return os.pread(self.file.fileno(), end - begin, begin)

    def fingerprint(self) -> str:
        """A hash of the contents and the order."""
        return storage.fingerprint(self.contents.hexdigest(), hashlib.sha256(self.order).hexdigest())

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [json.loads(self.line(i)) for i in self.order[index]]
        return json.loads(self.line(self.order[index]))


def prepare_conversations(splits: dict[str, Conversations], tokenizer: Tokenizer, sequence_len: int) -> str:
    """Render and pack conversations into a folder of rows, and return the folder. Finished files are reused.

    Each shard of conversations becomes one row file. A conversation longer than a row continues in another row, so no
    token is dropped; manifest.json counts them. Copies of a conversation are rendered once. The driver holds a few
    shards of text in memory, and some integers for each conversation.
    Raises ValueError for a split without conversations, and for a malformed conversation.
    """
    contents = {split: conversations.fingerprint() for split, conversations in splits.items()}
    fingerprint = storage.fingerprint(contents, tokenizer.sha, sequence_len, SHARD_BYTES)
    folder = storage.join(storage.home(), "conversations", f"{fingerprint[:8]}-T{sequence_len}")
    manifest_uri = storage.join(folder, "manifest.json")
    if storage.exists(manifest_uri):
        return folder
    if empty := [split for split, conversations in splits.items() if not conversations]:
        raise ValueError(f"no {' and no '.join(empty)} conversations to finetune on")
    counts = {}
    for split, conversations in splits.items():
        shards = _write_shards(split, conversations, storage.join(folder, split), tokenizer, sequence_len + 1)
        counts[split] = count = {name: sum(shard[name] for shard in shards) for name in COUNTS}
        print("sft: " + split + " " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in count.items()))
    storage.write_json(manifest_uri, {"tokenizer_sha256": tokenizer.sha, "sequence_len": sequence_len, **counts})
    return folder


def split_into_shards(conversations: Conversations) -> list[np.ndarray]:
    """Split the order into shards of about equal text size. All copies of a conversation are in one shard.

    So each conversation is sent to one task and rendered once. Copies keep their places in the shuffled order."""
    order, lengths = np.array(conversations.order), np.diff(np.array(conversations.ends))
    once, first = np.unique(order, return_index=True)
    once = once[np.argsort(first)]  # each conversation once, in the order of first copies
    before = np.cumsum(lengths[once]) - lengths[once]
    total = int(lengths[once].sum())
    shard_of = np.empty(len(lengths), dtype=np.int64)
    shard_of[once] = before * math.ceil(total / SHARD_BYTES) // total
    by_shard = np.argsort(shard_of[order], kind="stable")
    sizes = np.bincount(shard_of[order])
    return [order[part] for part in np.split(by_shard, np.cumsum(sizes[sizes > 0])[:-1])]


def _write_shards(
    split: str, conversations: Conversations, folder: str, tokenizer: Tokenizer, row_len: int
) -> list[dict[str, int]]:
    """Write the shards in Ray tasks, two per CPU at a time, and return the counts of each."""
    shards = split_into_shards(conversations)
    there = set(storage.listdir(folder))
    left = [number for number in range(len(shards)) if _counts_name(number) not in there]
    if there:
        print(f"sft: {split} {len(shards) - len(left):,} of {len(shards):,} shards are finished already", flush=True)
    write, constants = ray.remote(_write_shard), (folder, ray.put(tokenizer), row_len)
    at_once, running = 2 * int(ray.cluster_resources().get("CPU", 1)), deque()

    def results() -> Iterator[dict[str, int] | Exception]:
        for number in left:
            if len(running) == at_once:
                yield ray.get(running.popleft())
            once, copies = np.unique(shards[number], return_inverse=True)
            running.append(write.remote([conversations.line(index) for index in once], copies, number, *constants))
        while running:
            yield ray.get(running.popleft())

    began, tokens = time.monotonic(), 0
    for done, result in enumerate(results(), 1):
        if isinstance(result, Exception):
            raise result
        tokens += result["tokens"]
        if done * PROGRESS_LINES // len(left) > (done - 1) * PROGRESS_LINES // len(left):
            speed = tokens / (time.monotonic() - began)
            print(f"sft: {split} {done:,}/{len(left):,} shards, {tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)
    with ThreadPoolExecutor(32) as pool:  # a read from an object store is a round trip
        return list(pool.map(storage.read_json, [storage.join(folder, _counts_name(i)) for i in range(len(shards))]))


def _counts_name(number: int) -> str:
    return f"rows_{number:05d}.json"


def _write_shard(
    lines: list[bytes], copies: np.ndarray, number: int, folder: str, tokenizer: Tokenizer, row_len: int
) -> dict[str, int] | Exception:
    """Render the lines, pack them in the order of `copies` (indices of lines), write the rows and then the counts.

    Errors are returned, because Ray adds pages of its own trace to an error that a task raises."""
    try:
        rendered = [split_conversation(*tokenizer.render_to_numpy(json.loads(line)), row_len) for line in lines]
        pieces = list(chain.from_iterable(rendered[index] for index in copies))
        tokens, mask = pack_conversations(pieces, row_len)
        # Count tokens in the packed rows. Each conversation has one bos of its own; all other bos are padding.
        packed = int((tokens != tokenizer.bos_id).sum()) + len(copies)
        counts = {
            "conversations": len(copies),
            "rows": len(tokens),
            "tokens": packed,
            "dropped_tokens": sum(len(ids) for ids, _ in pieces) - (len(pieces) - len(copies)) - packed,
            "learned_tokens": int(np.count_nonzero(mask)),
            "split_conversations": sum(len(rendered[index]) > 1 for index in copies),
        }
        write_rows(storage.join(folder, f"rows_{number:05d}.arrow"), tokens, mask)
        storage.write_json(storage.join(folder, _counts_name(number)), counts)  # last: it marks the shard as finished
        return counts
    except (ValueError, OSError) as error:
        return error
