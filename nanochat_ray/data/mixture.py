"""Mixes several sources into one sequence of rows. The source of a row has a closed form in its position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanochat_ray import storage

BLOCK = 1000  # rows; each block holds each source's share of rows, rounded to one row


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    name: str  # unique; metrics use it
    rows: str  # folder of the source's rows
    weight: float  # the share of rows is weight / sum of weights


def read_parts(rows: str) -> list[Part]:
    """The sources that a folder of rows mixes. A folder with its own rows is one source with weight 1."""
    uri = storage.join(rows, "manifest.json")
    manifest = storage.read_json(uri) if storage.exists(uri) else {}
    own = {"name": manifest.get("source", storage.name(rows)), "rows": storage.name(rows), "weight": 1}
    beside = storage.parent(rows)
    return [
        Part(part["name"], storage.join(beside, part["rows"]), part["weight"])
        for part in manifest.get("mixture", [own])
    ]


def shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights divided by their sum, exactly. Raises ValueError if a share is below one row per block."""
    exact = [Fraction(str(weight)) for weight in weights]
    found = [weight / sum(exact) for weight in exact]
    if min(found) < Fraction(1, BLOCK):
        raise ValueError(f"a weight of {float(min(found)):.2%} is too small: give 0.1 % or more, or omit the source")
    return found


class Mixture:
    """Rows come in blocks. Each block has rows of all sources by their weights, in an order seeded by (seed, block)."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.shares, self.seed = shares(weights), seed

    def before_block(self, block: int) -> np.ndarray:
        """Rows of each source in all blocks before this one, int64 (sources,), rounded by largest remainder.

        Counts never decrease from one block to the next, because each share is at least one row per block."""
        exact = [BLOCK * block * share for share in self.shares]
        counts = [math.floor(count) for count in exact]
        missing = BLOCK * block - sum(counts)
        for source in sorted(range(len(counts)), key=lambda source: counts[source] - exact[source])[:missing]:
            counts[source] += 1
        return np.array(counts, dtype=np.int64)

    def block(self, block: int) -> np.ndarray:
        """The source of each row of a block, int64 (BLOCK,)."""
        counts = self.before_block(block + 1) - self.before_block(block)
        # Seed with four numbers, so that it differs from the permutations of rows, which are seeded with three.
        generator = np.random.Generator(np.random.PCG64([self.seed, int(block), 0, 1]))
        return generator.permutation(np.repeat(np.arange(len(counts)), counts))

    def before(self, position: int) -> np.ndarray:
        """Rows of each source among the first `position` rows, int64 (sources,)."""
        block, rest = divmod(position, BLOCK)
        return self.before_block(block) + np.bincount(self.block(block)[:rest], minlength=len(self.shares))

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of that source's rows before it) of each position, two int64 arrays."""
        blocks, within = np.divmod(positions, BLOCK)
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            order, number, chosen = self.block(block), np.empty(BLOCK, dtype=np.int64), blocks == block
            for source, first in enumerate(self.before_block(int(block))):
                of_source = order == source
                number[of_source] = first + np.arange(of_source.sum())
            sources[chosen], numbers[chosen] = order[within[chosen]], number[within[chosen]]
        return sources, numbers
