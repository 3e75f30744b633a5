"""Cleaning: documents and MB a second of a core of each step, and near duplicates beside datatrove and datasketch.

    python -m benchmarks.clean
    python -m benchmarks.clean --peer-python VENV/bin/python      also the peers, from an environment that has them

The text is by default the docstrings of the installed packages. Copies of a tenth of the documents, with a run of
other words in each, are planted among them.
Times are of the process on one thread, so that what else runs weighs less.
"""

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import tyro

from nanochat_ray.data import clean, sources
from nanochat_ray.session import start_ray

PEERS = Path(__file__).with_name("clean_peers.py")


@dataclass
class Options:
    source: str = "pydocs"
    """As of `nanochat-ray prepare`."""
    documents: int = 5_000
    """Without the planted near duplicates, a tenth as many."""
    share: float = 0.05
    """Of a planted duplicate's words, that differ: 0.05 leaves a Jaccard similarity of its 5-grams of 0.85 or more."""
    peer_python: str | None = None
    """A Python with datatrove and datasketch, to measure them on the same text."""
    json: bool = False
    """Print one JSON object on the last line."""


def texts_of(options: Options) -> tuple[list[str], dict[int, int]]:
    """(documents of 80 words and more, {planted duplicate: its original})."""
    draw = random.Random(1)
    shards = sources.resolve(options.source).train
    found = [text for shard in shards for text in sources.read_documents(shard) if len(text.split()) >= 80]
    texts = draw.sample(found, min(options.documents, len(found)))
    planted = {}
    for original in draw.sample(range(len(texts)), len(texts) // 10):
        words = texts[original].split(" ")
        count = max(1, round(options.share * len(words)))
        at = draw.randrange(len(words) - count)
        words[at : at + count] = [f"other{draw.randrange(10**6)}" for _ in range(count)]
        planted[len(texts)] = original
        texts.append(" ".join(words))
    return texts, planted


def near(texts: list[str]) -> list[int]:
    keys = np.concatenate([clean.bands(texts[i : i + 256]) for i in range(0, len(texts), 256)])
    return np.flatnonzero(clean.duplicates([clean.pairs(kind) for kind in keys.T], len(texts))).tolist()


def timed(function: Callable) -> tuple[float, object]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.clean", description=__doc__)
    if sources.is_named(options.source):
        start_ray()
    texts, planted = texts_of(options)
    ray.shutdown()
    size = sum(len(text.encode()) for text in texts) / 1e6
    clean.words(texts[:1])  # makes its tables
    steps = {rule: lambda rule=rule: clean.RULES[rule](texts) for rule in clean.RULES}
    steps |= {"exact": lambda: [*map(clean.digest, texts)], "near": lambda: near(texts)}
    numbers = {"documents": len(texts), "mb": size, "mb_per_s": {}}
    for name, step in steps.items():
        seconds, result = timed(step)
        numbers["mb_per_s"][name] = size / seconds
        print(f"{name:12} {size / seconds:7.1f} MB/s {len(texts) / seconds:9,.0f} documents/s")
    dropped = set(result)
    numbers["near"] = {"dropped": len(dropped), "recall": len(dropped & planted.keys()) / len(planted)}
    print(f"near duplicates: {len(dropped):,} dropped, {numbers['near']['recall']:.1%} of those that were planted")
    if options.peer_python:
        with tempfile.NamedTemporaryFile("w") as file:
            json.dump(texts, file)
            file.flush()
            said = subprocess.run(
                [options.peer_python, PEERS, file.name], stdout=subprocess.PIPE, text=True, check=True
            )
        for name, peer in json.loads(said.stdout.splitlines()[-1]).items():
            theirs = set(peer["dropped"])
            numbers[name] = {
                "ours_over_it": peer["seconds"] / seconds,
                "recall": len(theirs & planted.keys()) / len(planted),
                "of_both": len(theirs & dropped) / len(theirs | dropped),
            }
            of = numbers[name]
            print(
                f"{name}: {len(texts) / peer['seconds']:,.0f} documents/s, ours over it {of['ours_over_it']:.1f}; "
                f"{len(theirs):,} dropped, {of['recall']:.1%} of the planted, "
                f"{of['of_both']:.1%} of all that either drops are dropped by both"
            )
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
