"""The block manager of the paged KV cache (arXiv:2309.06180), with prefix reuse.

A page has the keys and values of PAGE tokens in one layer. Layers with the same window form a group. A block is PAGE
tokens of a sequence in one group: one page for each layer of the group. A full block is found again by the hash of its
tokens and all tokens before them, until its pages are needed for others. In groups with a window, a sequence holds only
the blocks that its next token can see.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from nanochat_ray.model.gpt import ROTARY_REACH, GPTConfig

PAGE = 32  # tokens
NULL_PAGE = 0  # padding points to it; no sequence gets it


class CacheFull(Exception):
    """Too few pages are free for a sequence."""


@dataclass(eq=False, slots=True)
class Block:
    pages: list[int]  # one per layer of its group
    references: int = 1
    key: tuple | None = None  # of a full block: its group, and the hash of all tokens up to its end


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence: for each group adjacent blocks, and the index of the first of them."""

    blocks: list[list[Block]]
    first: list[int]
    length: int = 0  # tokens whose keys and values are stored
    room: int = 0  # tokens that fit into the blocks
    hashes: list[bytes] = field(default_factory=list)  # hash of all tokens up to the end of each full block
    root: bytes = b""  # start of the hash chain, from the salt


def page_bytes(config: GPTConfig, itemsize: int) -> int:
    return 2 * PAGE * config.n_kv_head * config.head_dim * itemsize


def cache_bytes(config: GPTConfig, sequences: int, length: int, itemsize: int) -> int:
    """Bytes for this many sequences of this length, with full windows in every layer, and the null page."""
    return (sequences * (length // PAGE + 1) * config.n_layer + 1) * page_bytes(config, itemsize)


class BlockManager:
    def __init__(self, config: GPTConfig, num_pages: int):
        """num_pages: pages of all layers, including the null page. Raises ValueError if no token fits."""
        self.windows = sorted(set(config.window_sizes))
        self.layers = [[i for i, w in enumerate(config.window_sizes) if w == window] for window in self.windows]
        self.num_layers, self.num_pages = config.n_layer, num_pages - 1
        self.capacity = self._capacity(ROTARY_REACH * config.sequence_len)
        if self.capacity == 0:
            raise ValueError(f"{num_pages} pages of {PAGE} tokens are too few for {config.n_layer} layers")
        self.free = list(range(num_pages - 1, NULL_PAGE, -1))
        self.found: dict[tuple | None, Block] = {}
        self.unused: OrderedDict[Block, None] = OrderedDict()  # full blocks without a holder, oldest first
        self.unused_pages = 0

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - len(self.free) - self.unused_pages

    def open(self, tokens: list[int], most: int | None = None, salt: str = "") -> BlockTable:
        """A table that holds the longest cached prefix of `tokens` with this salt, of at most `most` tokens.

        The last token is never taken from the cache, because its logits are needed.
        """
        table = BlockTable([[] for _ in self.windows], [0 for _ in self.windows], root=_root(salt))
        limit = len(tokens) - 1 if most is None else min(most, len(tokens) - 1)
        hashes = self._longest_known(tokens[: limit // PAGE * PAGE], table.root)
        length = len(hashes)
        table.length, table.room, table.hashes = length * PAGE, length * PAGE, hashes
        for group, window in enumerate(self.windows):
            table.first[group] = _first_visible(table.length, window)
            for key in hashes[table.first[group] :]:
                block = self.found[group, key]
                if block.references == 0:
                    del self.unused[block]
                    self.unused_pages -= len(block.pages)
                block.references += 1
                table.blocks[group].append(block)
        return table

    def reserve(self, table: BlockTable, length: int) -> bool:
        """Add blocks for tokens up to `length`; returns whether any were added. Raises CacheFull and adds none."""
        if length <= table.room:
            return False
        count = -(-(length - table.room) // PAGE)  # in every group
        if count * self.num_layers > len(self.free) + self.unused_pages:
            raise CacheFull
        for layers, blocks in zip(self.layers, table.blocks, strict=True):
            size = len(layers)
            pages = self._take(count * size)
            blocks += [Block(pages[i : i + size]) for i in range(0, len(pages), size)]
        table.room += count * PAGE
        return True

    def advance(self, table: BlockTable, tokens: list[int], length: int) -> bool:
        """Record that the first `length` tokens are stored. Returns whether blocks were released.

        Full blocks become findable. Blocks outside the window of all later tokens are released.
        """
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
            if gone := _first_visible(length, window) - table.first[group]:
                for block in blocks[:gone]:
                    self._release(block)
                del blocks[:gone]
                table.first[group] += gone
                released = True
        return released

    def close(self, table: BlockTable) -> None:
        for blocks in table.blocks:
            for block in reversed(blocks):  # evict the start of a prefix last: without it the rest is useless
                self._release(block)
            blocks.clear()

    def forget(self) -> None:
        """Clear the prefix cache, for new weights. Sequences keep their blocks."""
        for block in self.found.values():
            block.key = None
            if block.references == 0:
                self.free += block.pages
        self.found.clear()
        self.unused.clear()
        self.unused_pages = 0

    def _capacity(self, reach: int) -> int:
        """Tokens of the longest single sequence that fits, when its prompt is prefilled page by page."""
        pages = 0
        for start in range(0, reach, PAGE):
            # Beyond its window, a group releases a block for each one that it takes.
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

    def _take(self, count: int) -> list[int]:
        while len(self.free) < count:
            block, _ = self.unused.popitem(last=False)
            del self.found[block.key]
            self.unused_pages -= len(block.pages)
            self.free += block.pages
        taken = self.free[-count:]
        del self.free[-count:]
        return taken

    def _longest_known(self, tokens: list[int], root: bytes) -> list[bytes]:
        """Block hashes of the longest usable prefix: all groups have the blocks that its next token sees."""
        hashes, known, runs = [], 0, [0] * len(self.windows)
        for key in self._hashes(tokens, root):
            hashes.append(key)
            runs = [run + 1 if (group, key) in self.found else 0 for group, run in enumerate(runs)]
            seen = [len(hashes) - _first_visible(len(hashes) * PAGE, window) for window in self.windows]
            if all(map(int.__ge__, runs, seen)):
                known = len(hashes)
            elif any(
                run == 0 and _first_visible(len(tokens), window) < len(hashes)
                for run, window in zip(runs, self.windows, strict=True)
            ):
                break  # every longer prefix needs this block too
        return hashes[:known]

    def _hashes(self, tokens: list[int], last: bytes) -> Iterator[bytes]:
        """The hash of all tokens up to the end of each block. sha256, as a collision would leak text between users."""
        stored, size = array("i", tokens).tobytes(), 4 * PAGE
        for start in range(0, len(stored), size):
            last = hashlib.sha256(last + stored[start : start + size]).digest()
            yield last


def _root(salt: str) -> bytes:
    """The start of the hash chain. It hashes 32 bytes, fewer than a block has, so it equals no block's hash."""
    return hashlib.sha256(hashlib.sha256(salt.encode()).digest()).digest() if salt else b""


def _first_visible(length: int, window: int) -> int:
    """The first block that the token at position `length` sees."""
    return max(0, length - window) // PAGE


def pages_of(blocks: list[Block], layers: list[int]) -> np.ndarray:
    """int64 (layers, blocks): the page of each block of a group in each of its layers."""
    return np.array([block.pages for block in blocks], dtype=np.int64).reshape(len(blocks), len(layers)).T
