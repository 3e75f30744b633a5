"""Several sources as one sequence of rows: where each row comes from follows from its position, in closed form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanochat_ray import storage

BLOCK = 1000  # rows; every block has each source's share of them, to one row


@dataclass(frozen=True)
class Part:
    """A source of a mixture."""

    name: str  # for metrics; no other part has it
    rows: str  # folder that prepare made of this source
    weight: float  # its share of all weights is its share of the rows


def read_parts(rows: str) -> list[Part]:
    """The sources that a folder of rows mixes; of a folder with rows of its own that one, with the weight 1."""
    uri = storage.join(rows, "manifest.json")
    manifest = storage.read_json(uri) if storage.exists(uri) else {}
    own = {"name": manifest.get("source", storage.name(rows)), "rows": storage.name(rows), "weight": 1}
    beside = storage.parent(rows)
    return [
        Part(part["name"], storage.join(beside, part["rows"]), part["weight"])
        for part in manifest.get("mixture", [own])
    ]


def shares(weights: Sequence[float]) -> list[Fraction]:
    """The weights divided by their sum, exactly. Raises ValueError for a share of less than one row in a block."""
    exact = [Fraction(str(weight)) for weight in weights]
    found = [weight / sum(exact) for weight in exact]
    if min(found) < Fraction(1, BLOCK):
        raise ValueError(f"a weight of {float(min(found)):.2%} is too small: at least 0.1 %, or leave the source out")
    return found


class Mixture:
    """Rows come in blocks, each of all sources by their weights, in an order of its own that (seed, block) decides."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.shares, self.seed = shares(weights), seed

    def before_block(self, block: int) -> np.ndarray:
        """int64 (sources,): rows of each source in all blocks before this one, rounded by largest remainder.

        No count falls from one block to the next, as a share is at least one row in a block."""
        exact = [BLOCK * block * share for share in self.shares]
        counts = [math.floor(count) for count in exact]
        missing = BLOCK * block - sum(counts)
        for source in sorted(range(len(counts)), key=lambda source: counts[source] - exact[source])[:missing]:
            counts[source] += 1
        return np.array(counts, dtype=np.int64)

    def block(self, block: int) -> np.ndarray:
        """int64 (1000,): the source of each row of a block."""
        counts = self.before_block(block + 1) - self.before_block(block)
        # Four numbers, as the permutations of a source's rows are seeded by three.
        generator = np.random.Generator(np.random.PCG64([self.seed, int(block), 0, 1]))
        return generator.permutation(np.repeat(np.arange(len(counts)), counts))

    def before(self, position: int) -> np.ndarray:
        """int64 (sources,): rows of each source among the first `position` rows."""
        block, rest = divmod(position, BLOCK)
        return self.before_block(block) + np.bincount(self.block(block)[:rest], minlength=len(self.shares))

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many rows of that source come before), int64, for each position."""
        blocks, within = np.divmod(positions, BLOCK)
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            order, number, chosen = self.block(block), np.empty(BLOCK, dtype=np.int64), blocks == block
            for source, first in enumerate(self.before_block(int(block))):
                of_source = order == source
                number[of_source] = first + np.arange(of_source.sum())
            sources[chosen], numbers[chosen] = order[within[chosen]], number[within[chosen]]
        return sources, numbers
