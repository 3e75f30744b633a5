"""Conversations to finetune on, rendered by Ray tasks and packed into rows."""

import hashlib
import json
from collections import deque
from itertools import chain

import numpy as np
import ray

from nanochat_ray import storage
from nanochat_ray.data.loader import write_rows
from nanochat_ray.data.packing import pack_conversations, split_conversation
from nanochat_ray.data.tokenizer import Tokenizer

TASK_CONVERSATIONS = 500
PROGRESS_CONVERSATIONS = 100_000  # between lines

Piece = tuple[np.ndarray, np.ndarray]  # ids and mask of a conversation, or of a part that fits into a row


def prepare_conversations(splits: dict[str, list[dict]], tokenizer: Tokenizer, sequence_len: int) -> str:
    """Render and pack conversations into a folder of rows, unless the same ones are there; returns the folder.

    A conversation longer than a row goes on in another; no token is dropped, which manifest.json counts. One that is
    in a split several times, as the same object, is rendered once.
    """
    unique = {split: list({id(c): c for c in conversations}.values()) for split, conversations in splits.items()}
    orders = {split: _order(conversations, unique[split]) for split, conversations in splits.items()}
    contents = {split: _digest(unique[split], order) for split, order in orders.items()}
    fingerprint = storage.fingerprint(contents, tokenizer.sha, sequence_len)
    folder = storage.join(storage.home(), "conversations", f"{fingerprint[:8]}-T{sequence_len}")
    manifest_uri = storage.join(folder, "manifest.json")
    if storage.exists(manifest_uri):
        return folder
    counts = {}
    for split, order in orders.items():
        if not order:
            raise ValueError(f"no {split} conversations to finetune on")
        rendered = _render_all(split, unique[split], tokenizer, sequence_len + 1)
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


def _order(conversations: list[dict], unique: list[dict]) -> list[int]:
    """Where each conversation is among the unique ones."""
    index = {id(conversation): i for i, conversation in enumerate(unique)}
    return [index[id(conversation)] for conversation in conversations]


def _digest(unique: list[dict], order: list[int]) -> str:
    """sha256 of the conversations in order. One at a time: JSON of all of them would be gigabytes."""
    digests = [hashlib.sha256(json.dumps(c, sort_keys=True, default=str).encode()).digest() for c in unique]
    together = hashlib.sha256()
    for index in order:
        together.update(digests[index])
    return together.hexdigest()


def _render_all(split: str, conversations: list[dict], tokenizer: Tokenizer, row_len: int) -> list[list[Piece]]:
    """The pieces of each conversation. 3 bytes a token, and of the tasks no more at once than keep all CPUs busy."""
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

    for start in range(0, len(conversations), TASK_CONVERSATIONS):
        if len(running) == at_once:
            collect()
        running.append(render.remote(conversations[start : start + TASK_CONVERSATIONS], *constants))
        if len(rendered) >= next_line:
            print(f"sft: {split} {len(rendered):,}/{len(conversations):,} conversations rendered", flush=True)
            next_line += PROGRESS_CONVERSATIONS
    while running:
        collect()
    return rendered


def _render(conversations: list[dict], tokenizer: Tokenizer, row_len: int) -> tuple[np.ndarray, ...] | ValueError:
    """(ids, mask, length of each piece, pieces of each conversation), or what is wrong: raised, Ray would wrap it."""
    try:
        split = [split_conversation(*tokenizer.render_to_numpy(c), row_len) for c in conversations]
    except ValueError as error:
        return error
    ids, masks = zip(*chain.from_iterable(split), strict=True)
    return np.concatenate(ids), np.concatenate(masks), np.array([*map(len, ids)]), np.array([*map(len, split)])
