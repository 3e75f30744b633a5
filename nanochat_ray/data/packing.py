"""Best-fit packing of documents or conversations into rows of equal length."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLIT_ROWS = 100  # rows; a longer document is split instead of cropped, because cropping would lose most of it


@dataclass(frozen=True)
class PackCounts:
    """Where the tokens went. The sum is all tokens of the documents, plus a bos for each row split off."""

    used: int  # tokens in rows
    cropped: int  # tokens cut off the ends of documents
    dropped: int  # tokens of the last row, which could not be filled


class LengthBuckets:
    """Items in buckets by length. An integer is the bitset of filled buckets, so each lookup is one operation.

    Items longer than a row share the last bucket, shortest first. Items of equal length leave in the given order.
    """

    def __init__(self, lengths: np.ndarray, row_len: int):
        self.order = np.argsort(lengths, kind="stable").tolist()
        ends = np.searchsorted(np.minimum(np.sort(lengths), row_len + 1), np.arange(row_len + 2), side="right")
        self.ends = ends.tolist()
        self.heads = [0, *self.ends[:-1]]
        self.filled = sum(1 << length for length in range(row_len + 2) if self.heads[length] < self.ends[length])

    def pop_longest(self, space: int) -> int | None:
        """Remove the longest item of at most `space` tokens and return its index; None if there is no such item."""
        fitting = self.filled & ((2 << space) - 1)
        return self._pop(fitting.bit_length() - 1) if fitting else None

    def pop_shortest(self) -> int:
        return self._pop((self.filled & -self.filled).bit_length() - 1)

    def _pop(self, length: int) -> int:
        head = self.heads[length]
        self.heads[length] = head + 1
        if head + 1 == self.ends[length]:
            self.filled ^= 1 << length
        return self.order[head]


def pack_documents(documents: Sequence[np.ndarray], row_len: int) -> tuple[np.ndarray, PackCounts]:
    """Fill rows with documents, each a token array that begins with bos. The longest document that fits comes first.

    If none fits, the shortest is cropped to fill the row, because that loses the fewest tokens. A document longer than
    SPLIT_ROWS rows is first split into rows, each with its own bos. The last row is dropped if it can't be filled.
    Returns rows (n, row_len) in the documents' dtype, and the counts.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    if len(lengths) and lengths.min() == 0:
        raise ValueError(f"document {int(lengths.argmin())} has no tokens: it must begin with bos")
    if lengths.max(initial=0) > SPLIT_ROWS * row_len:
        documents = [piece for document in documents for piece in _split_document(document, row_len)]
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
    buckets = LengthBuckets(lengths, row_len)
    pieces, space, cropped = [], row_len, 0
    while buckets.filled:
        index = buckets.pop_longest(space)
        if index is None:
            index = buckets.pop_shortest()
            cropped += int(lengths[index]) - space
        pieces.append(documents[index][:space])
        space = space - len(pieces[-1]) or row_len
    dropped = row_len - space
    while space < row_len:
        space += len(pieces.pop())
    dtype = documents[0].dtype if len(documents) else np.uint16
    # Rows have no gaps, so concatenating the pieces gives the rows.
    rows = np.concatenate([np.empty(0, dtype), *pieces]).reshape(-1, row_len)
    return rows, PackCounts(used=rows.size, cropped=cropped, dropped=dropped)


def _split_document(ids: np.ndarray, row_len: int) -> list[np.ndarray]:
    """Split a very long document into documents of one row. Other documents stay whole."""
    if len(ids) <= SPLIT_ROWS * row_len:
        return [ids]
    starts = range(row_len, len(ids), row_len - 1)
    return [ids[:row_len], *(np.append(ids[:1], ids[start : start + row_len - 1]) for start in starts)]


def split_conversation(ids: np.ndarray, mask: np.ndarray, row_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split an (ids, mask) pair that begins with bos into pairs of at most a row.

    Each further pair begins with another bos with mask 0. So its first token is a target; the first token of a row is
    not.
    """
    pieces = [(ids[:row_len], mask[:row_len])]
    for start in range(row_len, len(ids), row_len - 1):
        end = start + row_len - 1
        pieces.append((np.append(ids[:1], ids[start:end]), np.append(mask[:1] * 0, mask[start:end])))
    return pieces


def pack_conversations(
    conversations: Sequence[tuple[np.ndarray, np.ndarray]], row_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fill rows with whole (ids, mask) pairs, the longest that fits first. Rows are padded with bos, mask 0.

    Returns tokens (n, row_len) in the ids' dtype and mask, uint8 (n, row_len). Raises ValueError if one is longer than
    a row.
    """
    lengths = np.array([len(ids) for ids, _ in conversations], dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_len:
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > row_len))[0])
        raise ValueError(f"conversation {wrong} has {lengths[wrong]} tokens, but a row holds 1 to {row_len}: split it")
    buckets = LengthBuckets(lengths, row_len)
    bos = conversations[0][0][:1] if len(conversations) else np.empty(0, np.uint16)
    ids, masks, space = [bos[:0]], [np.empty(0, np.uint8)], row_len

    def pad() -> None:
        ids.append(bos.repeat(space))
        masks.append(np.zeros(space, np.uint8))

    while buckets.filled:
        index = buckets.pop_longest(space)
        if index is None:
            pad()
            space = row_len
            continue
        ids.append(conversations[index][0])
        masks.append(conversations[index][1])
        space = space - len(ids[-1]) or row_len
    if space < row_len:
        pad()
    return np.concatenate(ids).reshape(-1, row_len), np.concatenate(masks).reshape(-1, row_len)
