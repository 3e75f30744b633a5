"""The Ray Data job of `nanochat-ray prepare`: reads documents, tokenizes, packs, writes row files and a manifest."""

import errno
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, islice

import numpy as np
import ray

from nanochat_ray import machine, storage
from nanochat_ray.data import files, sources
from nanochat_ray.data.cleaning import cleaned
from nanochat_ray.data.loader import row_files, write_rows
from nanochat_ray.data.mixture import BLOCK, shares
from nanochat_ray.data.packing import pack_documents
from nanochat_ray.data.shard_tasks import map_shards
from nanochat_ray.data.tokenizer import Tokenizer, compression, pieces, train

CHUNK_CHARS = 200_000  # characters that one thread encodes at a time
CLIMBMIX_MAX_TOKENS = 60_000_000  # upper bound of the tokens in a climbmix shard
TASK_MEMORY, MEMORY_PER_BYTE = 350e6, 4  # bytes per task, plus this many per byte of its compressed file
MAX_PROGRESS_LINES = 1_000
PROGRESS_CHARS = 250_000_000  # characters that the tokenizer reads between two lines of progress
COMPRESSION_SAMPLE = 1_000  # validation documents
COUNTS = ("rows", "tokens", "cropped_tokens", "dropped_tokens", "documents", "bytes", "blank")  # of a shard


@dataclass
class PrepareOptions:
    source: list[str] = field(default_factory=lambda: ["pydocs"])
    """One source, or several to mix. A source is pydocs, climbmix, a data set of the Hub (hub:OWNER/NAME, then :CONFIG
    and :SPLIT if it has several), or a path, pattern or URI of folders or files (parquet, arrow, jsonl, json, csv,
    txt). Commas join several paths to one source. climbmix=0.7 notes=0.3 sets each source's share of the training
    tokens. Without weights, shares follow the sources' sizes."""
    text_column: str | None = None
    """The column with the text. Default: the first of text, content, document and body that exists. body.text selects
    a field of a struct, parts[] the strings of a list."""
    shards: int = 8
    """How many files of climbmix, or of each data set of the Hub, to train on."""
    tokens: int | None = None
    """Training tokens wanted. If --shards files give fewer (of a mixture: fewer than the source's share), take more
    files."""
    vocab_size: int = 32768
    """Tokens in the vocabulary, special tokens included."""
    sequence_len: int = 2048
    """T: a row holds T+1 tokens."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use. Default: train one on the sources."""
    clean: list[str] = field(default_factory=list)
    """Steps that drop documents. gopher, repetition, c4 and fineweb apply the quality rules of that name, language
    drops documents in other languages than --languages, decontaminate drops documents that share 13 words in a row
    with --tests, exact and near drop duplicates. The kept documents are written to files; manifest.json beside them
    counts what each step dropped, with samples."""
    languages: list[str] | None = None
    """For --clean language: the languages to keep, by their codes of ISO 639, such as en de."""
    tests: str | None = None
    """Folder of jsonl files for --clean decontaminate, such as a CORE bundle."""
    max_chars: int = 2_000_000_000
    """Most characters to train the tokenizer on. Several sources give equal parts of them."""
    dry_run: bool = False
    """Only read the sources and print documents, bytes, tokens, exact duplicates, lengths, and five documents of each.
    Don't make a tokenizer or rows."""

    def __post_init__(self):
        self.source = [self.source] if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Prepared:
    rows: str  # folder with train/, val/ and manifest.json; the folder of a mixture has only the manifest
    tokenizer: str  # folder
    manifest: dict


@dataclass(frozen=True)
class Job:
    """Make one file of rows from one shard of documents."""

    shard: sources.Shard
    split: str
    uri: str  # the row file; a .json file beside it has the counts

    @property
    def counts_uri(self) -> str:
        return storage.join(storage.parent(self.uri), storage.name(self.uri).removesuffix(".arrow") + ".json")


def parse_sources(options: PrepareOptions) -> tuple[list[str], list[float] | None]:
    """(sources, weights). Weights are None if no source has one. Raises ValueError if only some have one, or if a
    source is named twice."""
    texts, weights = zip(*map(sources.parse, options.source), strict=True) if options.source else ((), ())
    if not texts:
        raise ValueError("--source names no source: give pydocs, climbmix, or a folder")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"the source {twice[0]} is named twice: give it one weight")
    if not any(weights):
        return list(texts), None
    if None in weights:
        without = texts[weights.index(None)]
        raise ValueError(f"the source {without} has no weight, but others have: give all sources a weight, or none")
    shares(weights)
    return list(texts), list(weights)


def find_sources(options: PrepareOptions) -> list[sources.Source]:
    """Find or download the sources' files: the first --shards of climbmix and the Hub. `run` gets more if needed."""
    texts, weights = parse_sources(options)
    found = {}
    wanted = zip(texts, _wanted_tokens(options, weights), strict=True)
    # Paths first, so that a wrong path fails before anything is downloaded.
    for text, tokens in sorted(wanted, key=lambda pair: sources.is_named(pair[0])):
        if text == "climbmix" and tokens:  # check the disk before the first byte
            sources.check_climbmix_room(max(options.shards, min(tokens // CLIMBMIX_MAX_TOKENS, sources.CLIMBMIX_LAST)))
        found[text] = sources.resolve(text, text_column=options.text_column, shards=options.shards)
    return [found[text] for text in texts]


def _wanted_tokens(options: PrepareOptions, weights: list[float] | None) -> list[int | None]:
    """Training tokens wanted from each source. Without weights, one source may have to give all."""
    if not options.tokens or not weights:
        return [options.tokens] * len(options.source)
    return [math.ceil(options.tokens * share) for share in shares(weights)]


def run(options: PrepareOptions, found: list[sources.Source] | None = None) -> Prepared:
    """Prepare rows. Rows of an earlier run with the same inputs are reused, and only unfinished shards are processed.

    Each source has its own folder of rows. A mixture is a manifest that names these folders and their weights.

    found: the sources, if the caller has found them already.
    Raises ValueError if a split has too little text for one row, and the errors of find_sources and the tokenizer.
    """
    if options.sequence_len < 1:
        raise ValueError(f"sequence_len {options.sequence_len}: a row needs at least one token to predict")
    texts, weights = parse_sources(options)
    found = [_clean(source, options) for source in found or find_sources(options)]
    tokenizer_uri, tokenizer = find_or_train_tokenizer(options, found)
    prepared = []
    for text, source, tokens in zip(texts, found, _wanted_tokens(options, weights), strict=True):
        shards = options.shards
        if len(texts) > 1:
            print(f"prepare: {source.name}", flush=True)
            tokens = tokens if weights or source.most else None
        while True:
            one = _prepare(source, tokenizer_uri, tokenizer, options.sequence_len)
            more = _shards_for_tokens(source, shards, tokens, one)
            if more <= shards:
                break
            source = _clean(sources.resolve(text, text_column=options.text_column, shards=more), options)
            shards = more
        prepared.append(one)
    return prepared[0] if len(prepared) == 1 else _mix(prepared, weights)


def _clean(source: sources.Source, options: PrepareOptions) -> sources.Source:
    return cleaned(source, options.clean, options.tests, options.languages) if options.clean else source


def _mix(prepared: list[Prepared], weights: list[float] | None) -> Prepared:
    """Write the manifest of a mixture of prepared sources."""
    manifests = [one.manifest for one in prepared]
    sizes = [manifest["splits"]["train"]["rows"] for manifest in manifests]
    if weights is None:  # shares by size, but a very small source gets at least one row per block
        weights = [max(size, math.ceil(sum(sizes) / (0.9 * BLOCK))) for size in sizes]
    names = [manifest["source"] for manifest in manifests]
    names = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    folders = [storage.name(one.rows) for one in prepared]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two of the sources have the same text, {folders[0]}: name it once, with one weight")
    parts = [
        {"name": name, "rows": folder, "weight": weight}
        for name, folder, weight in zip(names, folders, weights, strict=True)
    ]
    same = {key: manifests[0][key] for key in ("tokenizer_sha256", "vocab_size", "sequence_len", "tokenizer")}
    contents = [(manifest["source_fingerprint"], weight) for manifest, weight in zip(manifests, weights, strict=True)]
    splits = {
        split: {key: sum(manifest["splits"][split][key] for manifest in manifests) for key in COUNTS}
        for split in ("train", "val")
    }
    manifest = {"source_fingerprint": storage.fingerprint(contents), "mixture": parts, **same, "splits": splits}
    # Source names have no "+", so joined names stay unique.
    name = "+".join(names) if len("+".join(names)) < 100 else f"{names[0][:90]}+{len(names) - 1}"
    name += f"-{same['tokenizer_sha256'][:8]}-T{same['sequence_len']}-{manifest['source_fingerprint'][:8]}"
    rows_uri = storage.join(storage.parent(prepared[0].rows), name)
    # Write it even if it exists: pretrain takes the rows with the newest manifest.
    storage.write_json(storage.join(rows_uri, "manifest.json"), manifest)
    listed = ", ".join(f"{float(share):.1%} {name}" for share, name in zip(shares(weights), names, strict=True))
    print(f"prepare: a mixture of {listed}", flush=True)
    return Prepared(rows_uri, prepared[0].tokenizer, manifest)


def _prepare(source: sources.Source, tokenizer_uri: str, tokenizer: Tokenizer, sequence_len: int) -> Prepared:
    inputs = {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer_sha256": tokenizer.sha,
        "vocab_size": tokenizer.vocab_size,
        "sequence_len": sequence_len,
    }
    name = f"{source.name}-{tokenizer.sha[:8]}-T{sequence_len}-{source.fingerprint[:8]}"
    rows_uri = storage.join(storage.home(), "rows", name)
    manifest_uri = storage.join(rows_uri, "manifest.json")
    if storage.exists(manifest_uri):
        print(f"prepare: nothing to do, {rows_uri} is complete", flush=True)
        return Prepared(rows_uri, tokenizer_uri, storage.read_json(manifest_uri))
    jobs = plan_jobs(source, rows_uri)
    left = unfinished(jobs)
    if len(left) == len(jobs):
        _report_compression(tokenizer, source)
    if left:
        _run_jobs(left, len(jobs), tokenizer, sequence_len + 1, source)
    splits = _collect(jobs, rows_uri, sequence_len + 1, source)
    manifest = {**inputs, "tokenizer": tokenizer_uri, "splits": splits}
    storage.write_json(manifest_uri, manifest)
    for split, total in splits.items():
        print(
            f"prepare: {split} {total['rows']:,} rows, {total['tokens']:,} tokens "
            f"({total['cropped_tokens'] / (total['tokens'] + total['cropped_tokens']):.1%} cropped)"
            + (f", {total['blank']:,} documents without text" if total["blank"] else ""),
            flush=True,
        )
    if source.empty:
        print(f"prepare: {len(source.empty):,} of {source.files:,} files are empty: {files.some(source.empty)}")
    return Prepared(rows_uri, tokenizer_uri, manifest)


def _shards_for_tokens(source: sources.Source, shards: int, wanted: int | None, prepared: Prepared) -> int:
    """How many shards give the wanted tokens, at the tokens per shard of those prepared. At most all that exist."""
    tokens = prepared.manifest["splits"]["train"]["rows"] * prepared.manifest["sequence_len"]
    if not wanted or tokens >= wanted:
        return shards
    more = min(math.ceil(shards * wanted / tokens), source.most or shards)
    then = f"taking {more} {source.name} shards" if more > shards else f"each is read {wanted / tokens:.1f} times"
    print(f"prepare: there are {tokens:,} tokens, {wanted:,} are wanted: {then}", flush=True)
    return more


def find_or_train_tokenizer(options: PrepareOptions, found: list[sources.Source]) -> tuple[str, Tokenizer]:
    """(folder, tokenizer): the tokenizer that the options name, or one trained on the sources now or in an earlier run.

    The name of a trained tokenizer depends only on the shards that were read. If max_chars end within the 8th shard,
    the same tokenizer serves any number of shards from 8 on. Several sources give equal numbers of characters, whatever
    their weights and order, so other weights need no new tokenizer and no new rows.
    """
    if options.tokenizer:
        uri = storage.absolute(options.tokenizer)
        return uri, Tokenizer.load(uri)
    folder = storage.join(storage.home(), "tokenizers")
    found = sorted(found, key=lambda source: source.fingerprint)
    name, shards = "+".join(source.name for source in found)[:100], [s for source in found for s in source.train]
    first = list(accumulate((shard.fingerprint for shard in shards), storage.fingerprint))  # 1 shard, 2, …
    inputs = [*((shards, options.max_chars) for shards in first), (first[-1], "all")]
    if len(found) > 1:
        inputs = [(first[-1], options.max_chars, len(found))]
    names = [f"{name}-{options.vocab_size}-{storage.fingerprint(*read)[:8]}" for read in inputs]
    present = set(storage.listdir(folder))
    for name in names:
        if name in present and storage.exists(storage.join(folder, name, "tokenizer.json")):
            return storage.join(folder, name), Tokenizer.load(storage.join(folder, name))
    start = time.monotonic()
    samples = [Sample(source, options.max_chars // len(found)) for source in found]
    tokenizer = train(chain.from_iterable(samples), options.vocab_size)
    is_cut = len(found) == 1 and samples[0].chars >= options.max_chars
    uri = storage.join(folder, names[samples[0].shards - 1 if is_cut else -1])
    tokenizer.save(uri)
    print(
        f"prepare: tokenizer of {tokenizer.vocab_size:,} tokens in {time.monotonic() - start:.1f} s: {uri}", flush=True
    )
    return uri, tokenizer


class Sample:
    """The first max_chars characters of a source, as documents. Counts the shards and characters that were read."""

    def __init__(self, source: sources.Source, max_chars: int):
        self.source, self.max_chars, self.shards, self.chars = source, max_chars, 0, 0

    def __iter__(self) -> Iterator[str]:
        reading = sources.Reading(unreadable=list(self.source.unreadable))
        for shard in self.source.train:
            self.shards += 1
            sources.check_unreadable(self.source.files, reading.unreadable)
            for text in sources.read_documents(shard, reading):
                yield text[: self.max_chars - self.chars]
                if (self.chars + len(text)) // PROGRESS_CHARS > self.chars // PROGRESS_CHARS:
                    print(f"prepare: tokenizer has read {self.chars:,} of {self.max_chars:,} characters", flush=True)
                self.chars += len(text)
                if self.chars >= self.max_chars:
                    return


def _report_compression(tokenizer: Tokenizer, source: sources.Source) -> None:
    texts = sources.read_documents(source.val[0], sources.Reading())
    ratios = compression(tokenizer, list(islice(texts, COMPRESSION_SAMPLE)))
    listed = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    note = "" if len(ratios) > 1 else " (not compared: gpt2 and cl100k_base are not in tiktoken's cache)"
    print(f"prepare: bytes per token on validation text: {listed}{note}", flush=True)


def plan_jobs(source: sources.Source, rows_uri: str) -> list[Job]:
    """One job per shard, in order. If another folder already has the rows of a shard, the job names that file."""
    there = _prepared_shards(rows_uri)
    return [
        Job(shard, split, there.get((split, shard.fingerprint), storage.join(rows_uri, split, f"rows_{i:05d}.arrow")))
        for split, shards in (("train", source.train), ("val", source.val))
        for i, shard in enumerate(shards)
    ]


def _prepared_shards(rows_uri: str) -> dict[tuple[str, str], str]:
    """{(split, shard fingerprint): row file} of complete folders with the same source name, tokenizer and length."""
    place, kind = storage.parent(rows_uri), storage.name(rows_uri).rpartition("-")[0]
    found = {}
    for name in storage.listdir(place):
        manifest_uri = storage.join(place, name, "manifest.json")
        if name.rpartition("-")[0] == kind and storage.exists(manifest_uri):
            for split, counts in storage.read_json(manifest_uri)["splits"].items():
                files = row_files(storage.join(place, name, split))
                found |= {(split, shard): file for shard, file in zip(counts["shards"], files, strict=True)}
    return found


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs without counts. It lists each folder once, because each request to an object store is a round trip."""
    folders = {storage.parent(job.uri) for job in jobs}
    finished = {storage.join(folder, name) for folder in folders for name in storage.listdir(folder)}
    return [job for job in jobs if job.counts_uri not in finished]


def _run_jobs(jobs: list[Job], num_all: int, tokenizer: Tokenizer, row_len: int, source: sources.Source) -> None:
    """Run the jobs in Ray tasks. A task writes the rows itself and returns only counts, to spare the object store."""
    cpus = ray.cluster_resources().get("CPU", 1)  # 1 if an autoscaler has not started any node yet
    start, tokens, unreadable = time.monotonic(), 0, set(source.unreadable)
    # Memory limits how many tasks a node runs at once. Ask for no more than the largest node has, or no task would ever
    # run. Nodes that an autoscaler has not started yet are unknown.
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    largest = max((node.get("memory", 0) for node in alive), default=0)
    memory = min(TASK_MEMORY + MEMORY_PER_BYTE * max(job.shard.size for job in jobs), largest)

    def write(item: tuple[Job, int]) -> dict:
        job, left = item
        # The last shards use the cores that have no shard. Twice as many threads as cores, because some end early.
        num_threads = math.ceil(2 * cpus / left)
        try:
            return write_shard(job, tokenizer=tokenizer, row_len=row_len, num_threads=num_threads)
        except OSError as error:
            full = f" ({storage.disk(job.uri)})" if error.errno == errno.ENOSPC else ""
            raise OSError(f"{error}{full}") from None

    results = map_shards(write, [(job, len(jobs) - index) for index, job in enumerate(jobs)], memory=memory)
    for done, (_, counts) in enumerate(results, num_all - len(jobs) + 1):
        unreadable.update(counts.get("unreadable", []))
        sources.check_unreadable(source.files, sorted(unreadable))
        tokens += counts["tokens"] + counts["cropped_tokens"] + counts["dropped_tokens"]
        speed = tokens / (time.monotonic() - start)
        if done % math.ceil(num_all / MAX_PROGRESS_LINES) == 0 or done == num_all:
            print(f"prepare: {done}/{num_all} shards, {tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)


def write_shard(job: Job, *, tokenizer: Tokenizer, row_len: int, num_threads: int) -> dict:
    """Tokenize and pack one shard into its row file. Holds all tokens of the shard in memory, but not all its text."""
    documents, num_bytes, reading = [], 0, sources.Reading()
    bos = np.array([tokenizer.bos_id], dtype=tokenizer.dtype)
    for encoded, size in _encode(_chunks(sources.read_documents(job.shard, reading)), tokenizer, num_threads):
        for ids, begins in encoded:
            if begins:
                documents.append([bos])
            documents[-1].append(ids)
        num_bytes += size
    documents = [np.concatenate(parts) for parts in documents]
    rows, tokens = pack_documents(documents, row_len)
    write_rows(job.uri, rows)
    counts = {
        "rows": len(rows),
        "tokens": tokens.used,
        "cropped_tokens": tokens.cropped,
        "dropped_tokens": tokens.dropped,
        "documents": len(documents),
        "bytes": num_bytes,
    }
    counts |= {key: value for key, value in asdict(reading).items() if value}
    storage.write_json(job.counts_uri, counts)  # last: the counts mark the shard as finished
    return counts


def _chunks(texts: Iterator[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (text, whether it begins a document): several short documents, or a part of a very long one."""
    chunk, chars = [], 0
    for text in texts:
        for number, part in enumerate(pieces(text)):
            chunk.append((part, number == 0))
            chars += len(part)
            if chars >= CHUNK_CHARS:
                yield chunk
                chunk, chars = [], 0
    if chunk:
        yield chunk


def _encode(
    chunks: Iterator[list[tuple[str, bool]]], tokenizer: Tokenizer, num_threads: int
) -> Iterator[tuple[list[tuple[np.ndarray, bool]], int]]:
    """For each chunk, in order: (token arrays of its texts, bytes of UTF-8). Encodes in threads."""

    def encode(chunk: list[tuple[str, bool]]) -> tuple[list[tuple[np.ndarray, bool]], int]:
        encoded = [(tokenizer.encode_to_numpy(text).astype(tokenizer.dtype), begins) for text, begins in chunk]
        return encoded, sum(len(text.encode()) for text, _ in chunk)

    num_threads = min(num_threads, machine.available_cpus())
    waiting = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * num_threads:  # limits what is read ahead; Executor.map would read the whole shard
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _collect(jobs: list[Job], rows_uri: str, row_len: int, source: sources.Source) -> dict:
    """{split: summed counts, rows per file, and fingerprints of the shards in that order}.

    Prints which files are damaged. Raises ValueError if those are too many, or if a split has no rows."""

    def named(uri: str) -> str:
        folder = storage.parent(storage.parent(uri))
        return storage.name(uri) if folder == rows_uri else f"{storage.name(folder)}/{storage.name(uri)}"

    splits, unreadable = {}, set(source.unreadable)
    for split in ("train", "val"):
        of_split = [job for job in jobs if job.split == split]
        with ThreadPoolExecutor(32) as pool:
            read = pool.map(storage.read_json, [job.counts_uri for job in of_split])
            counts = {named(job.uri): counts for job, counts in zip(of_split, read, strict=True)}
        total = {key: sum(c.get(key, 0) for c in counts.values()) for key in COUNTS}
        unreadable |= {message for c in counts.values() for message in c.get("unreadable", [])}
        if not total["rows"]:
            raise ValueError(
                f"the {split} split of {source.name} has {total['dropped_tokens']} tokens, fewer than a row of "
                f"{row_len}: use more text or a smaller sequence_len"
            )
        rows = {file: c["rows"] for file, c in counts.items()}
        splits[split] = {**total, "files": rows, "shards": [job.shard.fingerprint for job in of_split]}
    sources.check_unreadable(source.files, sorted(unreadable))
    if unreadable:
        print(f"prepare: {len(unreadable):,} of {source.files:,} files are damaged; what could be read is used:")
        print("\n".join(f"  {message}" for message in sorted(unreadable)), flush=True)
    return splits
