"""Loader: the same rows for every world size, permutations, positions, files that are wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_ray.data.loader import DeviceLoader, Loader, Rows, evaluation_batches, write_rows

T, FILES = 6, (7, 0, 11, 5)
N = sum(FILES)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Row i of all files holds 10·i, 10·i + 1, …"""
    whole = (10 * np.arange(N)[:, None] + np.arange(T + 1)).astype(np.uint16)
    for i, part in enumerate(np.split(whole, np.cumsum(FILES)[:-1])):
        write_rows(tmp_path / f"rows_{i:05d}.arrow", part)
    (tmp_path / "rows_00000.json").write_text("{}")  # what else is in the folder is left alone
    return tmp_path


def row_ids(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0] // 10).tolist()


def test_rows_are_mapped_not_read(folder):
    rows = Rows(str(folder))
    assert len(rows) == N
    picked = rows[[22, 0, 7, 6, 17]]
    assert picked.dtype == np.int64
    assert (picked == 10 * np.array([[22], [0], [7], [6], [17]]) + np.arange(T + 1)).all()
    assert not any(tokens.flags.owndata or tokens.flags.writeable for tokens in rows.tokens)
    if Path("/proc/self/maps").exists():
        assert str(folder / "rows_00002.arrow") in Path("/proc/self/maps").read_text()
    with pytest.raises(IndexError, match="not all in 0 … 22"):
        rows[[3, 23]]


@pytest.mark.parametrize("position", [0, 12, 18, 240])
def test_every_world_size_sees_the_same_rows(folder, position):
    rows = Rows(str(folder))
    alone = Loader(rows, 12).step(position)
    assert alone[0].dtype == alone[1].dtype == torch.int64
    assert alone[0].shape == alone[1].shape == (12, T)
    for world_size in (2, 3, 5, 7, 12):
        ranks = [Loader(rows, 12, rank, world_size).step(position) for rank in range(world_size)]
        assert torch.equal(torch.cat([idx for idx, _ in ranks]), alone[0])
        assert torch.equal(torch.cat([targets for _, targets in ranks]), alone[1])
        shares = [len(idx) for idx, _ in ranks]
        assert max(shares) - min(shares) == (12 % world_size > 0)
    assert torch.equal(alone[0] + 1, alone[1])


def test_epochs_are_different_permutations(folder):
    loader = Loader(Rows(str(folder)), 10)  # 23 rows: steps straddle epochs
    seen = [row for step in range(23) for row in row_ids(loader.step(10 * step)[0])]
    epochs = [tuple(seen[N * epoch : N * (epoch + 1)]) for epoch in range(10)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(epochs)) == 10
    assert tuple(range(N)) not in epochs
    assert loader.epoch(46) == 2.0
    other = Loader(Rows(str(folder)), N, seed=7)
    assert row_ids(other.step(0)[0]) != list(epochs[0])
    assert row_ids(Loader(Rows(str(folder)), 3 * N).step(0)[0]) == seen[: 3 * N]  # a step longer than an epoch


def test_a_position_is_all_there_is_to_resume(folder):
    going = Loader(Rows(str(folder)), 4)
    steps = [going.step(position)[0] for position in range(0, 80, 4)]
    for position in (0, 20, 44, 76):
        assert torch.equal(Loader(Rows(str(folder)), 4).step(position)[0], steps[position // 4])
    assert torch.equal(going.step(8)[0], steps[2])  # and back again


def test_mask_hides_targets(tmp_path):
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    mask = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]])
    write_rows(tmp_path / "rows_00000.arrow", tokens, mask)
    rows = Rows(str(tmp_path))
    assert rows.tokens[0].dtype == np.uint16
    idx, targets = rows.batch([1, 0])
    assert idx.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3]]
    assert targets.tolist() == [[-1, -1, -1, 9], [1, 2, -1, 4]]


def test_large_vocabulary(tmp_path):
    write_rows(tmp_path / "rows_00000.arrow", np.array([[1, 100_000]]))
    rows = Rows(str(tmp_path))
    assert rows.tokens[0].dtype == np.uint32
    assert rows[[0]].tolist() == [[1, 100_000]]


def test_evaluation_is_the_same_rows_every_time(folder):
    rows = Rows(str(folder))
    alone = [row_ids(idx) for idx, _ in evaluation_batches(rows, 10, 4)]
    assert [len(batch) for batch in alone] == [4, 4, 2]
    assert alone == [row_ids(idx) for idx, _ in evaluation_batches(Rows(str(folder)), 10, 4)]
    ranks = [row for rank in range(3) for idx, _ in evaluation_batches(rows, 10, 4, rank, 3) for row in row_ids(idx)]
    assert len(set(ranks)) == 10
    assert set(ranks) == {row for batch in alone for row in batch}
    assert sum(len(idx) for idx, _ in evaluation_batches(rows, 999, 8)) == N


def test_what_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="3 rows per step are too few: 4 workers need"):
        Loader(Rows(str(folder)), 3, 0, 4)
    with pytest.raises(FileNotFoundError, match=r"no rows_\*\.arrow"):
        Rows(str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    write_rows(empty / "rows_00000.arrow", np.empty((0, 5), dtype=np.uint16))
    with pytest.raises(ValueError, match="has no rows"):
        Rows(str(empty))
    write_rows(empty / "rows_00001.arrow", np.ones((1, 6), dtype=np.uint16))
    with pytest.raises(ValueError, match="differ in row length"):
        Rows(str(empty))
    with open(folder / "rows_00002.arrow", "r+b") as f:
        f.truncate(100)
    with pytest.raises(ValueError, match=r"rows_00002\.arrow is not a file of rows"):
        Rows(str(folder))


@pytest.mark.parametrize("masked", [False, True])
def test_rows_read_ahead_are_those_of_the_loader(folder, masked):
    """As on a GPU: a thread reads the next step into one of two buffers. The position may jump."""
    if masked:
        for i, tokens in enumerate(Rows(str(folder)).tokens):
            write_rows(folder / f"rows_{i:05d}.arrow", np.array(tokens), tokens % 3 > 0)
    loader = Loader(Rows(str(folder)), 4, 1, 2)
    ahead, plain = (DeviceLoader(loader, torch.device("cpu"), ahead) for ahead in (True, False))
    buffers = set()
    for position in (0, 4, 8, 12, 16, 4, 8):
        idx, targets, learned = ahead.step(position)
        assert ahead.next[0] == position + 4  # is being read already
        buffers |= {buffer.data_ptr() for buffer in ahead.buffers}
        expected = plain.step(position)
        assert idx.dtype == targets.dtype == torch.int64
        assert torch.equal(idx, expected[0]) and torch.equal(targets, expected[1])
        assert learned == expected[2] == ((targets >= 0).sum() if masked else targets.numel())
    ahead.next[1].result()
    assert len(ahead.buffers) == 2 and ahead.buffers[0].dtype == torch.int32
