"""Speed of the data path: prepare against tiktoken alone on the same text and cores, and the loader on the rows made.

    python -m benchmarks.data                          docstrings of this environment, made into 100 MB
    python -m benchmarks.data --text FOLDER --json     parquet, jsonl or txt files; the last line is JSON

prepare's time is the whole of prepare.run on a running Ray: listing, reading, tokenizing, packing, writing. The fixed
part of it is what preparing next to nothing takes. tiktoken encodes documents in memory and throws the tokens away.
"""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tiktoken
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_ray import storage
from nanochat_ray.data import prepare, sources
from nanochat_ray.data.loader import Loader, Rows
from nanochat_ray.data.tokenizer import Tokenizer, train
from nanochat_ray.session import one_line_errors, start_ray

TOKENIZER_CHARS = 20_000_000  # of text to train a tokenizer on
BATCH = 1024  # documents at a time for tiktoken: it need not keep the tokens of all the text as Python lists
LITTLE = 20  # documents a file, to see the fixed part of prepare's time
LOADER_SECONDS = 2.0


@dataclass
class DataBenchmarkOptions:
    text: str | None = None
    """Folder of parquet, jsonl or txt files; the default is pydocs, the docstrings of this environment."""
    megabytes: float = 100
    """The text is cut, or repeated with other beginnings of its documents, to this size."""
    files: int = 9
    """Parquet files to divide the text among; the last one is validation."""
    tokenizer: str | None = None
    """Folder of a tokenizer; without it one is trained on the text."""
    vocab_size: int = 32768
    """Of the tokenizer that is trained."""
    sequence_len: int = 2048
    """T: a row holds T+1 tokens."""
    repeats: int = 3
    """prepare and tiktoken take turns so often; the medians count."""
    rows_per_step: int = 32
    """Rows the loader gives at a time."""
    tok_per_sec: float = 10_000
    """A training speed: what share of such a step is the loader's?"""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


def run(options: DataBenchmarkOptions) -> dict:
    """Measure on the running Ray. Returns figures; a MB is 10⁶ bytes of UTF-8."""
    source = sources.resolve(options.text or "pydocs")
    documents = [text for shard in (*source.train, *source.val) for text in sources.read_documents(shard)]
    texts = list(corpus(documents, 1e6 * options.megabytes))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.tokenizer or f"{scratch}/tokenizer"
        if not options.tokenizer:
            train(corpus(documents, TOKENIZER_CHARS), options.vocab_size).save(folder)
        tokenizer = Tokenizer.load(folder)
        write_files(f"{scratch}/text", texts, options.files)
        write_files(f"{scratch}/little", texts[: LITTLE * options.files], options.files)
        whole = prepare.PrepareOptions(f"{scratch}/text", tokenizer=folder, sequence_len=options.sequence_len)
        little = prepare.PrepareOptions(f"{scratch}/little", tokenizer=folder, sequence_len=16)

        prepare_s, tiktoken_s, start_s = [], [], []
        for i in range(options.repeats):
            seconds, prepared = time_prepare(whole, home=f"{scratch}/home_{i}")
            prepare_s.append(seconds)
            tiktoken_s.append(time_tiktoken(tokenizer, texts))
            print(f"prepare {prepare_s[-1]:.2f} s, tiktoken {tiktoken_s[-1]:.2f} s", flush=True)
        for i in range(options.repeats):
            start_s.append(time_prepare(little, home=f"{scratch}/little_{i}")[0])
        loader_tok_per_sec = time_loader(prepared.rows, options)

    def rate(seconds: float) -> float:
        return megabytes / seconds

    prepare_mb_per_s, tiktoken_mb_per_s = rate(median(prepare_s)), rate(median(tiktoken_s))
    steady_mb_per_s = rate(median(prepare_s) - median(start_s))
    return {
        "megabytes": megabytes,
        "documents": len(texts),
        "cpus": cpus(),
        "prepare_s": prepare_s,  # the first includes what Ray and the workers do once: start processes, import
        "tiktoken_s": tiktoken_s,
        "start_s": median(start_s),
        "prepare_mb_per_s": prepare_mb_per_s,
        "tiktoken_mb_per_s": tiktoken_mb_per_s,
        "ratio": prepare_mb_per_s / tiktoken_mb_per_s,
        "first_ratio": rate(prepare_s[0]) / tiktoken_mb_per_s,
        "steady_mb_per_s": steady_mb_per_s,
        "steady_ratio": steady_mb_per_s / tiktoken_mb_per_s,
        "loader_rows_per_sec": loader_tok_per_sec / options.sequence_len,
        "loader_tok_per_sec": loader_tok_per_sec,
        "loader_share": options.tok_per_sec / loader_tok_per_sec,
    }


def cpus() -> int:
    return int(ray.cluster_resources()["CPU"])


def corpus(documents: list[str], size: float) -> Iterator[str]:
    """Documents, and turned copies of them (first part moved to the end), up to `size` bytes."""
    for copy in range(1, 1_000_000):
        for text in documents:
            cut = len(text) * (copy - 1) // copy
            yield (turned := text[cut:] + text[:cut])
            size -= len(turned.encode())
            if size <= 0:
                return


def write_files(folder: str, texts: list[str], count: int) -> None:
    """Parquet files of equally many documents."""
    os.mkdir(folder)
    for i in range(count):
        part = texts[len(texts) * i // count : len(texts) * (i + 1) // count]
        pq.write_table(pa.table({"text": part}), f"{folder}/part_{i:05d}.parquet", compression="zstd")


def time_prepare(options: prepare.PrepareOptions, home: str) -> tuple[float, prepare.Prepared]:
    """Seconds of prepare.run in an empty home, and what it returned."""
    os.environ["NANOCHAT_RAY_HOME"] = home
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepared = prepare.run(options)
    return time.perf_counter() - start, prepared


def time_tiktoken(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Seconds of encode_ordinary_batch with a thread for each of Ray's CPUs."""
    encoding = tiktoken.Encoding(
        "alone", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens=tokenizer.special_tokens
    )
    start = time.perf_counter()
    for i in range(0, len(texts), BATCH):
        encoding.encode_ordinary_batch(texts[i : i + BATCH], num_threads=cpus())
    return time.perf_counter() - start


def time_loader(rows_uri: str, options: DataBenchmarkOptions) -> float:
    """Tokens per second of Loader.step, rows taken in training's order from files in the page cache."""
    loader = Loader(Rows(storage.join(rows_uri, "train")), options.rows_per_step)
    loader.step(0)
    start, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < LOADER_SECONDS:
        loader.step(steps * options.rows_per_step)
        steps += 1
    return steps * options.rows_per_step * options.sequence_len / seconds


def report(figures: dict, options: DataBenchmarkOptions) -> None:
    table = Table(title="data", show_header=False, title_justify="left", min_width=60)
    for name, value in {
        "text": f"{figures['megabytes']:.1f} MB, {figures['documents']:,} documents, {options.files} files",
        "prepare": f"{figures['prepare_mb_per_s']:.2f} MB/s, {median(figures['prepare_s']):.2f} s",
        f"tiktoken, {figures['cpus']} threads": f"{figures['tiktoken_mb_per_s']:.2f} MB/s",
        "prepare / tiktoken": f"{figures['ratio']:.2f}, the first time {figures['first_ratio']:.2f}",
        "prepare's fixed part": f"{figures['start_s']:.2f} s",
        "prepare without it": f"{figures['steady_mb_per_s']:.2f} MB/s, {figures['steady_ratio']:.2f} of tiktoken",
        "loader": f"{figures['loader_rows_per_sec']:,.0f} rows/s, {figures['loader_tok_per_sec']:,.0f} tokens/s",
        f"its share at {options.tok_per_sec:,.0f} tokens/s": f"{figures['loader_share']:.3%} of a step",
    }.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
    if options.json:
        print(json.dumps(figures))


@one_line_errors
def main() -> None:
    options = tyro.cli(DataBenchmarkOptions, prog="python -m benchmarks.data", description=__doc__)
    start_ray()
    report(run(options), options)


if __name__ == "__main__":
    main()
