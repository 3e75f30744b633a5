"""How fast the engine generates: decoding at several batch sizes, a long prompt beside running streams, prefix reuse.

Random weights, random prompts. The target of a batch size scales with the fp32 2048³ matmul of the same run; 700, 3,500
and 7,000 tok/s at batch 1, 8 and 32 belong to 270 GFLOP/s.

    python -m benchmarks.engine --depth 6 --vocab 8192 --batch 1 8 32
"""

import json
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.session import one_line_errors
from nanochat_ray.train.metrics import peak_flops

TARGETS = {1: 700, 8: 3500, 32: 7000}  # tok/s where the matmul peak is TARGET_PEAK
TARGET_PEAK = 270e9


@dataclass
class Options:
    depth: int = 6
    head_dim: int = 64
    seq: int = 2048
    """T, which decides the windows."""
    vocab: int = 8192
    window_pattern: str = "SSSL"
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 128
    """Tokens of each answer."""
    batch: tuple[int, ...] = (1, 8, 32)
    dtype: tuple[str, ...] = ("bfloat16", "float32")
    temperature: float = 1.0
    top_k: int | None = None
    compile: bool = True
    streams: int = 8
    """Running streams while the long prompt is read."""
    long_prompt: int = 1500
    json: bool = False
    """End with one line of JSON."""


def build(options: Options, dtype: str) -> GPT:
    torch.manual_seed(0)
    heads = -(-64 * options.depth // options.head_dim)
    width = heads * options.head_dim
    config = GPTConfig(options.seq, options.vocab, options.depth, heads, heads, width, options.window_pattern)
    model = GPT(config)
    model.init_weights()
    return model.set_compute_dtype(getattr(torch, dtype)).eval()


def prompts(options: Options, count: int, length: int) -> list[list[int]]:
    return torch.randint(options.vocab, (count, length)).tolist()


def step(engine: Engine) -> float:
    """Its seconds."""
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def decode_speed(engine: Engine, options: Options, batch: int) -> float:
    """Tokens per second of the median step in which all of a batch decode."""
    sequences, chunk = [], engine.chunk
    engine.chunk = options.prompt  # a prompt a step
    for prompt in prompts(options, batch, options.prompt):
        sequences += engine.submit(prompt, SamplingParams(batch + options.new, options.temperature, options.top_k))
    while engine.scheduler.waiting:
        engine.step()
    engine.chunk, seconds = chunk, []
    while all(sequence.finish_reason is None for sequence in sequences):
        seconds.append(step(engine))
    for sequence in sequences:
        engine.cancel(sequence)
    return batch / statistics.median(seconds)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def fairness(engine: Engine, options: Options) -> tuple[float, float, float]:
    """p95 of the time between tokens of running streams: alone, while a long prompt is read; its first token's time."""
    params = SamplingParams(400, options.temperature, options.top_k)
    streams = [engine.submit(prompt, params)[0] for prompt in prompts(options, options.streams, options.prompt)]
    while engine.scheduler.waiting:
        engine.step()

    alone = [step(engine) for _ in range(100)]
    [long_prompt] = prompts(options, 1, options.long_prompt)
    long, beside = engine.submit(long_prompt, SamplingParams(4))[0], []
    while not long.generated:
        beside.append(step(engine))
    for sequence in [*streams, long]:
        engine.cancel(sequence)
    return percentile(alone, 0.95), percentile(beside, 0.95), sum(beside)


def first_token(engine: Engine, prompt: list[int]) -> float:
    began = time.perf_counter()
    sequence = engine.submit(prompt, SamplingParams(1))[0]
    while sequence.finish_reason is None:
        engine.step()
    return time.perf_counter() - began


def prefix_reuse(engine: Engine, options: Options) -> tuple[float, float]:
    """Seconds to the first token of a chat's sixth turn of 160 tokens each: with the turns before cached, and cold."""
    ratios = []
    for _ in range(5):
        warm, cold = prompts(options, 2, 6 * 160)
        for turn in range(1, 6):
            engine.generate([warm[: turn * 160 - 80]], SamplingParams(1))
        ratios.append((first_token(engine, warm), first_token(engine, cold)))
    return tuple(statistics.median(times) for times in zip(*ratios, strict=True))


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console, numbers = Console(), {}
    peak = peak_flops(torch.device("cpu"), torch.float32)
    table = Table(
        "dtype", "batch", "tok/s", "target here", "ratio", title=f"decoding, fp32 peak {peak / 1e9:.0f} GFLOP/s"
    )
    for dtype in options.dtype:
        engine = Engine(build(options, dtype), None, max(options.batch))
        if options.compile:
            engine.compile()
        for batch in options.batch:
            decode_speed(engine, options, batch)  # compiles
        for batch in options.batch:
            speed = statistics.median(decode_speed(engine, options, batch) for _ in range(3))
            numbers[f"{dtype}/decode_{batch}"] = speed
            target = TARGETS.get(batch, float("nan")) * peak / TARGET_PEAK
            table.add_row(dtype, str(batch), f"{speed:,.0f}", f"{target:,.0f}", f"{speed / target:.2f}")
        fairness(engine, options)
        rounds = [fairness(engine, options) for _ in range(15)]
        alone, beside, seconds = (statistics.median(times) for times in zip(*rounds, strict=True))
        unfair = statistics.median(beside / alone for alone, beside, _ in rounds)
        numbers |= {f"{dtype}/fairness": unfair, f"{dtype}/long_prompt_seconds": seconds}
        warm, cold = prefix_reuse(engine, options)
        numbers[f"{dtype}/prefix_reuse"] = warm / cold
        table.caption = (table.caption or "") + (
            f"{dtype}: p95 between tokens of {options.streams} streams {alone * 1e3:.1f} ms alone, "
            f"{beside * 1e3:.1f} ms beside a prompt of {options.long_prompt} tokens ({unfair:.2f}x), "
            f"which takes {seconds:.2f} s; "
            f"turn 6 of a chat {warm * 1e3:.0f} ms, cold {cold * 1e3:.0f} ms ({warm / cold:.2f}x)\n"
        )
    console.print(table)
    if options.json:
        print(json.dumps({"fp32_peak": peak, **numbers}))


if __name__ == "__main__":
    main()
