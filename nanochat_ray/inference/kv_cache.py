"""Who holds which keys and values: pages of PAGE tokens of one layer, given to sequences in blocks, shared by prefix.

Layers of one window form a group. A block is PAGE tokens of a sequence in one group, a page for each of its layers.
As in vLLM (arXiv:2309.06180), a full block can be found by its tokens and all before them, and stays to be found until
its pages are needed; a window's layers keep only the blocks that the next token can see.
"""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from nanochat_ray.model.gpt import ROTARY_REACH, GPTConfig

PAGE = 32  # tokens
NULL_PAGE = 0  # what padding points to; never given to a sequence


class CacheFull(Exception):
    """There are too few pages left for what a sequence needs."""


@dataclass(eq=False)
class Block:
    pages: list[int]  # one a layer of its group
    references: int = 1
    key: tuple | None = None  # by which it is found: the group, and a hash of all tokens up to its end


@dataclass(eq=False)
class BlockTable:
    """What one sequence holds: per group, adjacent blocks, and which block of the sequence the first of them is."""

    blocks: list[list[Block]]
    first: list[int]
    length: int = 0  # tokens whose keys and values are stored
    room: int = 0  # tokens that the blocks have a place for
    hashes: list[bytes] = field(default_factory=list)  # of the sequence up to the end of each full block
    root: bytes = b""  # the hash that the first block's goes on from


def page_bytes(config: GPTConfig, itemsize: int) -> int:
    return 2 * PAGE * config.n_kv_head * config.head_dim * itemsize


def cache_bytes(config: GPTConfig, sequences: int, length: int, itemsize: int) -> int:
    """Memory for so many sequences of this length in every layer, whatever the windows, and the null page."""
    return (sequences * (length // PAGE + 1) * config.n_layer + 1) * page_bytes(config, itemsize)


class BlockManager:
    def __init__(self, config: GPTConfig, num_pages: int):
        """num_pages: of all layers together, the null page included. Raises ValueError for too few to hold a token."""
        self.windows = sorted(set(config.window_sizes))
        self.layers = [[i for i, w in enumerate(config.window_sizes) if w == window] for window in self.windows]
        self.num_pages = num_pages - 1
        self.capacity = self._capacity(ROTARY_REACH * config.sequence_len)
        if self.capacity == 0:
            raise ValueError(f"{num_pages} pages of {PAGE} tokens are too few for {config.n_layer} layers")
        self.free = list(range(num_pages - 1, NULL_PAGE, -1))
        self.found: dict[tuple, Block] = {}
        self.unused: OrderedDict[Block, None] = OrderedDict()  # held by nobody but found, in the order to give up
        self.unused_pages = 0

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold now."""
        return self.num_pages - len(self.free) - self.unused_pages

    def open(self, tokens: list[int], most: int | None = None, salt: str = "") -> BlockTable:
        """A table that holds the longest prefix of tokens that is known with this salt: at most `most` of them, and not
        the last one, which is always computed."""
        table = BlockTable([[] for _ in self.windows], [0 for _ in self.windows], root=_root(salt))
        limit = len(tokens) - 1 if most is None else min(most, len(tokens) - 1)
        hashes = self._hashes(tokens[: limit // PAGE * PAGE], table.root)
        length = self._longest_known(hashes)
        table.length, table.room, table.hashes = length * PAGE, length * PAGE, hashes[:length]
        for group, window in enumerate(self.windows):
            table.first[group] = _first_visible(table.length, window)
            for key in hashes[table.first[group] : length]:
                block = self.found[group, key]
                if block.references == 0:
                    del self.unused[block]
                    self.unused_pages -= len(block.pages)
                block.references += 1
                table.blocks[group].append(block)
        return table

    def reserve(self, table: BlockTable, length: int) -> bool:
        """Make room for tokens up to length; returns whether blocks were added. Raises CacheFull, having taken none."""
        if length <= table.room:
            return False
        counts = [
            -(-length // PAGE) - first - len(blocks) for first, blocks in zip(table.first, table.blocks, strict=True)
        ]
        needed = sum(max(0, count) * len(layers) for count, layers in zip(counts, self.layers, strict=True))
        if needed > len(self.free) + self.unused_pages:
            raise CacheFull
        for count, layers, blocks in zip(counts, self.layers, table.blocks, strict=True):
            blocks.extend(Block([self._take() for _ in layers]) for _ in range(count))
        table.room = -(-length // PAGE) * PAGE
        return True

    def advance(self, table: BlockTable, tokens: list[int], length: int) -> bool:
        """Note that the first `length` of the sequence's tokens are stored: full blocks can be found from now on, and
        those that no later token sees are let go. Returns whether any was."""
        before, table.length = len(table.hashes), length
        if length // PAGE == before:
            return False
        last = table.hashes[-1] if table.hashes else table.root
        table.hashes += self._hashes(tokens[before * PAGE : length // PAGE * PAGE], last)
        released = False
        for group, (window, blocks) in enumerate(zip(self.windows, table.blocks, strict=True)):
            for index in range(max(before, table.first[group]), length // PAGE):
                key, block = (group, table.hashes[index]), blocks[index - table.first[group]]
                if key not in self.found:
                    self.found[key], block.key = block, key
            gone = _first_visible(length, window) - table.first[group]
            for block in blocks[:gone]:
                self._release(block)
            del blocks[:gone]
            table.first[group] += gone
            released |= gone > 0
        return released

    def close(self, table: BlockTable) -> None:
        for blocks in table.blocks:
            for block in reversed(blocks):  # the start of a prefix is given up last: the rest is of no use without it
                self._release(block)
            blocks.clear()

    def _capacity(self, reach: int) -> int:
        """The longest sequence, in tokens, that fits when it is alone and its prompt is read in chunks of a page."""
        pages = 0
        for start in range(0, reach, PAGE):
            # Beyond its window a group gives back a block for each that it takes.
            pages += sum(len(g) for g, window in zip(self.layers, self.windows, strict=True) if start <= window + PAGE)
            if pages > self.num_pages:
                return start
        return reach

    def _release(self, block: Block) -> None:
        block.references -= 1
        if block.references == 0 and block.key is None:
            self.free += block.pages
        elif block.references == 0:
            self.unused[block] = None
            self.unused_pages += len(block.pages)

    def _take(self) -> int:
        if not self.free:
            block, _ = self.unused.popitem(last=False)
            del self.found[block.key]
            self.unused_pages -= len(block.pages)
            self.free += block.pages
        return self.free.pop()

    def _longest_known(self, hashes: list[bytes]) -> int:
        """How many blocks of a prefix can be gone on from: those that its next token sees are there in all groups."""
        known, runs = 0, [0] * len(self.windows)
        for length, key in enumerate(hashes, start=1):
            for group in range(len(runs)):
                runs[group] = runs[group] + 1 if (group, key) in self.found else 0
            if all(run >= length - _first_visible(length * PAGE, w) for run, w in zip(runs, self.windows, strict=True)):
                known = length
        return known

    def _hashes(self, tokens: list[int], last: bytes) -> list[bytes]:
        """Of each block's tokens and all before them; sha256, since a collision would show one user another's text."""
        hashes = []
        for start in range(0, len(tokens), PAGE):
            last = hashlib.sha256(last + array("i", tokens[start : start + PAGE]).tobytes()).digest()
            hashes.append(last)
        return hashes


def _root(salt: str) -> bytes:
    """What no block's hash can be but by collision: 32 bytes are hashed, fewer than a block has."""
    return hashlib.sha256(hashlib.sha256(salt.encode()).digest()).digest() if salt else b""


def _first_visible(length: int, window: int) -> int:
    """The first block that the token at position `length` sees."""
    return max(0, length - window) // PAGE


def pages_of(blocks: list[Block], layers: list[int]) -> np.ndarray:
    """(layers, blocks): the page of each block of a group in each of the group's layers."""
    return np.array([block.pages for block in blocks], dtype=np.int64).reshape(len(blocks), len(layers)).T
