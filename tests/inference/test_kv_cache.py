import random

import pytest

from nanochat_ray.inference.kv_cache import NULL_PAGE, PAGE, BlockManager, BlockTable, CacheFull, page_bytes
from nanochat_ray.model.gpt import GPTConfig

# Groups: one layer with a window of 128 tokens, two with 200, which is no whole number of pages.
CONFIG = GPTConfig(200, 300, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")


class Life:
    """A sequence that only goes through the cache."""

    def __init__(self, manager: BlockManager, tokens: list[int]):
        self.tokens, self.table = tokens, manager.open(tokens)
        self.prefixes = [0]  # of the first n tokens, a number that tells them apart
        for token in tokens:
            self.prefixes.append(hash((self.prefixes[-1], token)))


def store(life: Life, manager: BlockManager, memory: dict, length: int) -> None:
    """Write the next tokens into the pages, as a forward does, then tell the manager."""
    manager.reserve(life.table, length)
    for group, blocks in enumerate(life.table.blocks):
        for position in range(life.table.length, length):
            block = blocks[position // PAGE - life.table.first[group]]
            for layer, page in zip(manager.layers[group], block.pages, strict=True):
                memory[page, position % PAGE] = layer, life.prefixes[position + 1]
    manager.advance(life.table, life.tokens, length)


def check_content(life: Life, manager: BlockManager, memory: dict) -> None:
    """Whatever the next token sees is there, written for this very prefix; blocks that none sees are not held."""
    length = life.table.length
    for group, (window, blocks) in enumerate(zip(manager.windows, life.table.blocks, strict=True)):
        first = life.table.first[group]
        assert max(0, length // PAGE * PAGE - window) // PAGE <= first <= max(0, length - window) // PAGE
        assert (first + len(blocks)) * PAGE == life.table.room
        for position in range(max(0, length - window), length):
            for layer, page in zip(manager.layers[group], blocks[position // PAGE - first].pages, strict=True):
                assert memory[page, position % PAGE] == (layer, life.prefixes[position + 1])


def check_books(manager: BlockManager, lives: list[Life]) -> None:
    """Every page is free, or of one block, which is held as often as it says or else can be found."""
    holders = {}
    for life in lives:
        for blocks in life.table.blocks:
            for block in blocks:
                holders[block] = holders.get(block, 0) + 1
    assert all(block.references == count for block, count in holders.items())
    assert not holders.keys() & manager.unused.keys()
    held = [page for block in holders for page in block.pages]
    unused = [page for block in manager.unused for page in block.pages]
    assert sorted([*manager.free, *held, *unused]) == list(range(1, manager.num_pages + 1))
    assert NULL_PAGE not in manager.free
    assert (manager.used_pages, manager.unused_pages) == (len(held), len(unused))
    assert all(manager.found[block.key] is block and block.references == 0 for block in manager.unused)
    assert all(block.key == key for key, block in manager.found.items())
    assert manager.found.keys() == {b.key for b in [*holders, *manager.unused] if b.key is not None}


@pytest.mark.parametrize("seed", range(4))
def test_pages_are_owned_once_and_hold_what_they_are_found_by(seed):
    """Random sequences over shared texts open, grow and close in a cache that is too small for them."""
    choose = random.Random(seed)
    texts = [[choose.randrange(300) for _ in range(500)] for _ in range(3)]
    manager, memory, lives = BlockManager(CONFIG, 61), {}, []
    hits = full = 0
    for _ in range(500):
        if choose.random() < 0.2:
            prompt = choose.choice(texts)[: choose.choice([1, 32, 33, 64, 96, choose.randrange(1, 400)])]
            if choose.random() < 0.5:  # the same beginning, another end
                prompt = [*prompt[: choose.randrange(len(prompt) + 1)], choose.randrange(300)]
            life = Life(manager, prompt + [choose.randrange(2) for _ in range(80)])
            assert life.table.length % PAGE == 0
            hits += life.table.length > 0
            lives.append(life)
            check_content(life, manager, memory)
        elif lives:
            life = choose.choice(lives)
            free, length = manager.used_pages, life.table.length
            try:
                store(life, manager, memory, min(length + choose.choice([1, 5, 32, 70]), len(life.tokens)))
                check_content(life, manager, memory)
            except CacheFull:
                full += 1
                assert (manager.used_pages, life.table.length) == (free, length)  # nothing was taken
            if full % 3 == 2 or life.table.length == len(life.tokens):
                manager.close(life.table)
                lives.remove(life)
                full += 1
        check_books(manager, lives)
    for life in lives:
        check_content(life, manager, memory)  # what the others did has not changed it
    assert min(hits, full) > 10
    while lives:
        manager.close(lives.pop().table)
    check_books(manager, [])
    assert manager.used_pages == 0


def fill(manager: BlockManager, tokens: list[int], chunk: int = PAGE) -> BlockTable:
    table = manager.open(tokens)
    for length in [*range(table.length + chunk, len(tokens), chunk), len(tokens)]:
        manager.reserve(table, length)
        manager.advance(table, tokens, length)
    return table


def test_a_prefix_is_found_in_whole_blocks_short_of_the_last_token():
    manager = BlockManager(CONFIG, 200)
    tokens = list(range(100))
    manager.close(fill(manager, tokens))
    for prompt, length in (
        (tokens, 96),
        (tokens[:97], 96),
        (tokens[:96], 64),  # the last token is always computed: its logits are wanted
        (tokens[:65], 64),
        (tokens[:32], 0),
        (tokens[:1], 0),
        ([*tokens[:70], 299], 64),
        ([299, *tokens], 0),
        ([*tokens[:31], 299, *tokens[32:]], 0),
        (tokens[32:], 0),  # the same tokens at other positions
    ):
        table = manager.open(prompt)
        assert table.length == table.room == length
        manager.close(table)
    assert manager.used_pages == 0


def test_a_long_prefix_is_found_by_what_its_windows_kept():
    manager = BlockManager(CONFIG, 24)  # 3 layers: not even 8 whole blocks
    tokens = [i * 7 % 300 for i in range(400)]
    table = fill(manager, tokens)
    assert [len(blocks) for blocks in table.blocks] == [5, 8]  # 256 … 400 and 160 … 400, in pages of 32
    manager.close(table)
    table = manager.open([*tokens, 1, 2, 3])
    assert (table.length, table.first) == (384, [8, 5])
    manager.close(table)
    assert manager.open(tokens[:100]).length == 0  # its pages went to what came after


def test_two_who_hold_the_same_prefix_share_its_pages():
    manager = BlockManager(CONFIG, 200)
    tokens = list(range(120))
    one = fill(manager, tokens)
    alone = manager.used_pages
    two = fill(manager, [*tokens[:96], *range(200, 224)])
    assert manager.used_pages == alone + 3  # three layers' pages for what differs
    manager.close(one)
    assert manager.used_pages == alone
    manager.close(two)
    assert manager.used_pages == 0


def test_the_end_of_a_prefix_is_given_up_before_its_start():
    config = GPTConfig(512, 300, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    manager = BlockManager(config, 1 + 10)
    tokens = list(range(129))
    manager.close(fill(manager, tokens))  # of its 5 pages 4 are full and found
    for pages, kept in ((6, 128), (7, 96), (9, 32), (10, 0)):
        table = BlockTable([[]], [0])
        manager.reserve(table, pages * PAGE)
        manager.close(table)
        found = manager.open(tokens)
        assert found.length == kept
        manager.close(found)


@pytest.mark.parametrize("num_pages", [4, 7, 10, 17, 20, 23, 30, 100])
@pytest.mark.parametrize("pattern", ["S", "SL", "L"])
def test_a_sequence_alone_has_room_up_to_the_capacity(num_pages, pattern):
    config = GPTConfig(200, 300, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern=pattern)
    manager = BlockManager(config, num_pages)
    assert PAGE <= manager.capacity <= 2000
    tokens = list(range(manager.capacity))
    for chunk in (PAGE, 1):
        manager.close(fill(manager, [chunk, *tokens[1:]], chunk))
    if manager.capacity < 2000:
        with pytest.raises(CacheFull):
            manager.reserve(manager.open([1]), manager.capacity + PAGE)


def test_sizes():
    assert page_bytes(CONFIG, 2) == 2 * 32 * 1 * 16 * 2  # keys and values, tokens, heads, channels, bytes
    with pytest.raises(ValueError, match="3 pages of 32 tokens are too few for 3 layers"):
        BlockManager(CONFIG, 3)
