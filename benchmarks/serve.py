"""What the service costs beside the engine alone: first token, throughput, fairness, prefix reuse, memory under load.

A model with random weights is served by `nanochat-ray serve` in processes of its own, and asked over HTTP by
serving.load_test in another; the engine alone is in this one. The two take turns, and medians count.

    python -m benchmarks.serve --json
    python -m benchmarks.serve --soak 10       also 200 clients at once for ten minutes
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import aiohttp
import psutil
import tyro
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks import engine as engine_benchmark
from nanochat_ray.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.session import one_line_errors
from nanochat_ray.train.checkpoint import load_model, save_checkpoint
from serving import load_test
from serving.start import free_port


@dataclass
class Options:
    depth: int = 6
    vocab: int = 8192
    seq: int = 2048
    dtype: str | None = None
    clients: int = 32
    max_batch_size: int = 32
    """Answers that the service generates at once."""
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 128
    """Tokens of each answer."""
    rounds: int = 3
    streams: int = 8
    """Running streams while long prompts are read."""
    long_prompt: int = 1500
    soak: float = 0.0
    """Minutes of load by soak_clients at once, at the end."""
    soak_clients: int = 200
    compile: bool = True
    json: bool = False
    """End with one line of JSON."""


def save(options: Options, folder: str) -> str:
    """A checkpoint with random weights, and a tokenizer of bytes and pairs of bytes."""
    pairs = (bytes(pair) for pair in itertools.product(range(32, 127), repeat=2))
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += itertools.islice(pairs, options.vocab - len(tokens) - len(SPECIAL_TOKENS))
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(tokens)})
    sizes = engine_benchmark.Options(depth=options.depth, vocab=options.vocab, seq=options.seq)
    return save_checkpoint(folder, 0, engine_benchmark.build(sizes, "float32"), None, tokenizer, {})


class Service:
    """`nanochat-ray serve` while the block lasts."""

    def __init__(self, checkpoint: str, options: Options, home: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "nanochat_ray.cli", "serve", "--checkpoint", checkpoint, "--port", str(port)]
        command += [] if options.compile else ["--no-compile"]
        command += ["--dtype", options.dtype] if options.dtype else []
        command += ["--max-batch-size", str(options.max_batch_size)]
        self.process = subprocess.Popen(command, env=os.environ | {"NANOCHAT_RAY_HOME": home})
        while self.metric("compiled") < options.compile:
            if self.process.poll() is not None:
                raise OSError("the service did not start")
            time.sleep(1)

    def metric(self, name: str) -> float:
        """A gauge of its engine; -1 while it starts."""
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
            with direct.open(f"{self.url}/metrics", timeout=30) as response:
                families = text_string_to_metric_families(response.read().decode())
        except OSError:
            return -1
        return next((s.value for f in families for s in f.samples if s.name == f"nanochat_engine_{name}"), -1)

    def memory(self) -> int:
        """Bytes that its processes hold, not counting what they share."""
        main, total = psutil.Process(self.process.pid), 0
        for process in [main, *main.children(recursive=True)]:
            with suppress(psutil.Error):  # it has just ended
                total += process.memory_full_info().uss
        return total

    def stop(self) -> None:
        self.process.terminate()  # a command started in the background has Ctrl-C's signal ignored, and so its children
        self.process.wait(60)

    def command(self, **load) -> list[str]:
        command = [sys.executable, "-m", "serving.load_test", "--url", self.url, "--json"]
        for name, value in load.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return command

    def measure(self, **load) -> dict:
        """What serving.load_test measures."""
        out = subprocess.run(self.command(**load), stdout=subprocess.PIPE, check=True, text=True).stdout
        return json.loads(out.splitlines()[-1])

    def load(self, **load) -> dict:
        """The same. Raises OSError when an answer failed."""
        result = self.measure(**load)
        if result["failed"]:
            raise OSError(f"{result['failed']} requests failed: {result['errors']}")
        return result


@contextmanager
def serving(checkpoint: str, options: Options, home: str):
    service = Service(checkpoint, options, home)
    try:
        yield service
    finally:
        service.stop()


def throughput(engine: Engine, options: Options, requests: int) -> float:
    """Tokens a second of the engine alone, prompts included, as many requests at once as it takes."""
    prompts = engine_benchmark.prompts(options, requests, options.prompt)
    began = time.perf_counter()
    completions = engine.generate(prompts, SamplingParams(options.new))
    return sum(len(c.tokens) for c in completions) / (time.perf_counter() - began)


def first_token(engine: Engine, options: Options) -> float:
    [prompt] = engine_benchmark.prompts(options, 1, options.prompt)
    return engine_benchmark.first_token(engine, prompt)


async def ask(url: str, messages: list[dict], max_tokens: int, seed: int = 0) -> load_test.Answer:
    body = {"messages": messages, "max_tokens": max_tokens, "stream": True, "seed": seed, "temperature": 1.0}
    async with aiohttp.ClientSession(url) as session:
        answer = await load_test.ask(session, body | {"stream_options": {"include_usage": True}}, None)
    if answer.outcome != "ok":
        raise OSError(answer.error or answer.outcome)
    return answer


def turn_six(url: str, options: Options) -> tuple[float, float]:
    """Seconds to the first token of a chat's sixth turn of about 160 tokens each: after the others, and cold."""
    rng, times = random.Random(), []  # other words each time, or the cold ones were cached

    def text() -> str:
        return load_test.made_up(160, rng)  # a token each

    for _ in range(5):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(11)]
        for count in (1, 3, 5, 7, 9):
            asyncio.run(ask(url, turns[:count], 1))
        cold = [{"role": turn["role"], "content": text()} for turn in turns]
        answers = [asyncio.run(ask(url, messages, 4)) for messages in (turns, cold)]
        times.append([answer.messages[0] - answer.began for answer in answers])
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def gaps(service: Service, options: Options, beside: bool) -> float:
    """p95 of the time between a stream's messages, alone or while one long prompt after another is read."""
    load = {"clients": options.streams, "requests": options.streams, "prompt_tokens": options.prompt}
    command = service.command(**load, max_tokens=600)
    process, rng = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), random.Random()
    while service.metric("running") < options.streams / 2 and process.poll() is None:  # some may have ended
        time.sleep(0.1)
    while beside and process.poll() is None:
        long = [{"role": "user", "content": load_test.made_up(options.long_prompt, rng)}]
        asyncio.run(ask(service.url, long, 1))
    return json.loads(process.communicate()[0].splitlines()[-1])["gap_p95"]


def soak(service: Service, options: Options) -> tuple[dict, list[int]]:
    """What the clients got, and the service's memory in bytes every twentieth of the time."""
    seconds, memory = 60 * options.soak, []
    load = {"clients": options.soak_clients, "duration": seconds, "max_tokens": options.new}
    process = subprocess.Popen(service.command(**load), stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        memory.append(service.memory())
        time.sleep(seconds / 20)
    return json.loads(process.communicate()[0].splitlines()[-1]), memory


def measure(service: Service, engine: Engine, options: Options) -> dict[str, float]:
    many = {"prompt_tokens": options.prompt, "max_tokens": options.new, "clients": options.clients}
    few = {"prompt_tokens": options.prompt, "max_tokens": 8, "clients": 1, "requests": 20}
    rounds = []
    for i in range(options.rounds + 1):
        count = 8 * options.clients
        one = service.load(**many | {"clients": 1}, requests=4)
        result = {
            "ttft_engine": statistics.median(first_token(engine, options) for _ in range(20)),
            "ttft_http": service.load(**few)["ttft_p50"],
            "tokens_per_s_engine": throughput(engine, options, count),
            "tokens_per_s_http": service.load(**many, requests=count)["tokens_per_s"],
            "tokens_per_s_one_client": one["tokens_per_s"],
            "gap_alone": gaps(service, options, False),
            "gap_beside": gaps(service, options, True),
        }
        result["ttft_turn_6"], result["ttft_cold"] = turn_six(service.url, options)
        rounds.append(result)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in result.items())
        print(f"round {i}{'' if i else ' (not counted)'}  {shown}", file=sys.stderr, flush=True)
    return {name: statistics.median(result[name] for result in rounds[1:]) for name in rounds[0]}  # the first warms up


def summary(n: dict[str, float]) -> list[tuple[str, float, str, str]]:
    """Name, figure, target, and from what."""
    ms = {name: f"{value * 1e3:.1f} ms" for name, value in n.items()}
    per_s = {name: f"{value:,.0f} tok/s" for name, value in n.items()}
    return [
        (
            "first token over the engine's own, ms",
            1e3 * (n["ttft_http"] - n["ttft_engine"]),
            "<= 10",
            f"{ms['ttft_http']} and {ms['ttft_engine']}",
        ),
        (
            "throughput over the engine alone",
            n["tokens_per_s_http"] / n["tokens_per_s_engine"],
            ">= 0.75",
            f"{per_s['tokens_per_s_http']} and {per_s['tokens_per_s_engine']}",
        ),
        (
            "throughput of all clients over one",
            n["tokens_per_s_http"] / n["tokens_per_s_one_client"],
            ">= 6",
            per_s["tokens_per_s_one_client"],
        ),
        (
            "p95 between messages beside long prompts",
            n["gap_beside"] / n["gap_alone"],
            "<= 2",
            f"{ms['gap_beside']} and {ms['gap_alone']}",
        ),
        (
            "turn 6 of a chat over the same cold",
            n["ttft_turn_6"] / n["ttft_cold"],
            "<= 0.35",
            f"{ms['ttft_turn_6']} and {ms['ttft_cold']}",
        ),
    ]


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as home:
        checkpoint = save(options, home)
        model, tokenizer, _ = load_model(checkpoint, dtype=options.dtype)
        engine = Engine(model, tokenizer, options.clients)
        if options.compile:
            engine.compile()
        with serving(checkpoint, options, home) as service:
            numbers = measure(service, engine, options)
            soaked, memory = soak(service, options) if options.soak else ({}, [])
    table, rows = Table("", "figure", "target", "from"), summary(numbers)
    for name, figure, target, source in rows:
        table.add_row(name, f"{figure:.2f}", target, source)
    if memory:
        got = ", ".join(f"{soaked[kind]} {kind}" for kind in ("ok", "rejected", "failed"))
        table.add_row("memory at the end over a fifth in", f"{memory[-1] / memory[len(memory) // 5]:.2f}", "1", got)
        numbers |= {f"soak_{kind}": soaked[kind] for kind in ("ok", "rejected", "failed")} | {"memory": memory}
    Console().print(table)
    if options.json:
        print(json.dumps(numbers | {name: figure for name, figure, _, _ in rows}))


if __name__ == "__main__":
    main()
