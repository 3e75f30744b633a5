"""Speed of CORE: examples per second, and with --naive how many times that of one forward an example.

    python -m benchmarks.eval --naive                                        a random model, tasks made of help texts
    python -m benchmarks.eval --checkpoint DIR --bundle DIR --naive --json   the last line is JSON

The naive evaluator encodes each choice's whole prompt, runs an example's choices as one padded batch without a cache,
and takes the losses from whole logits. Both evaluators' decisions are compared.
"""

import json
import os
import pydoc_data.topics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals import bundle
from nanochat_ray.evals.core import draw_shots, evaluate_core
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train.checkpoint import compute_dtype, load_model

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "nanochat_d2"
TIED = 1e-5  # mean losses this close may be ordered by rounding


@dataclass
class EvalBenchmarkOptions:
    checkpoint: str | None = None
    """Folder of a checkpoint; without it a random model of depth 4 is taken."""
    bundle: str | None = None
    """Folder of a CORE bundle; without it one of each kind of task is made of Python's help texts."""
    max_per_task: int = 100
    """Examples of each task; -1 for all."""
    tasks: list[str] | None = None
    """Only these tasks."""
    naive: bool = False
    """Run the naive evaluator too."""
    actors: int = 0
    """Share the work among this many Ray actors, whose start is counted; 0 for this process alone."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    json: bool = False
    """Print the figures as one JSON object on the last line."""


def run(options: EvalBenchmarkOptions) -> dict:
    """Measure; every time includes reading the bundle and tokenizing."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundle or make_bundle(scratch)
        if options.checkpoint:
            model, tokenizer, _ = load_model(options.checkpoint, options.device, options.dtype)
        else:
            model, tokenizer = random_model(options)
        selection = (folder, options.max_per_task, options.tasks)
        evaluate_core(model, tokenizer, folder, 2, options.tasks)  # what is done once, such as starting threads
        began = time.perf_counter()
        result = evaluate_core(model, tokenizer, *selection, options.actors)
        seconds = time.perf_counter() - began
        count = sum(map(len, result.examples.values()))
        figures = {
            "examples": count,
            "tasks": len(result.examples),
            "threads": torch.get_num_threads(),
            "actors": options.actors,
            "dtype": str(model.compute_dtype).removeprefix("torch."),
            "core_metric": result.core_metric,
            "examples_per_sec": count / seconds,
        }
        if options.naive:
            began = time.perf_counter()
            decisions = naive(model, tokenizer, bundle.read_tasks(*selection))
            seconds = time.perf_counter() - began
            pairs = [pair for name in decisions for pair in zip(result.examples[name], decisions[name], strict=True)]
            figures |= {
                "naive_examples_per_sec": count / seconds,
                "ratio": figures["examples_per_sec"] * seconds / count,
                "differing_decisions": sum(ours["correct"] != correct for ours, (correct, _) in pairs),
                "of_these_ties": sum(ours["correct"] != correct and tied for ours, (correct, tied) in pairs),
            }
    return figures


@torch.inference_mode()
def naive(model: GPT, tokenizer: Tokenizer, tasks: list[bundle.Task]) -> dict[str, list[tuple[bool, bool]]]:
    """For each example of each task, one forward after the other: is it right, and was it a tie?"""
    decisions = {}
    for task in tasks:
        decisions[task.name] = []
        for i, example in enumerate(task.examples):
            shown = [task.examples[j] for j in draw_shots(i, len(task.examples), task.shots)]
            before = "".join(shot.texts[shot.gold] + "\n\n" for shot in shown)
            sequences = [[tokenizer.bos_id, *tokenizer.encode(before + text)] for text in example.texts]
            if task.kind == "multiple_choice":
                starts = [shared(sequences)] * len(sequences)
            elif task.kind == "schema":
                suffix = shared([sequence[::-1] for sequence in sequences])
                starts = [len(sequence) - suffix for sequence in sequences]
            else:
                starts = [1 + len(tokenizer.encode((before + example.opening).strip()))]
            longest = max(map(len, sequences))
            idx = torch.tensor([s + [tokenizer.bos_id] * (longest - len(s)) for s in sequences])
            logits, targets = model(idx.to(model.lm_head.weight.device)).cpu()[:, :-1], idx[:, 1:]
            if task.kind == "language_modeling":
                right = (logits.argmax(dim=-1) == targets)[0, starts[0] - 1 :].all()
                decisions[task.name].append((bool(right), False))
                continue
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            spans = zip(losses, starts, sequences, strict=True)
            means = [row[start - 1 : len(sequence) - 1].mean().item() for row, start, sequence in spans]
            pred = means.index(min(means))
            tied = any(abs(mean - means[pred]) < TIED for j, mean in enumerate(means) if j != pred)
            decisions[task.name].append((pred == example.gold, tied))
    return decisions


def shared(sequences: list[list[int]]) -> int:
    """How many tokens all begin with."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, sequences)))


def random_model(options: EvalBenchmarkOptions) -> tuple[GPT, Tokenizer]:
    """Depth 4, and weights of a size that makes its choices differ; the tests' tokenizer."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(str(TOKENIZER))
    model = GPT(GPTConfig(512, tokenizer.vocab_size, n_layer=4, n_head=2, n_kv_head=2, n_embd=256))
    model.init_weights()
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.02)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.to(options.device).set_compute_dtype(compute_dtype(options.dtype, options.device))
    return model.eval(), tokenizer


def make_bundle(folder: str) -> str:
    """A task of each kind, ten shots each: which halves of sentences of Python's help texts belong together?"""
    topics = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    sentences = [" ".join(sentence.split()) for sentence in topics.split(". ")]
    halves = [(s[: len(s) // 2].strip(), s[len(s) // 2 :].strip()) for s in sentences if 40 < len(s) < 400]
    tasks = {"multiple_choice": (25, []), "schema": (50, []), "language_modeling": (0, [])}
    for i, (begin, end) in enumerate(halves[:-3]):
        choices = [half[1] for half in halves[i + 1 : i + 4]]
        choices.insert(i % 4, end)
        contexts = [halves[i + 1][0]]
        contexts.insert(i % 2, begin)
        tasks["multiple_choice"][1].append({"query": begin, "choices": choices, "gold": i % 4})
        tasks["schema"][1].append({"context_options": contexts, "continuation": end, "gold": i % 2})
        tasks["language_modeling"][1].append({"context": begin, "continuation": end})
    entries, meta = [], ["Eval Task,Random baseline"]
    os.mkdir(f"{folder}/eval_data")
    for kind, (baseline, examples) in tasks.items():
        Path(f"{folder}/eval_data/{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in examples))
        entries.append({"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [10], "icl_task_type": kind})
        meta.append(f"{kind},{baseline}")
    Path(f"{folder}/core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    Path(f"{folder}/eval_meta_data.csv").write_text("\n".join(meta) + "\n")
    return folder


def report(figures: dict, options: EvalBenchmarkOptions) -> None:
    table = Table(title="CORE", show_header=False, title_justify="left", min_width=60)
    where = f"{figures['actors']} Ray actors" if figures["actors"] else f"{figures['threads']} threads"
    table.add_row("examples", f"{figures['examples']:,} of {figures['tasks']} tasks, {figures['dtype']}, {where}")
    table.add_row("CORE", f"{figures['core_metric']:.6f}")
    table.add_row("speed", f"{figures['examples_per_sec']:,.1f} examples/s")
    if options.naive:
        table.add_row("one forward an example", f"{figures['naive_examples_per_sec']:,.1f} examples/s")
        table.add_row("ratio", f"{figures['ratio']:.1f}")
        different = f"{figures['differing_decisions']}, {figures['of_these_ties']} of them ties within {TIED}"
        table.add_row("differing decisions", different)
    Console(highlight=False).print(table)
    if options.json:
        print(json.dumps(figures))


@one_line_errors
def main() -> None:
    options = tyro.cli(EvalBenchmarkOptions, prog="python -m benchmarks.eval", description=__doc__)
    if options.actors:
        start_ray()
    report(run(options), options)


if __name__ == "__main__":
    main()
