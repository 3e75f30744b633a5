"""Mixtures: positions in closed form against a count, rows for every world size, weights on the command line."""

from fractions import Fraction

import numpy as np
import pytest

from nanochat_ray.data import prepare, sources
from nanochat_ray.data.loader import Loader, Rows, write_rows
from nanochat_ray.data.mixture import BLOCK, Mixture, read_parts, shares
from nanochat_ray.data.prepare import PrepareOptions

T = 6


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Two sources of 23 and 400 rows. Row i of source s holds 1000·s + i in its first place."""
    for source, size in enumerate((23, 400)):
        rows = np.full((size, T + 1), 1000 * source) + np.arange(size)[:, None]
        write_rows(tmp_path / f"{source}" / "rows_00000.arrow", rows[: size // 2].astype(np.uint16))
        write_rows(tmp_path / f"{source}" / "rows_00001.arrow", rows[size // 2 :].astype(np.uint16))
    return [str(tmp_path / "0"), str(tmp_path / "1")]


@pytest.mark.parametrize(
    "weights",
    [[1], [0.7, 0.3], [1, 1, 1], [0.001, 0.999], [5, 0.1234567, 2, 3], [0.0015, 0.0015, 0.997], [*range(1, 40)]],
)
def test_a_position_counts_its_rows_in_closed_form(weights):
    mixture, total = Mixture(weights, seed=7), sum(Fraction(str(w)) for w in weights)
    exact = [Fraction(str(weight)) / total for weight in weights]
    counted = np.zeros(len(weights), dtype=np.int64)
    for block in range(12):
        assert (mixture.before(BLOCK * block) == counted).all()
        assert all(abs(count - BLOCK * block * share) < 1 for count, share in zip(counted, exact, strict=True))
        order = mixture.block(block)
        sources_, numbers = mixture.find(BLOCK * block + np.arange(BLOCK))
        assert (sources_ == order).all()
        for position, (source, number) in enumerate(zip(sources_, numbers, strict=True)):
            assert number == counted[source]
            counted[source] += 1
            if position % 111 == 0:
                assert (mixture.before(BLOCK * block + position + 1) == counted).all()
    far = 10**9 + 37  # at once, however far it is
    assert mixture.before(far).sum() == far
    assert all(abs(n - far * share) < BLOCK for n, share in zip(mixture.before(far), exact, strict=True))
    source, number = mixture.find(np.array([far]))
    assert mixture.before(far)[source] == number and mixture.before(far + 1)[source] == number + 1
    orders = [tuple(mixture.block(block)) for block in (0, 1, 2)] + [tuple(Mixture(weights, seed=8).block(0))]
    assert len(set(orders)) == (1 if len(weights) == 1 else 4)


def test_shares_are_exact_and_no_block_goes_without_one():
    assert shares([0.1, 0.2]) == [Fraction(1, 3), Fraction(2, 3)]
    assert (Mixture([0.001, 0.999], 1).before_block(3) == [3, 2997]).all()
    with pytest.raises(ValueError, match=r"0\.09% is too small"):
        shares([0.0009, 0.9991])


def test_every_world_size_sees_the_same_rows_of_a_mixture(folders):
    rows, weights = Rows(*folders), [0.25, 0.75]
    assert rows.sizes.tolist() == [23, 400]
    alone = Loader(rows, 12, seed=3, weights=weights)
    seen = np.concatenate([alone.indices(position) for position in range(0, 2400, 12)])
    for world_size in (2, 3, 5, 12):
        for position in (0, 996, 2388):  # the second step straddles blocks
            ranks = [Loader(rows, 12, rank, world_size, 3, weights).indices(position) for rank in range(world_size)]
            assert (np.concatenate(ranks) == seen[position : position + 12]).all()
    tokens = rows[seen][:, 0]
    assert ((tokens >= 1000) == (seen >= 23)).all()  # the first source's rows come first
    small, large = tokens[tokens < 1000], tokens[tokens >= 1000] - 1000
    assert (len(small), len(large)) == tuple(Mixture(weights, 3).before(2400))
    epochs = [tuple(small[i : i + 23]) for i in range(0, len(small) - 23, 23)]  # each its own permutation
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs) and len(set(epochs)) == len(epochs)
    assert sorted(large[:400]) == list(range(400))


def test_one_source_has_the_order_it_always_had(folders):
    loader = Loader(Rows(folders[0]), 10, seed=1337)
    seen = np.concatenate([loader.indices(position) for position in range(0, 3000, 10)])
    epochs = [np.random.Generator(np.random.PCG64([1337, epoch])).permutation(23) for epoch in range(131)]
    assert (seen == np.concatenate(epochs)[:3000]).all()


def test_a_weight_is_what_follows_the_name_but_in_the_name_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "year=2024").mkdir()
    monkeypatch.chdir(tmp_path)
    parse = sources.parse
    assert parse("climbmix=0.7") == ("climbmix", 0.7) and parse("pydocs=3") == ("pydocs", 3.0)
    assert parse("year=2024") == ("year=2024", None) and parse(f"{tmp_path}/year=2024") == (
        f"{tmp_path}/year=2024",
        None,
    )
    assert parse("year=2024=.25") == ("year=2024", 0.25)
    with pytest.raises(FileNotFoundError, match="neither year=2025 nor year exists: name a folder or file that does"):
        parse("year=2025")
    assert parse("data/*.jsonl=2") == ("data/*.jsonl", 2.0)
    assert parse("data/lang=en/*.jsonl") == ("data/lang=en/*.jsonl", None)
    assert parse("a=b") == ("a=b", None) and parse("climbmix") == ("climbmix", None)
    with pytest.raises(ValueError, match="above 0"):
        parse("pydocs=0")


def test_without_weights_shares_are_by_size_and_a_small_source_has_a_row_in_each_block(nanochat_ray_home, capsys):
    def prepared(folder: str, rows: int) -> prepare.Prepared:
        counts = dict.fromkeys(prepare.COUNTS, rows)
        manifest = {"source": "text", "source_fingerprint": folder, "tokenizer_sha256": "0" * 64, "tokenizer": ""}
        manifest |= {"vocab_size": 300, "sequence_len": 8, "splits": {"train": counts, "val": counts}}
        return prepare.Prepared(str(nanochat_ray_home / "rows" / folder), "", manifest)

    mixed = prepare._mix([prepared("a", 3_000_000), prepared("b", 1_000_000), prepared("c", 10)], None)
    parts = read_parts(mixed.rows)
    assert [part.name for part in parts] == ["text-1", "text-2", "text-3"]
    assert [float(share) for share in shares([part.weight for part in parts])] == pytest.approx(
        [0.749, 0.25, 0.001], abs=0.001
    )
    assert mixed.manifest["splits"]["train"]["rows"] == 4_000_010
    with pytest.raises(ValueError, match="two of the sources have the same text"):
        prepare._mix([prepared("a", 5), prepared("a", 5)], [0.5, 0.5])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "names no source"),
        (["pydocs", "pydocs=0.5"], "pydocs is named twice"),
        (["pydocs", "climbmix=0.5"], "pydocs has no weight"),
        (["pydocs=0.0001", "climbmix=1"], "too small"),
    ],
)
def test_weights_that_mean_nothing_are_one_line(given, said):
    with pytest.raises(ValueError, match=said):
        prepare.parse_sources(PrepareOptions(given))
