"""Packing: against a plain search over all documents, and every token accounted for."""

import numpy as np
import pytest

from nanochat_ray.data.packing import pack_conversations, pack_documents, split_conversation

BOS = 0


def random_documents(seed: int, count: int, mean: float) -> list[np.ndarray]:
    """Documents that begin with bos, of skewed lengths from 1; no two share a token besides it."""
    generator = np.random.default_rng(seed)
    lengths = 1 + generator.exponential(mean, count).astype(int)
    starts = 1 + np.cumsum(lengths) - lengths
    return [
        np.array([BOS, *range(start, start + n - 1)], dtype=np.uint32) for start, n in zip(starts, lengths, strict=True)
    ]


def best_fit_by_search(documents: list[np.ndarray], row_len: int) -> list[list[int]]:
    """The definition, looking at every document each time."""
    left, rows, row = list(documents), [], []
    while left:
        space = row_len - len(row)
        fitting = [i for i, document in enumerate(left) if len(document) <= space]
        if fitting:
            chosen = max(fitting, key=lambda i: len(left[i]))  # max and min keep the first of equals
        else:
            chosen = min(range(len(left)), key=lambda i: len(left[i]))
        row.extend(left.pop(chosen)[:space].tolist())
        if len(row) == row_len:
            rows.append(row)
            row = []
    return rows


@pytest.mark.parametrize(
    ("row_len", "count", "mean"), [(17, 300, 6), (17, 300, 40), (64, 200, 64), (9, 50, 1), (33, 3, 5)]
)
def test_best_fit(row_len, count, mean):
    documents = random_documents(row_len + count, count, mean)
    rows, counts = pack_documents(documents, row_len)
    assert rows.dtype == np.uint32
    assert rows.shape[1] == row_len
    assert rows.tolist() == best_fit_by_search(documents, row_len)
    assert (rows[:, 0] == BOS).all()
    assert rows.size == counts.used
    assert counts.used + counts.cropped + counts.dropped == sum(map(len, documents))
    assert counts.dropped < row_len
    tokens = rows[rows != BOS]
    assert len(np.unique(tokens)) == len(tokens)  # none twice


def test_documents_longer_than_a_row_and_exact_fits():
    long, exact, short = np.arange(12), np.arange(100, 105), np.arange(200, 203)
    rows, counts = pack_documents([long, exact, short], 5)
    assert rows.tolist() == [[100, 101, 102, 103, 104], [200, 201, 202, 0, 1]]
    assert (counts.used, counts.cropped, counts.dropped) == (10, 10, 0)


def test_no_rows():
    assert pack_documents([], 8)[0].shape == (0, 8)
    rows, counts = pack_documents([np.array([BOS, 1, 2], dtype=np.uint16)], 8)
    assert rows.shape == (0, 8)
    assert counts.dropped == 3
    with pytest.raises(ValueError, match="document 1 has no tokens"):
        pack_documents([np.array([BOS]), np.array([])], 8)


def test_conversations_are_never_cropped():
    conversations = [
        (document, (document != BOS).astype(np.uint8))
        for document in random_documents(3, 200, 9)
        if len(document) <= 24
    ]
    tokens, mask = pack_conversations(conversations, 24)
    assert tokens.shape == mask.shape
    assert mask.dtype == np.uint8
    flat = ",".join(map(str, tokens.reshape(-1).tolist()))
    for ids, _ in conversations:
        assert ",".join(map(str, ids.tolist())) in flat
    # besides the conversations there is only padding: bos, not learned
    assert mask.sum() == sum(int(m.sum()) for _, m in conversations)
    assert ((tokens == BOS) == (mask == 0)).all()
    assert (tokens[:, 0] == BOS).all()
    assert np.count_nonzero(tokens) == sum(len(ids) - 1 for ids, _ in conversations)
    assert tokens.size - sum(len(ids) for ids, _ in conversations) < 24 + 0.05 * tokens.size  # little is padding


@pytest.mark.parametrize("length", [1, 9, 10, 11, 18, 19, 20, 55])
def test_a_conversation_longer_than_a_row_goes_on_in_others(length):
    ids, mask = [BOS, *range(1, length)], [0, *(i // 4 % 2 for i in range(1, length))]
    pieces = split_conversation(np.array(ids), np.array(mask), 10)
    assert all(len(piece) == len(flags) <= 10 for piece, flags in pieces)
    assert all(piece[0] == BOS and flags[0] == 0 for piece, flags in pieces)
    assert [BOS] + [token for piece, _ in pieces for token in piece[1:]] == ids
    assert [0] + [flag for _, flags in pieces for flag in flags[1:]] == mask
    assert all(len(piece) > 1 for piece, _ in pieces[1:])
    assert (len(pieces) == 1) == (length <= 10)


def test_conversation_layout():
    conversations = [([7, 1, 2], [0, 1, 1]), ([7, 3, 4, 5], [0, 0, 1, 1])]
    conversations = [(np.array(ids), np.array(mask, np.uint8)) for ids, mask in conversations]
    tokens, mask = pack_conversations(conversations, 6)
    assert tokens.tolist() == [[7, 3, 4, 5, 7, 7], [7, 1, 2, 7, 7, 7]]
    assert mask.tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    with pytest.raises(ValueError, match="conversation 1 has 4 tokens, but a row holds 1 to 3: split it"):
        pack_conversations(conversations, 3)
