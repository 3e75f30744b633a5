"""The Ray Data job of `nanochat-ray prepare`: read documents, tokenize, pack, write row files and a manifest."""

import errno
import math
import pickle
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, islice

import numpy as np
import ray
import ray.data

from nanochat_ray import machine, storage
from nanochat_ray.data import files, sources
from nanochat_ray.data.cleaning import cleaned
from nanochat_ray.data.loader import row_files, write_rows
from nanochat_ray.data.mixture import BLOCK, shares
from nanochat_ray.data.packing import pack_documents
from nanochat_ray.data.tokenizer import Tokenizer, compression, pieces, train

CHUNK_CHARS = 200_000  # encoded by one thread at a time: long beside a switch of threads, short beside a shard
MOST_TOKENS = 60_000_000  # in the rows of a climbmix shard, if none were cropped
TASK_MEMORY, MEMORY_PER_BYTE = 350e6, 4  # bytes of a task, and for each byte of its file, which is compressed
MAX_TASKS = 2_000  # of a job, or 8 a CPU
MAX_LINES = 1_000  # of progress
PROGRESS_CHARS = 250_000_000  # of a tokenizer's sample, between lines
COMPRESSION_SAMPLE = 1_000  # validation documents
COUNTS = ("rows", "tokens", "cropped_tokens", "dropped_tokens", "documents", "bytes", "blank")  # of a shard


@dataclass
class PrepareOptions:
    source: list[str] = field(default_factory=lambda: ["pydocs"])
    """One source, or several to mix: pydocs, climbmix, hub:OWNER/NAME of the Hub (with :CONFIG and :SPLIT where it has
    several), or paths, patterns or URIs of folders or files (parquet, arrow, jsonl, json, csv, txt), with commas
    between those that are one source. climbmix=0.7 notes=0.3 gives each its share of the training tokens; without
    weights all text counts the same, so that each has a share by its size."""
    text_column: str | None = None
    """The column with the text; by default text, content, document or body, the first that there is. body.text is a
    field of a struct, parts[] the strings of a list."""
    shards: int = 8
    """How many files of climbmix, or of each data set of the Hub, to train on."""
    tokens: int | None = None
    """Take more of those files, if --shards of them give fewer training tokens than this, or than the source's weight
    in it."""
    vocab_size: int = 32768
    """Tokens in the vocabulary, special tokens included."""
    sequence_len: int = 2048
    """T: a row holds T+1 tokens."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use; without it one is trained on the sources."""
    clean: list[str] = field(default_factory=list)
    """Steps that drop documents: gopher, repetition, c4 and fineweb are rules of those names, decontaminate drops what
    shares 13 words in a row with --tests, exact and near drop duplicates. What is left is kept as files; what each step
    dropped, with samples, is beside them in manifest.json."""
    tests: str | None = None
    """Folder of jsonl files, such as that of a CORE bundle, for --clean decontaminate."""
    max_chars: int = 2_000_000_000
    """At most this many characters are read to train the tokenizer, as many of each source."""
    dry_run: bool = False
    """Read the sources and say what they hold: documents, bytes, tokens, exact duplicates, lengths, and five documents
    of each. Neither a tokenizer nor rows are made."""

    def __post_init__(self):
        self.source = [self.source] if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Prepared:
    rows: str  # folder with train/, val/ and manifest.json; of a mixture with the manifest alone
    tokenizer: str  # folder
    manifest: dict


@dataclass(frozen=True)
class Job:
    """One shard of documents to one file of rows."""

    shard: sources.Shard
    split: str
    uri: str  # of the row file; its counts are kept beside it, as .json

    @property
    def counts_uri(self) -> str:
        return storage.join(storage.parent(self.uri), storage.name(self.uri).removesuffix(".arrow") + ".json")


def parse_sources(options: PrepareOptions) -> tuple[list[str], list[float] | None]:
    """(sources, their weights, or None when none has one). Raises ValueError when some have, or one comes twice."""
    texts, weights = zip(*map(sources.parse, options.source), strict=True) if options.source else ((), ())
    if not texts:
        raise ValueError("--source names no source: give pydocs, climbmix, or a folder")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"the source {twice[0]} is named twice: give it one weight")
    if not any(weights):
        return list(texts), None
    if None in weights:
        without = texts[weights.index(None)]
        raise ValueError(f"the source {without} has no weight, but others have: give all one, or none")
    shares(weights)
    return list(texts), list(weights)


def find_sources(options: PrepareOptions) -> list[sources.Source]:
    """Those --shards that a tokenizer is trained on, of climbmix; `run` gets more if their tokens are too few."""
    texts, weights = parse_sources(options)
    found = {}
    wanted = zip(texts, _wanted_tokens(options, weights), strict=True)
    # Paths first: a wrong one is an error before anything is downloaded.
    for text, tokens in sorted(wanted, key=lambda pair: sources.is_named(pair[0])):
        if text == "climbmix" and tokens:  # check the disk before the first byte
            sources.check_climbmix_room(max(options.shards, min(tokens // MOST_TOKENS, sources.CLIMBMIX_LAST)))
        found[text] = sources.resolve(text, text_column=options.text_column, shards=options.shards)
    return [found[text] for text in texts]


def _wanted_tokens(options: PrepareOptions, weights: list[float] | None) -> list[int | None]:
    """Of each source. Without weights those that have more files may have to give them all."""
    if not options.tokens or not weights:
        return [options.tokens] * len(options.source)
    return [math.ceil(options.tokens * share) for share in shares(weights)]


def run(options: PrepareOptions, found: list[sources.Source] | None = None) -> Prepared:
    """Prepare rows, or return those that the same inputs gave before. Unfinished shards alone are done again.

    Each source has rows of its own, and a mixture of several is a manifest that names them and their weights.

    found: the sources of the options, by one who has looked for them already.
    Raises ValueError when a split has too little text for one row, and what sources and the tokenizer raise.
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
    return cleaned(source, options.clean, options.tests) if options.clean else source


def _mix(prepared: list[Prepared], weights: list[float] | None) -> Prepared:
    """Write the manifest of a mixture of sources that are prepared."""
    manifests = [one.manifest for one in prepared]
    sizes = [manifest["splits"]["train"]["rows"] for manifest in manifests]
    if weights is None:  # by size, and of a very small source enough for a row in each block
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
    # No source has a + in its name.
    name = "+".join(names) if len("+".join(names)) < 100 else f"{names[0][:90]}+{len(names) - 1}"
    name += f"-{same['tokenizer_sha256'][:8]}-T{same['sequence_len']}-{manifest['source_fingerprint'][:8]}"
    rows_uri = storage.join(storage.parent(prepared[0].rows), name)
    storage.write_json(storage.join(rows_uri, "manifest.json"), manifest)  # again, as pretrain takes the newest
    of_each = ", ".join(f"{float(share):.1%} {name}" for share, name in zip(shares(weights), names, strict=True))
    print(f"prepare: a mixture of {of_each}", flush=True)
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
    """How many shards give the wanted tokens, by what so many that are prepared gave, as far as there are."""
    tokens = prepared.manifest["splits"]["train"]["rows"] * prepared.manifest["sequence_len"]
    if not wanted or tokens >= wanted:
        return shards
    more = min(math.ceil(shards * wanted / tokens), source.most or shards)
    then = f"{more} {source.name} shards" if more > shards else f"each is read {wanted / tokens:.1f} times"
    print(f"prepare: {tokens:,} tokens for {wanted:,}: {then}", flush=True)
    return more


def find_or_train_tokenizer(options: PrepareOptions, found: list[sources.Source]) -> tuple[str, Tokenizer]:
    """(folder, tokenizer): the one the options name, or the one trained on these sources, now or before.

    It is named by the shards that were read: where max_chars end in the 8th, it serves any number from 8 on. Of several
    sources it reads as much of each, whatever their weights and their order, so that other weights need no new rows.
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
    """The source's first max_chars characters, by document. Counts the shards and characters that were read."""

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
    note = "" if len(ratios) > 1 else " (gpt2 and cl100k_base are not in tiktoken's cache, so not compared)"
    print(f"prepare: bytes per token on validation text: {listed}{note}", flush=True)


def plan_jobs(source: sources.Source, rows_uri: str) -> list[Job]:
    """A file of rows for each shard, in order; where another folder has the shard already, that folder's file."""
    there = _prepared_shards(rows_uri)
    return [
        Job(shard, split, there.get((split, shard.fingerprint), storage.join(rows_uri, split, f"rows_{i:05d}.arrow")))
        for split, shards in (("train", source.train), ("val", source.val))
        for i, shard in enumerate(shards)
    ]


def _prepared_shards(rows_uri: str) -> dict[tuple[str, str], str]:
    """(split, fingerprint of a shard) -> its row file, of complete folders that differ in which shards they have."""
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
    """Those without counts. One listing of a folder, as each look at an object store takes a round trip."""
    folders = {storage.parent(job.uri) for job in jobs}
    finished = {storage.join(folder, name) for folder in folders for name in storage.listdir(folder)}
    return [job for job in jobs if job.counts_uri not in finished]


def _run_jobs(jobs: list[Job], num_all: int, tokenizer: Tokenizer, row_len: int, source: sources.Source) -> None:
    """One Ray task a shard or a few. Counts come back: tokens go from the task to the file, past the object store."""
    cpus = ray.cluster_resources().get("CPU", 1)  # none yet where nodes come when tasks wait for them
    constants = {"tokenizer": tokenizer, "row_len": row_len, "cpus": cpus}
    start, tokens, unreadable = time.monotonic(), 0, set(source.unreadable)
    # A task a shard, but of very many shards a task has several: each task costs the driver some milliseconds.
    # Pickled, because a file's name may be no UTF-8, which Arrow's strings have to be.
    items = [{"job": pickle.dumps(job), "left": len(jobs) - index} for index, job in enumerate(jobs)]
    blocks = ray.data.from_items(items, override_num_blocks=min(len(jobs), max(MAX_TASKS, int(8 * cpus))))
    # A node runs as many tasks at once as its memory holds. One that asked for more than any node has would never run,
    # and nodes that an autoscaler has yet to bring may not say how much they have.
    there = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    most = max((node.get("memory", 0) for node in there), default=0)
    memory = min(TASK_MEMORY + MEMORY_PER_BYTE * max(job.shard.size for job in jobs), most)
    results = blocks.map(_run_job, fn_kwargs=constants, num_cpus=1, memory=memory).iter_rows()
    for done, result in enumerate(results, num_all - len(jobs) + 1):
        if result["error"]:
            raise ValueError(result["error"])
        unreadable.update(result["unreadable"])
        sources.check_unreadable(source.files, sorted(unreadable))
        tokens += result["tokens"]
        speed = tokens / (time.monotonic() - start)
        if done % math.ceil(num_all / MAX_LINES) == 0 or done == num_all:
            print(f"prepare: {done}/{num_all} shards, {tokens:,} tokens, {speed:,.0f} tokens/s", flush=True)


def _run_job(row: dict, *, cpus: float, **constants) -> dict:
    """What is wrong with a file is returned, not raised: Ray would wrap one clear line in pages of its own trace."""
    # The last shards share the cores that have no shard of their own; twice as many threads, as some end early.
    num_threads = math.ceil(2 * cpus / row["left"])
    job = pickle.loads(row["job"])
    try:
        counts = write_shard(job, num_threads=num_threads, **constants)
    except (ValueError, OSError) as error:
        full = f" ({storage.disk(job.uri)})" if getattr(error, "errno", None) == errno.ENOSPC else ""
        return {"tokens": 0, "error": files.shown(f"{error}{full}"), "unreadable": []}
    tokens = counts["tokens"] + counts["cropped_tokens"] + counts["dropped_tokens"]
    return {"tokens": tokens, "error": "", "unreadable": counts.get("unreadable", [])}


def write_shard(job: Job, *, tokenizer: Tokenizer, row_len: int, num_threads: int) -> dict:
    """Tokenize and pack one shard into its row file. Holds the tokens of the shard, its text only by chunks."""
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
    storage.write_json(job.counts_uri, counts)  # after the rows: where it is, the shard is finished
    return counts


def _chunks(texts: Iterator[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (text, whether a document begins with it): several short documents, or a part of a very long one."""
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
    """For each chunk, in order: tokens of its texts, and how many bytes its text has."""

    def encode(chunk: list[tuple[str, bool]]) -> tuple[list[tuple[np.ndarray, bool]], int]:
        encoded = [(tokenizer.encode_to_numpy(text).astype(tokenizer.dtype), begins) for text, begins in chunk]
        return encoded, sum(len(text.encode()) for text, _ in chunk)

    num_threads = min(num_threads, machine.available_cpus())
    waiting = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > 2 * num_threads:  # Executor.map would read the whole shard ahead
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _collect(jobs: list[Job], rows_uri: str, row_len: int, source: sources.Source) -> dict:
    """{split: summed counts, rows by file, and fingerprints of the shards in that order}.

    Says which files could not be read to their ends. Raises ValueError when those are too many or a split has no rows.
    """

    def named(uri: str) -> str:
        folder = storage.parent(storage.parent(uri))
        return storage.name(uri) if folder == rows_uri else f"{storage.name(folder)}/{storage.name(uri)}"

    splits, unreadable = {}, set(source.unreadable)
    for split in ("train", "val"):
        ours = [job for job in jobs if job.split == split]
        with ThreadPoolExecutor(32) as pool:
            read = pool.map(storage.read_json, [job.counts_uri for job in ours])
            counts = {named(job.uri): counts for job, counts in zip(ours, read, strict=True)}
        total = {key: sum(c.get(key, 0) for c in counts.values()) for key in COUNTS}
        unreadable |= {message for c in counts.values() for message in c.get("unreadable", [])}
        if not total["rows"]:
            raise ValueError(
                f"the {split} split of {source.name} has {total['dropped_tokens']} tokens, fewer than a row of "
                f"{row_len}: use more text or a smaller sequence_len"
            )
        rows = {file: c["rows"] for file, c in counts.items()}
        splits[split] = {**total, "files": rows, "shards": [job.shard.fingerprint for job in ours]}
    sources.check_unreadable(source.files, sorted(unreadable))
    if unreadable:
        print(f"prepare: {len(unreadable):,} of {source.files:,} files can't be read, or not to their end:")
        print("\n".join(f"  {message}" for message in sorted(unreadable)), flush=True)
    return splits
