"""The Ray Data job of `prepare --clean`: writes the documents of a source that pass all steps to new files.

1. One task per shard applies the rules and writes the documents that pass, with their signatures beside them.
2. One task per kind of signature finds the documents that share one. Only signatures travel, not texts.
3. One task per shard writes it again without the duplicates.

A run that was interrupted does not repeat finished shards.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from nanochat_ray import storage
from nanochat_ray.data import clean, sources
from nanochat_ray.data.shard_tasks import map_shards

LANGUAGE, EXACT, NEAR, DECONTAMINATE = "language", "exact", "near", "decontaminate"
STEPS = (*clean.RULES, LANGUAGE, DECONTAMINATE, EXACT, NEAR)  # in the order in which they run
BATCH = 256  # documents
SAMPLES, SAMPLE_CHARS = 10, 300  # dropped documents that the manifest quotes per step, and characters of each
VERSION = "1"  # increase it when a step starts to drop other documents than before
TEXT = pa.schema([("text", pa.large_string())])


@dataclass
class Counts:
    """What happened to the documents of one shard, or of all shards."""

    documents: int = 0
    kept: int = 0
    dropped: dict[str, Counter] = field(default_factory=dict)  # documents by step and reason
    samples: dict[str, list[str]] = field(default_factory=dict)  # dropped texts by step
    unreadable: list[str] = field(default_factory=list)  # one message per damaged file

    def drop(self, step: str, reason: str, text: str) -> None:
        self.dropped.setdefault(step, Counter())[reason] += 1
        if len(samples := self.samples.setdefault(step, [])) < SAMPLES:
            samples.append(text[:SAMPLE_CHARS])

    def add(self, other: dict) -> None:
        self.documents += other["documents"]
        self.kept += other["kept"]
        self.unreadable += other["unreadable"]
        for step, reasons in other["dropped"].items():
            self.dropped.setdefault(step, Counter()).update(reasons)
        for step, samples in other["samples"].items():
            mine = self.samples.setdefault(step, [])
            mine += samples[: SAMPLES - len(mine)]


def cleaned(
    source: sources.Source, steps: list[str], tests: str | None = None, languages: list[str] | None = None
) -> sources.Source:
    """The source with the documents that the steps keep. Files of an earlier run with the same inputs are reused.

    tests: folder of jsonl files, such as a CORE bundle; decontaminate drops documents that quote them.
    languages: codes (ISO 639); language drops documents in others.
    Of a duplicate in both splits the validation document is kept. manifest.json in the folder counts what each step
    dropped, with samples. Raises ValueError for an unknown step, or when no document is left.
    """
    if unknown := [step for step in steps if step not in STEPS]:
        raise ValueError(f"--clean has no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    steps = [step for step in STEPS if step in steps]
    if (DECONTAMINATE in steps) != (tests is not None):
        raise ValueError("--clean decontaminate needs --tests FOLDER, and --tests needs it: name both or neither")
    if (LANGUAGE in steps) != bool(languages):
        raise ValueError("--clean language needs --languages CODES, and --languages needs it: name both or neither")
    languages = sorted(set(languages or []))
    if languages and (unknown := set(languages).difference(known := clean.known_languages())):
        raise ValueError(f"--languages: {min(unknown)!r} is not known; there are {', '.join(sorted(known))}")
    of_tests = clean.ngrams_of_tests(read_tests(tests)) if tests else np.zeros(0, np.uint64)
    tested = storage.fingerprint(of_tests.tobytes().hex())
    inputs = storage.fingerprint(source.fingerprint, steps, tested, *languages, VERSION)
    folder = storage.join(storage.home(), "clean", f"{source.name}-{inputs[:8]}")
    uri = storage.join(folder, "manifest.json")
    shards = [("val", shard) for shard in source.val] + [("train", shard) for shard in source.train]
    parts = [f"{split}_{i:05d}.parquet" for i, (split, _) in enumerate(shards)]
    if not storage.exists(uri):
        _run(folder, source, [shard for _, shard in shards], parts, steps, of_tests, languages)
    manifest = storage.read_json(uri)
    _print_summary(source.name, manifest, folder)
    left: dict[str, list[sources.Shard]] = {"train": [], "val": []}
    for (split, _), part, kept in zip(shards, parts, manifest["kept_by_shard"], strict=True):
        if kept:
            part_uri = storage.join(folder, part)
            left[split].append(sources.Shard(part_uri, "text", version=inputs, size=storage.size(part_uri)))
    for split, of_split in left.items():
        if not of_split:
            raise ValueError(f"--clean {' '.join(steps)} leaves no {split} documents of {source.name}: see {uri}")
    return replace(
        source,
        name=f"{source.name}-clean",
        train=tuple(left["train"]),
        val=tuple(left["val"]),
        fingerprint=inputs,
        unreadable=tuple(dict.fromkeys((*source.unreadable, *manifest["unreadable"]))),
    )


def read_tests(folder: str) -> list[str]:
    """The tests in the jsonl files below a folder. The text of a line is all its strings, joined by spaces.

    Raises FileNotFoundError when the folder has no tests."""
    found = []
    for path, _ in storage.walk(storage.absolute(folder)):
        if path.endswith(".jsonl"):
            lines = storage.read_text(storage.join(storage.absolute(folder), path)).splitlines()
            found += [" ".join(_strings(json.loads(line))) for line in lines if line.strip()]
    if not found:
        raise FileNotFoundError(f"{folder} has no jsonl files: name a folder that has, such as a CORE bundle")
    return found


def _strings(value) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _run(
    folder: str,
    source: sources.Source,
    shards: list[sources.Shard],
    parts: list[str],
    steps: list[str],
    of_tests: np.ndarray,
    languages: list[str],
) -> None:
    signed = [step for step in steps if step in (EXACT, NEAR)]
    first = storage.join(folder, "first") if signed else folder
    of_tests = ray.put(of_tests)
    jobs = [(shard, storage.join(first, part)) for shard, part in zip(shards, parts, strict=True)]
    of_first = _run_tasks(
        lambda shard, uri: write_kept(shard, uri, steps, ray.get(of_tests), languages), jobs, "documents read"
    )
    counts, kept = Counts(), [counts["kept"] for counts in of_first]
    for of_shard in of_first:
        counts.add(of_shard)
    sources.check_unreadable(source.files, sorted({*source.unreadable, *counts.unreadable}))
    if signed:
        uris = [uri for _, uri in jobs]
        again = np.split(find_duplicates(uris, sum(kept), signed), np.cumsum(kept)[:-1])
        outs = [storage.join(folder, part) for part in parts]
        jobs = list(zip(uris, outs, map(np.packbits, again), strict=True))
        of_second = _run_tasks(write_without, jobs, "duplicates removed")
        counts.kept, kept = 0, [of_shard["kept"] for of_shard in of_second]
        for of_shard in of_second:
            counts.add(of_shard | {"documents": 0})
    manifest = vars(counts) | {"steps": steps, "kept_by_shard": kept}
    storage.write_json(storage.join(folder, "manifest.json"), manifest)
    if signed:
        storage.remove(first)


def _run_tasks(function: Callable[..., dict], jobs: list[tuple], doing: str) -> list[dict]:
    """function(*job) for each job, in the jobs' order. Prints a line for each tenth that is done."""
    results = {}
    for index, result in map_shards(lambda job: function(*job), jobs):
        results[index] = result
        if 10 * len(results) // len(jobs) > 10 * (len(results) - 1) // len(jobs):
            print(f"clean: {len(results)}/{len(jobs)} shards, {doing}", flush=True)
    return [results[index] for index in range(len(jobs))]


def write_kept(
    shard: sources.Shard, uri: str, steps: list[str], of_tests: np.ndarray, languages: Collection[str] = ()
) -> dict:
    """Write the documents of a shard that pass the rules, and their signatures. Returns the counts.

    The counts are also written to <uri>.json. If that file exists, the shard is finished and only its counts are read.
    """
    if storage.exists(f"{uri}.json"):
        return storage.read_json(f"{uri}.json")
    # Start with the signatures of no document, so that an empty shard has an array, too.
    counts, signatures, reading = Counts(), [signatures_of([], steps)], sources.Reading()

    def batches() -> Iterator[list[str]]:
        documents = sources.read_documents(shard, reading)
        while texts := list(islice(documents, BATCH)):
            counts.documents += len(texts)
            kept = apply_rules(texts, steps, of_tests, languages, counts)
            signatures.append(signatures_of(kept, steps))
            yield kept

    counts.kept = _write_texts(uri, batches())
    counts.unreadable = reading.unreadable
    for step in signatures[0]:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([of_batch[step] for of_batch in signatures]))
        storage.write_bytes(f"{uri}.{step}.npy", buffer.getvalue())
    storage.write_json(f"{uri}.json", vars(counts))
    return vars(counts)


def apply_rules(
    texts: list[str], steps: list[str], of_tests: np.ndarray, languages: Collection[str], counts: Counts
) -> list[str]:
    """The texts that pass the rules, are in the languages, and quote no test. Adds the others to `counts`."""
    for step in steps:
        if step in (EXACT, NEAR) or not texts:
            continue
        if step == DECONTAMINATE:
            hits = clean.contaminated(texts, of_tests)
            why = ["shares 13 words in a row with a test" if hit else None for hit in hits]
        elif step == LANGUAGE:
            why = clean.other_language(texts, languages)
        else:
            why = clean.RULES[step](texts)
        for text, reason in zip(texts, why, strict=True):
            if reason:
                counts.drop(step, reason, text)
        texts = [text for text, reason in zip(texts, why, strict=True) if not reason]
    return texts


def signatures_of(texts: list[str], steps: list[str]) -> dict[str, np.ndarray]:
    """{step: uint64 (documents, kinds)}. Duplicates have the same number in at least one column; 0 matches nothing."""
    of_steps = {}
    if EXACT in steps:
        of_steps[EXACT] = np.frombuffer(b"".join(map(clean.digest, texts)), np.uint64)[:, None]
    if NEAR in steps:
        of_steps[NEAR] = clean.bands(texts)
    return of_steps


def find_duplicates(uris: list[str], count: int, steps: list[str]) -> np.ndarray:
    """Which documents are duplicates of an earlier one, bool (count,), in the order of the files and their lines."""

    def pairs(step: str, kind: int) -> tuple[np.ndarray, np.ndarray]:
        of_files = (np.load(io.BytesIO(storage.read_bytes(f"{uri}.{step}.npy"))) for uri in uris)
        return clean.pairs(np.concatenate([of_file[:, kind] for of_file in of_files]))

    kinds = [(EXACT, 0)] * (EXACT in steps) + [(NEAR, kind) for kind in range(clean.BANDS)] * (NEAR in steps)
    memory = 40 * count + 2**28  # the numbers of one kind, their order, and a file
    task = ray.remote(num_cpus=1, memory=memory)(pairs)
    return clean.duplicates(ray.get([task.remote(*kind) for kind in kinds]), count)


def write_without(uri: str, out: str, again: np.ndarray) -> dict:
    """Write the documents of a file without its duplicates and return the counts. `again`: bits of find_duplicates."""
    if storage.exists(f"{out}.json"):
        return storage.read_json(f"{out}.json")
    counts, duplicate = Counts(), np.unpackbits(again).astype(bool)

    def batches() -> Iterator[list[str]]:
        number = 0
        with storage.reading(uri) as file:
            for batch in pq.ParquetFile(file).iter_batches(BATCH):
                texts = batch.column(0).to_pylist()
                of_batch = duplicate[number : number + len(texts)]
                for text in (text for text, dropped in zip(texts, of_batch, strict=True) if dropped):
                    counts.drop("duplicates", "of another document", text)
                yield [text for text, dropped in zip(texts, of_batch, strict=True) if not dropped]
                number += len(texts)

    counts.kept = _write_texts(out, batches())
    storage.write_json(f"{out}.json", vars(counts))
    return vars(counts)


def _write_texts(uri: str, batches: Iterator[list[str]]) -> int:
    """Write texts as parquet with one column; returns how many. An interrupted write leaves no file."""
    written = 0
    with storage.writing(uri) as sink, pq.ParquetWriter(sink, TEXT, compression="zstd") as writer:
        for texts in batches:
            if texts:
                writer.write_batch(pa.record_batch([pa.array(texts, pa.large_string())], schema=TEXT))
                written += len(texts)
    return written


def _print_summary(name: str, manifest: dict, folder: str) -> None:
    for step, reasons in manifest["dropped"].items():
        print(f"clean: {name}: {step} dropped {sum(reasons.values()):,}", flush=True)
        for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
            print(f"clean:   {count:,} {reason}", flush=True)
    kept, documents = manifest["kept"], manifest["documents"]
    print(f"clean: {name}: {kept:,} of {documents:,} documents are left, in {folder}", flush=True)
