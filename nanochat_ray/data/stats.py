"""`prepare --dry-run`: reads the sources and prints documents, bytes, tokens, duplicates, lengths and examples."""

import hashlib
import heapq
from dataclasses import dataclass, field, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from nanochat_ray.data import sources
from nanochat_ray.data.files import shown
from nanochat_ray.data.mixture import shares
from nanochat_ray.data.prepare import PrepareOptions, Sample, find_sources, parse_sources
from nanochat_ray.data.shard_tasks import map_shards
from nanochat_ray.data.tokenizer import Tokenizer, train

TOKENIZER_CHARS = 5_000_000  # characters to train a tokenizer on for the estimate, if none is named
SAMPLED, SAMPLED_CHARS = 200, 20_000  # documents whose tokens are counted, and characters of each
EXAMPLES, EXAMPLE_CHARS = 5, 300  # documents to print, and characters of each
LENGTHS = 34  # bins by powers of two; the last one holds all documents above 4 GiB


@dataclass
class Counts:
    """Counts of a shard or of a whole source."""

    bytes: int = 0
    blank: int = 0  # documents without text
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(LENGTHS, dtype=np.int64))  # documents of ≤ 2^i bytes
    hashes: list[np.ndarray] = field(default_factory=list)  # uint64, one per document
    sample: list[tuple[int, str]] = field(default_factory=list)  # (hash, text) of the lowest hashes: a random choice
    unreadable: list[str] = field(default_factory=list)  # one message per damaged file

    @property
    def documents(self) -> int:
        return int(self.lengths.sum())

    def add(self, other: "Counts") -> None:
        self.bytes, self.blank = self.bytes + other.bytes, self.blank + other.blank
        self.lengths = self.lengths + other.lengths
        self.hashes += other.hashes
        self.sample = heapq.nsmallest(SAMPLED, {*self.sample, *other.sample})
        self.unreadable += other.unreadable

    def distinct(self) -> np.ndarray:
        return np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *self.hashes]))


def run(options: PrepareOptions, found: list[sources.Source] | None = None) -> dict[str, Counts]:
    """Read all documents in Ray tasks and print the statistics. Returns the counts by source.

    Raises what find_sources raises, and ValueError when too many files are unreadable."""
    texts, weights = parse_sources(options)
    found = found or find_sources(options)
    counted = {text: count(source) for text, source in zip(texts, found, strict=True)}
    tokenizer, note = _tokenizer(options, found)
    _print(counted, tokenizer, [float(share) for share in shares(weights)] if weights else None)
    if note:
        print(note)
    return counted


def count(source: sources.Source) -> Counts:
    """Count the training and the validation documents together."""
    # One file may hold both splits: count it once.
    shards = dict.fromkeys(replace(shard, part="all") for shard in (*source.train, *source.val))
    total = Counts(unreadable=list(source.unreadable))
    for _, counts in map_shards(count_shard, list(shards)):
        total.add(counts)
        sources.check_unreadable(source.files, sorted(set(total.unreadable)))
    return total


def count_shard(shard: sources.Shard) -> Counts:
    counts, reading, hashes = Counts(), sources.Reading(), []
    lowest: list[tuple[int, str]] = []  # a max-heap of the lowest hashes: heapq is a min-heap, so they are negated
    for text in sources.read_documents(shard, reading):
        data = text.encode()
        hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))
        counts.bytes += len(data)
        counts.lengths[min((len(data) - 1).bit_length(), LENGTHS - 1)] += 1
        if len(lowest) < SAMPLED or -hashes[-1] > lowest[0][0]:
            push = heapq.heappush if len(lowest) < SAMPLED else heapq.heappushpop
            push(lowest, (-hashes[-1], text[:SAMPLED_CHARS]))
    counts.sample = sorted({(-negated, text) for negated, text in lowest})
    counts.hashes = [np.array(hashes, dtype=np.uint64)]
    counts.blank, counts.unreadable = reading.blank, reading.unreadable
    return counts


def _tokenizer(options: PrepareOptions, found: list[sources.Source]) -> tuple[Tokenizer | None, str]:
    """(tokenizer, note). The options' tokenizer, or one trained on little text; None if there is too little text."""
    if options.tokenizer:
        return Tokenizer.load(options.tokenizer), ""
    samples = [Sample(source, TOKENIZER_CHARS // len(found)) for source in found]
    try:
        tokenizer = train((text for sample in samples for text in sample), options.vocab_size)
    except ValueError as error:
        return None, f"tokens are not counted: {error}"
    read = sum(sample.chars for sample in samples)
    return tokenizer, f"tokens are an estimate by a tokenizer that was trained on the first {read:,} characters"


def tokens(counts: Counts, tokenizer: Tokenizer) -> int:
    """An estimate of the documents' tokens, from the tokens per byte of the sample."""
    texts = [text for _, text in counts.sample]
    per_byte = sum(map(len, tokenizer.encode_batch(texts))) / max(1, sum(len(text.encode()) for text in texts))
    return counts.documents + round(counts.bytes * per_byte)  # each document begins with bos


def _print(counted: dict[str, Counts], tokenizer: Tokenizer | None, weights: list[float] | None) -> None:
    console = Console(highlight=False)
    columns = ("source", "documents", "bytes", "tokens, about", "exact duplicates", "without text", "share of tokens")
    table = Table(*columns, title_justify="left")
    about = [tokens(counts, tokenizer) if tokenizer else 0 for counts in counted.values()]
    by_size = [size / max(1, sum(about)) for size in about]
    for (name, counts), size, share in zip(counted.items(), about, weights or by_size, strict=True):
        twice = counts.documents - len(counts.distinct())
        numbers = (f"{counts.documents:,}", f"{counts.bytes:,}", f"{size:,}" if tokenizer else "–")
        said = f"{twice:,} ({twice / max(1, counts.documents):.1%})", f"{counts.blank:,}", f"{share:.1%}"
        table.add_row(shown(name), *numbers, *said)
    console.print(table)
    if len(counted) > 1:
        distinct = [counts.distinct() for counts in counted.values()]
        several = sum(map(len, distinct)) - len(np.unique(np.concatenate(distinct)))
        console.print(f"{several:,} documents are in more than one source")
    lengths = Table("bytes, up to", *map(shown, counted), title="lengths of documents", title_justify="left")
    all_lengths = sum(counts.lengths for counts in counted.values())
    for power in range(*(np.flatnonzero(all_lengths)[[0, -1]] + [0, 1])):
        parts = [counts.lengths[power] / max(1, counts.documents) for counts in counted.values()]
        lengths.add_row(f"{2**power:,}", *(f"{part:6.1%} {'█' * round(30 * part)}" for part in parts))
    console.print(lengths)
    for name, counts in counted.items():
        console.print(f"\n{min(EXAMPLES, len(counts.sample))} random documents of {shown(name)}:", markup=False)
        for _, text in counts.sample[:EXAMPLES]:
            cut = " …" if len(text) > EXAMPLE_CHARS else ""
            console.print("- " + " ".join(text[:EXAMPLE_CHARS].split()) + cut, markup=False)
        for line in sorted(set(counts.unreadable)):
            console.print(line, markup=False)
