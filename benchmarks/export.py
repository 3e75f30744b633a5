"""What an export costs, and how fast transformers generates from it beside our engine.

Random weights. Both sides answer the same prompts greedily, in turns, and the medians count; the engine is compiled
unless told otherwise, transformers runs as `generate` does by default.

    python -m benchmarks.export --depth 4 --batch 1 8 32
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.engine import build, prompts
from nanochat_ray import storage
from nanochat_ray.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_ray.export import ExportOptions, run
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.session import one_line_errors
from nanochat_ray.train.checkpoint import load_model, save_checkpoint


@dataclass
class Options:
    depth: int = 4
    export_depths: tuple[int, ...] = (4, 12)
    """Depths of models to export, with a head size of 128 and 32,768 tokens."""
    head_dim: int = 64
    seq: int = 2048
    vocab: int = 8192
    window_pattern: str = "SSSL"
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 64
    """Tokens of each answer."""
    batch: tuple[int, ...] = (1, 8, 32)
    dtype: str = "float32"
    rounds: int = 3
    compile: bool = True
    json: bool = False
    """End with one line of JSON."""


def any_tokenizer(vocab_size: int) -> Tokenizer:
    """Of tokens that no text was asked for: all bytes, then pairs of them."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    return Tokenizer({token: i for i, token in enumerate(tokens[: vocab_size - len(SPECIAL_TOKENS)])})


def checkpoint(options: Options, folder: str) -> str:
    return save_checkpoint(folder, 1, build(options, "float32"), None, any_tokenizer(options.vocab), {})


def export(options: Options, depth: int) -> dict:
    """Seconds and bytes of each format of a random model."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        large = Options(depth=depth, head_dim=128, vocab=32768)
        made = checkpoint(large, f"{folder}/run")
        for format, dtype in (("hf", "float32"), ("hf", "bfloat16"), ("nanochat", "float32")):
            began = time.perf_counter()
            run(ExportOptions(made, f"{folder}/out", format, dtype))
            seconds = time.perf_counter() - began
            size = sum(size for _, size in storage.walk(f"{folder}/out"))
            found[f"{format} {dtype}"] = {"seconds": seconds, "bytes": size}
            storage.remove(f"{folder}/out")
    return found


def generate(options: Options, folder: str) -> dict[int, dict[str, float]]:
    """Tokens per second by batch size: of the engine and of transformers, prompts read and all."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    made = checkpoint(options, f"{folder}/run")
    run(ExportOptions(made, f"{folder}/hf"))
    model, _, _ = load_model(made, dtype=options.dtype)
    theirs = AutoModelForCausalLM.from_pretrained(
        f"{folder}/hf", trust_remote_code=True, dtype=getattr(torch, options.dtype)
    )
    settings = GenerationConfig(do_sample=False, max_new_tokens=options.new, pad_token_id=0)
    engine = Engine(model, max_batch_size=max(options.batch))  # without a tokenizer nothing ends an answer early
    if options.compile:
        engine.compile()
    theirs.generation_config = settings
    params = SamplingParams(options.new, temperature=0.0)
    found = {}
    for batch in options.batch:
        speeds = {"engine": [], "transformers": []}
        for _ in range(options.rounds + 1):  # the first warms up
            asked = prompts(options, batch, options.prompt)  # new ones: the engine would know the old
            began = time.perf_counter()
            engine.generate(asked, params)
            between = time.perf_counter()
            theirs.generate(torch.tensor(asked))
            ended = time.perf_counter()
            for name, seconds in (("engine", between - began), ("transformers", ended - between)):
                speeds[name].append(batch * options.new / seconds)
        found[batch] = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    return found


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_MODULES_CACHE", str(Path(folder) / "modules"))
        speeds = generate(options, folder)
    exports = {depth: export(options, depth) for depth in options.export_depths}
    table = Table("batch", "engine tok/s", "transformers tok/s", "ratio")
    for batch, found in speeds.items():
        ratio = found["engine"] / found["transformers"]
        figures = f"{found['engine']:,.0f}", f"{found['transformers']:,.0f}", f"{ratio:.2f}"
        table.add_row(str(batch), *figures)
    Console().print(table)
    table = Table("depth", "format", "seconds", "MB")
    for depth, formats in exports.items():
        for name, found in formats.items():
            table.add_row(str(depth), name, f"{found['seconds']:.1f}", f"{found['bytes'] / 1e6:,.1f}")
    Console().print(table)
    if options.json:
        print(storage.to_json({"generate": speeds, "export": exports}))


if __name__ == "__main__":
    main()
