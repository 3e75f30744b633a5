"""Load test of a chat service: closed-loop clients or Poisson arrivals; counts, throughput and latencies.

    python -m serving.load_test --clients 32 --requests 200                       each client sends one after another
    python -m serving.load_test --rate 4 --duration 60 --prompt-tokens 30 300     4 new requests a second, lengths mixed
    python -m serving.load_test --clients 50 --requests 50 --drop 1               clients that hang up in mid-stream

Every prompt begins with random words, so that no request reuses the cache of another, except with --prompt.
"""

import asyncio
import itertools
import json
import math
import random
import string
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field, replace

import aiohttp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_ray.session import one_line_errors

MAX_WAIT = 10.0  # seconds before a client that was refused sends its next request, at most


@dataclass
class Options:
    url: str = "http://127.0.0.1:8000"
    """The service's origin."""
    model: str | None = None
    """Which of its models; the first by default."""
    api_key: str | None = None
    clients: int = 8
    """Clients, each of which sends a request when its last one has ended; not used with --rate."""
    rate: float | None = None
    """Requests a second, arriving at random (Poisson) however many are still being answered."""
    requests: int | None = None
    """How many requests; 64 by default, as many as --duration allows with it."""
    duration: float | None = None
    """Seconds after which no request begins."""
    prompt: str | None = None
    """The same prompt each time, instead of words made up."""
    prompt_tokens: list[int] = field(default_factory=lambda: [32])
    """Lengths of prompts in tokens, about; each request has one of them."""
    max_tokens: list[int] = field(default_factory=lambda: [64])
    """Lengths of answers at most; each request has one of them."""
    temperature: float = 1.0
    stream: bool = True
    drop: float = 0.0
    """Share of the requests that are hung up on after one to four messages."""
    timeout: float = 300.0
    """Seconds after which a request has failed."""
    seed: int | None = None
    """Of lengths, words and arrivals; another each time by default, or the service had the prompts in cache."""
    json: bool = False
    """End with one line of JSON."""


@dataclass
class Answer:
    """The outcome of one request. Times are those of time.perf_counter()."""

    began: float
    ended: float = math.nan
    outcome: str = "failed"
    """ok, rejected (429 or 503), dropped (by us), or failed."""
    error: str = ""
    retry_after: float = 1.0
    messages: list[float] = field(default_factory=list)
    """When each message with text came."""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass
class Result:
    """Times in seconds, medians (p50) and 95th percentiles, of requests answered in full; NaN where there were none."""

    requests: int
    ok: int
    rejected: int
    dropped: int
    failed: int
    seconds: float
    """From the first request's start to the last one's end."""
    prompt_tokens: int
    """Of the full answers, as `tokens`; both as the service counted them."""
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    """Full answers over all the seconds."""
    ttft_p50: float
    """Time to the first message with text, of streams."""
    ttft_p95: float
    inter_token_p50: float
    """Time from the first message to the last over the tokens after the first: one figure an answer."""
    inter_token_p95: float
    gap_p50: float
    """Between a message and the next in the same stream, which may hold several tokens: one figure a message."""
    gap_p95: float
    latency_p50: float
    """Of the whole answer."""
    latency_p95: float
    rejection_p95: float
    """Time to a 429 or 503."""
    errors: dict[str, int]
    """What went wrong, and how often."""


def run(options: Options) -> Result:
    """Put the load on and wait for the answers. Raises ValueError for bad options, OSError for a service not there."""
    return asyncio.run(load(options))


async def load(options: Options) -> Result:
    if (options.clients if options.rate is None else options.rate) <= 0:
        raise ValueError(f"clients is {options.clients} and rate {options.rate}; a load needs one of them above 0")
    if not 0 <= options.drop <= (1 if options.stream else 0):
        raise ValueError(f"drop is {options.drop}; it is a share of the requests from 0 to 1, of streams only")
    if options.seed is None:
        options = replace(options, seed=random.randrange(2**32))
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout, connector = aiohttp.ClientTimeout(total=options.timeout), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(options.url, headers=headers, timeout=timeout, connector=connector) as session:
        body_of = await request_bodies(session, options)

        def request(number: int) -> Coroutine[None, None, Answer]:
            rng = random.Random(f"{options.seed} {number}")
            patience = rng.randint(1, 4) if rng.random() < options.drop else None
            return ask(session, body_of(rng), patience)

        arrivals = closed_loop if options.rate is None else open_loop
        return summarize(await arrivals(request, options))


async def request_bodies(session: aiohttp.ClientSession, options: Options) -> Callable[[random.Random], dict]:
    """A function that makes the body of a request. Asks the service for its models and for how it counts tokens."""
    model = options.model
    if model is None:
        async with session.get("/v1/models") as response:
            model = (await checked(response))["data"][0]["id"]

    def body(prompt: str, max_tokens: int, stream: bool) -> dict:
        request = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return request | {"temperature": options.temperature} | (streaming if stream else {})

    async def count(words: int) -> int:
        request = body(made_up(words, random.Random(words)), 1, stream=False)
        async with session.post("/v1/chat/completions", json=request) as response:
            return (await checked(response))["usage"]["prompt_tokens"]

    if (prompt := options.prompt) is not None:
        return lambda rng: body(prompt, rng.choice(options.max_tokens), options.stream)
    few, many = await count(8), await count(40)
    tokens_per_word = max(many - few, 1) / 32
    around = few - 8 * tokens_per_word  # tokens of the template

    def body_of(rng: random.Random) -> dict:
        words = round((rng.choice(options.prompt_tokens) - around) / tokens_per_word)
        return body(made_up(words, rng), rng.choice(options.max_tokens), options.stream)

    return body_of


def made_up(words: int, rng: random.Random) -> str:
    """Words of one letter: most tokenizers have a token for each."""
    return " ".join(rng.choices(string.ascii_lowercase, k=max(1, words)))


async def checked(response: aiohttp.ClientResponse) -> dict:
    if response.status != 200:
        raise OSError(f"{response.url} answered {response.status}: {(await response.text())[:300]}")
    return await response.json()


async def closed_loop(request: Callable, options: Options) -> list[Answer]:
    """Run clients that each send their next request when the last has ended, or after the Retry-After of a refusal."""
    numbers, answers = itertools.count(), []
    limit, deadline = limits(options)

    async def client() -> None:
        wait = 0.0
        while time.perf_counter() + wait < deadline and (number := next(numbers)) < limit:
            await asyncio.sleep(wait)
            answer = await request(number)
            wait = min(answer.retry_after, MAX_WAIT) if answer.outcome == "rejected" else 0.0
            answers.append(answer)

    await asyncio.gather(*(client() for _ in range(options.clients)))
    return answers


async def open_loop(request: Callable, options: Options) -> list[Answer]:
    """Start requests at exponentially distributed intervals, without waiting for their answers."""
    assert options.rate
    rng, tasks = random.Random(options.seed), []
    limit, deadline = limits(options)
    arrival = time.perf_counter()
    while len(tasks) < limit and arrival < deadline:
        await asyncio.sleep(arrival - time.perf_counter())
        tasks.append(asyncio.create_task(request(len(tasks))))
        arrival += rng.expovariate(options.rate)
    return await asyncio.gather(*tasks)


def limits(options: Options) -> tuple[float, float]:
    """Return the number of requests, and the time until which requests may begin."""
    if options.duration is None:
        return options.requests or 64, math.inf
    return options.requests or math.inf, time.perf_counter() + options.duration


async def ask(session: aiohttp.ClientSession, body: dict, patience: int | None) -> Answer:
    """Send one request, read its answer to the end, or hang up after `patience` messages."""
    answer = Answer(time.perf_counter())
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            if response.status in (429, 503):
                answer.outcome, answer.retry_after = "rejected", float(response.headers.get("Retry-After", 1))
                await response.read()
            elif not body.get("stream"):
                usage = (await checked(response))["usage"]
                answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                answer.outcome = "ok"
            elif response.status != 200:
                await checked(response)
            else:
                await read_stream(response, answer, patience)
    except (OSError, aiohttp.ClientError, ValueError, LookupError) as error:
        answer.outcome, answer.error = "failed", f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    return answer


async def read_stream(response: aiohttp.ClientResponse, answer: Answer, patience: int | None) -> None:
    """Raises ValueError for an error event, or a stream without its usage, its finish reason or its end."""
    finish_reason, usage, done = None, None, False
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or done:
            continue
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise ValueError(event["error"]["message"])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            if choice["delta"].get("content"):
                answer.messages.append(time.perf_counter())
        if patience is not None and len(answer.messages) >= patience:
            answer.outcome = "dropped"
            response.close()
            return
    if not (done and usage and finish_reason):
        raise ValueError("the stream ended early")
    answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    answer.outcome = "ok"


def summarize(answers: list[Answer]) -> Result:
    outcomes = Counter(answer.outcome for answer in answers)
    full = [answer for answer in answers if answer.outcome == "ok"]
    streams = [answer for answer in full if answer.messages]
    seconds = max(a.ended for a in answers) - min(a.began for a in answers) if answers else math.nan
    tokens = sum(answer.tokens for answer in full)
    ttft = [answer.messages[0] - answer.began for answer in streams]
    inter_token = [(a.messages[-1] - a.messages[0]) / (a.tokens - 1) for a in streams if a.tokens > 1]
    gaps = [later - earlier for a in streams for earlier, later in itertools.pairwise(a.messages)]
    latency = [answer.ended - answer.began for answer in full]
    rejection = [answer.ended - answer.began for answer in answers if answer.outcome == "rejected"]
    return Result(
        requests=len(answers),
        **{outcome: outcomes[outcome] for outcome in ("ok", "rejected", "dropped", "failed")},
        seconds=seconds,
        prompt_tokens=sum(answer.prompt_tokens for answer in full),
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        requests_per_s=len(full) / seconds,
        ttft_p50=percentile(ttft, 50),
        ttft_p95=percentile(ttft, 95),
        inter_token_p50=percentile(inter_token, 50),
        inter_token_p95=percentile(inter_token, 95),
        gap_p50=percentile(gaps, 50),
        gap_p95=percentile(gaps, 95),
        latency_p50=percentile(latency, 50),
        latency_p95=percentile(latency, 95),
        rejection_p95=percentile(rejection, 95),
        errors=dict(Counter(answer.error for answer in answers if answer.outcome == "failed")),
    )


def percentile(values: list[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else math.nan


def show(result: Result) -> None:
    table = Table(show_header=False)
    r = result
    counts = f"{r.ok} ok, {r.rejected} rejected, {r.dropped} dropped, {r.failed} failed"
    table.add_row("requests", f"{r.requests}: {counts}, in {r.seconds:.1f} s")
    table.add_row(
        "tokens of full answers", f"{r.tokens:,} ({r.tokens_per_s:,.0f} a second), prompts {r.prompt_tokens:,}"
    )
    for name, p50, p95 in (
        ("time to first token", r.ttft_p50, r.ttft_p95),
        ("between tokens", r.inter_token_p50, r.inter_token_p95),
        ("between messages", r.gap_p50, r.gap_p95),
        ("whole answer", r.latency_p50, r.latency_p95),
    ):
        table.add_row(name, f"{p50 * 1000:,.1f} ms, p95 {p95 * 1000:,.1f} ms")
    if r.rejected:
        table.add_row("rejection", f"p95 {r.rejection_p95 * 1000:,.1f} ms")
    for error, times in r.errors.items():
        table.add_row("error", f"{times} × {error}")
    Console().print(table)


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    result = run(options)
    show(result)
    if options.json:
        figures = asdict(result).items()
        print(json.dumps({name: None if figure != figure else figure for name, figure in figures}))  # NaN is not JSON


if __name__ == "__main__":
    main()
