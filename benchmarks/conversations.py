"""Speed and memory of finetuning's data: from a file of conversations to rows, beside tiktoken alone on the same text.

    python -m benchmarks.conversations --count 100000                   # of some 1,500 characters, as SmolTalk's
    python -m benchmarks.conversations --count 100000 --chars 200 --json

The time is all of it on a running Ray: reading, mixing, rendering, packing, writing. The driver's memory is its
largest resident set in that time, above what it was before. tiktoken encodes the same texts in memory with a thread for
each of Ray's CPUs, and throws the tokens away. On a machine that others use, too, compare CPU time: of this process and
all of Ray's.
"""

import contextlib
import io
import json
import os
import pydoc_data.topics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import ray
import tiktoken
import tyro

from nanochat_ray.data.conversations import prepare_conversations
from nanochat_ray.data.tokenizer import Tokenizer, train
from nanochat_ray.evals.tasks import MixtureOptions, sft_conversations
from nanochat_ray.session import one_line_errors, start_ray

QUESTION = 0.2  # of a conversation's characters
BATCH = 2048  # texts at a time for tiktoken
SAMPLE_MB = 20  # of text for tiktoken


@dataclass
class ConversationsBenchmarkOptions:
    count: int = 100_000
    """Conversations in the file."""
    chars: int = 1500
    """Characters of each, on average; half of them have half as many, the others one and a half times as many."""
    vocab_size: int = 32768
    """Of the tokenizer, which is trained on the help texts of Python that the conversations are made of."""
    sequence_len: int = 2048
    """T: a row holds T+1 tokens."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


def run(options: ConversationsBenchmarkOptions) -> dict:
    """Measure on the running Ray. A MB is 10⁶ bytes."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    tokenizer = train([text], min(options.vocab_size, 8192))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["NANOCHAT_RAY_HOME"] = f"{scratch}/home"
        file, megabytes = f"{scratch}/mine.jsonl", 0.0
        with open(file, "w") as f:
            for question, answer in conversations(text, options):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                f.write(json.dumps({"messages": messages}) + "\n")
                megabytes += (len(question.encode()) + len(answer.encode())) / 1e6
        alone_cpu_s = cpu_seconds()
        tiktoken_mb_per_s = [time_tiktoken(tokenizer, text, options)]
        alone_cpu_s = cpu_seconds() - alone_cpu_s
        with peak_memory() as peak, contextlib.redirect_stdout(io.StringIO()) as said:
            cpu_before, began = cpu_seconds(), time.perf_counter()
            splits = sft_conversations(MixtureOptions(conversations=[file]))
            read_s = time.perf_counter() - began
            prepare_conversations(splits, tokenizer, options.sequence_len)
            all_s, cpu_s = time.perf_counter() - began, cpu_seconds() - cpu_before
        tiktoken_mb_per_s.append(time_tiktoken(tokenizer, text, options))
    print(said.getvalue().splitlines()[-1])
    alone = sum(tiktoken_mb_per_s) / 2
    return {
        "conversations": options.count,
        "megabytes": megabytes,
        "cpus": int(ray.cluster_resources()["CPU"]),
        "seconds": all_s,
        "read_s": read_s,
        "mb_per_s": megabytes / all_s,
        "tiktoken_mb_per_s": tiktoken_mb_per_s,
        "ratio": megabytes / all_s / alone,
        "cpu_ratio": megabytes / cpu_s / (min(SAMPLE_MB, megabytes) / alone_cpu_s),
        "driver_mb": peak["rss"] / 1e6,
        "driver_own_mb": peak["own"] / 1e6,  # without what it shares with Ray's object store
    }


def cpu_seconds() -> float:
    """That this process and those that it started have used."""
    times = [p.cpu_times() for p in (psutil.Process(), *psutil.Process().children(recursive=True))]
    return sum(t.user + t.system for t in times)


def conversations(text: str, options: ConversationsBenchmarkOptions) -> Iterator[tuple[str, str]]:
    """(question, answer): stretches of the text, which begin elsewhere each time."""
    for i in range(options.count):
        size = options.chars // 2 if i % 2 else options.chars * 3 // 2
        at = i * 7919 % (len(text) - size)
        cut = at + int(QUESTION * size)
        yield text[at:cut], text[cut : at + size]


def time_tiktoken(tokenizer: Tokenizer, text: str, options: ConversationsBenchmarkOptions) -> float:
    """MB/s of encode_ordinary_batch over the beginning of the file, with a thread for each of Ray's CPUs."""
    encoding = tiktoken.Encoding(
        "alone", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens=tokenizer.special_tokens
    )
    texts, size = [], 0.0
    for turns in conversations(text, options):
        texts += turns
        size += sum(len(turn.encode()) for turn in turns) / 1e6
        if size > SAMPLE_MB:
            break
    began = time.perf_counter()
    for i in range(0, len(texts), BATCH):
        encoding.encode_ordinary_batch(texts[i : i + BATCH], num_threads=int(ray.cluster_resources()["CPU"]))
    return size / (time.perf_counter() - began)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The most memory of this process within the block, above that before: all of it, and what it does not share."""
    process, peak, ended = psutil.Process(), {}, threading.Event()

    def now() -> dict[str, int]:
        info = process.memory_info()
        return {"rss": info.rss, "own": info.rss - info.shared}

    before = now()

    def watch() -> None:
        while not ended.wait(0.02):
            peak.update({name: max(peak.get(name, 0), value - before[name]) for name, value in now().items()})

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


@one_line_errors
def main() -> None:
    options = tyro.cli(ConversationsBenchmarkOptions, prog="python -m benchmarks.conversations", description=__doc__)
    start_ray()
    figures = run(options)
    print(
        f"{figures['conversations']:,} conversations, {figures['megabytes']:,.0f} MB: {figures['seconds']:.1f} s, "
        f"{figures['read_s']:.1f} of them to read; {figures['mb_per_s']:.2f} MB/s, {figures['ratio']:.2f} of tiktoken "
        f"on {figures['cpus']} threads, {figures['cpu_ratio']:.2f} by CPU time; the driver takes "
        f"{figures['driver_mb']:,.0f} MB more, {figures['driver_own_mb']:,.0f} MB of its own"
    )
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
