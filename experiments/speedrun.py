"""From raw text to a talking model: source, tokenizer, rows, pretraining, finetuning, chat answers, report.

    python -m experiments.speedrun                 a laptop: embedded Ray, minutes
    ray job submit --working-dir . -- python -m experiments.speedrun --preset gpu

Every stage is skipped when its output is there for the same inputs, so a speedrun that was stopped goes on.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import ray
import torch
import tyro

from experiments.report import write_report
from nanochat_ray import storage
from nanochat_ray.cli import one_line_errors, start_ray
from nanochat_ray.data import prepare, sources
from nanochat_ray.evals.tasks import offline_mixture
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import RunPlan, plan_run
from nanochat_ray.train import checkpoint, hosts, pretrain, sft

QUESTIONS = ("What is 12 * 34?", "How many times does the letter r occur in strawberry?", "What does `json.dumps` do?")


@dataclass(frozen=True)
class Preset:
    """What a machine can do in one go; the depth decides the rest."""

    depth: int
    source: str
    vocab_size: int
    sequence_len: int
    head_dim: int
    window_pattern: str
    ratio: float | None  # tokens per scaling parameter, or
    minutes: float | None  # as much pretraining as this machine does in so long
    total_batch_size: int | None
    lr_factor: float  # times the plan's learning rates
    eval_tokens: int


PRESETS = {
    # A small batch, because a slow CPU makes few steps in its minutes, and the first 40 only warm up. The rates are not
    # lowered for it: see sweep.PRESETS.
    "cpu": Preset(4, "pydocs", 8192, 512, 64, "L", None, 5, 2048, 16, 16_384),
    "gpu": Preset(24, "climbmix", 32768, 2048, 128, "SSSL", 8, None, None, 1, 10_485_760),
}
SFT_SHARE = 0.4  # finetuning's steps for each of pretraining's, where minutes decide
TOKENS_PER_CLIMBMIX_SHARD = 34_000_000  # 250 million characters at 4.8 a token, a third lost to cropping


@dataclass
class SpeedrunOptions:
    depth: int | None = None
    """The one dial; the default is 4 without GPUs and 24 with."""
    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu: minutes on a laptop, on docstrings of the installed packages. gpu: hours on 8 GPUs, on climbmix; of a
    cluster that has none yet, gpu asks for one, or for --workers of them. auto: what the cluster has."""
    source: str | None = None
    """pydocs, climbmix, or a folder of parquet, jsonl or txt files; the default is the preset's."""
    minutes: float | None = None
    """How long the cpu preset pretrains on this machine; the default is 5."""
    workers: int | None = None
    """Training workers; the default is every GPU of the cluster, else one a host."""
    wait_minutes: float = 10
    """How long to wait for hosts with room for all workers; then training starts with fewer, and takes what comes."""
    run: str | None = None
    """Name of the run folder; the default is made of the options."""


class Stages:
    """Runs the stages in turn and keeps the wall time and result of each in stages.json."""

    def __init__(self, run_dir: str):
        self.uri = storage.join(run_dir, "stages.json")
        self.records = storage.read_json(self.uri) if storage.exists(self.uri) else []

    def run(self, name: str, stage: Callable, describe: Callable[[object], dict]):
        print(f"\n=== {name}", flush=True)
        record = next((r for r in self.records if r["stage"] == name), None)
        if record is None:
            record = {"stage": name, "seconds": 0.0, "result": {}}
            self.records.append(record)
        started = time.monotonic()
        try:
            result = stage()
            record["result"] = describe(result)
            return result
        finally:  # time counts when the stage is stopped, too
            record["seconds"] += time.monotonic() - started
            storage.write_json(self.uri, self.records)


def run(options: SpeedrunOptions) -> str:
    """Run all stages; returns the uri of the report. Raises what the stages raise."""
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    # Preparing needs no GPUs: a cluster is asked for them when training starts. What can't be is refused now.
    use_gpu = {"auto": None, "cpu": False, "gpu": True}[options.preset]
    hosts.scaling_config(options.workers, use_gpu)
    request = {"workers": options.workers, "use_gpu": use_gpu, "wait_minutes": options.wait_minutes}
    preset = PRESETS[("gpu" if has_gpu else "cpu") if options.preset == "auto" else options.preset]
    if options.minutes and preset.minutes:
        preset = replace(preset, minutes=options.minutes)
    depth, source = options.depth or preset.depth, options.source or preset.source
    name = options.run or f"speedrun-d{depth}-{storage.fingerprint(depth, source, asdict(preset))[:6]}"
    run_dir = storage.join(storage.home(), "runs", name)
    plan = find_plan(run_dir, depth, preset)
    stages = Stages(run_dir)
    print(f"speedrun: depth {depth}, {plan.num_iterations} steps of {plan.total_batch_size:,} tokens, in {run_dir}")

    shards = min(math.ceil(plan.total_tokens / TOKENS_PER_CLIMBMIX_SHARD), sources.CLIMBMIX_LAST)
    text = stages.run(
        "source", lambda: sources.resolve(source, shards=shards), lambda s: {"files": len(s.train) + len(s.val)}
    )
    prepare_options = prepare.PrepareOptions(
        source=source, shards=shards, vocab_size=preset.vocab_size, sequence_len=preset.sequence_len
    )
    stages.run("tokenizer", lambda: prepare.find_or_train_tokenizer(prepare_options, text), lambda t: {"folder": t[0]})
    counted = ("rows", "tokens", "cropped_tokens")
    prepared = stages.run(
        "rows",
        lambda: prepare.run(prepare_options),
        lambda p: {name: p.manifest["splits"]["train"][name] for name in counted},
    )
    base = stages.run(
        "pretrain",
        lambda: pretrain.run(pretrain_options(preset, plan, prepared.rows, name, **request)),
        lambda r: {"steps": r.step, "val/bpb": r.val_bpb},
    )
    pydocs_shards = [shard.uri for shard in sources.resolve("pydocs").train]
    conversations = {split: offline_mixture(split, pydocs_shards) for split in ("train", "val")}
    tuned = stages.run(
        "sft",
        lambda: sft.run(sft_options(preset, plan, base.checkpoint, name, **request), *conversations.values()),
        lambda r: {"steps": r.step, "val/bpb of the assistant": r.val_bpb},
    )
    answers = stages.run("chat", lambda: ask(tuned.checkpoint), lambda a: {"answers": len(a)})
    storage.write_json(storage.join(run_dir, "chat.json"), answers)
    report = storage.join(run_dir, "report.html")
    write_report([run_dir], report, title=f"Speedrun, depth {depth}")
    summarize(run_dir, base.val_bpb, answers, stages.records, report, tuned.checkpoint)
    return report


def find_plan(run_dir: str, depth: int, preset: Preset) -> RunPlan:
    """The plan of the depth, or on a second start the one that the first decided on."""
    dial = {
        "target_param_data_ratio": preset.ratio or 12,
        "sequence_len": preset.sequence_len,
        "vocab_size": preset.vocab_size,
        "head_dim": preset.head_dim,
        "window_pattern": preset.window_pattern,
        "total_batch_size": preset.total_batch_size,
    }
    if preset.minutes is None:
        return plan_run(depth, **dial)
    config = storage.join(run_dir, "config.json")
    if storage.exists(config):
        num_iterations = storage.read_json(config)["plan"]["num_iterations"]
    else:
        num_iterations = max(1, int(preset.minutes * 60 / step_seconds(plan_run(depth, **dial))))
    return plan_run(depth, num_iterations=num_iterations, **dial)


def step_seconds(plan: RunPlan) -> float:
    """How long this machine's CPUs take for one training step of the plan: the fastest of four, as Ray is starting."""
    model = GPT(plan.config)
    model.init_weights()
    model.set_compute_dtype(checkpoint.compute_dtype(None, "cpu"))
    optimizer = build_optimizer(model, **plan.lrs, weight_decay=plan.weight_decay)
    rows = plan.total_batch_size // plan.config.sequence_len
    idx = torch.randint(plan.config.vocab_size, (rows, plan.config.sequence_len))
    seconds = []
    for _ in range(4):
        started = time.monotonic()
        model(idx, idx).backward()
        optimizer.step()
        seconds.append(time.monotonic() - started)
    return min(seconds)


def pretrain_options(preset: Preset, plan: RunPlan, rows: str, name: str, **request):
    return pretrain.PretrainOptions(
        depth=plan.depth,
        rows=rows,
        run=name,
        head_dim=preset.head_dim,
        window_pattern=preset.window_pattern,
        target_param_data_ratio=preset.ratio or 12,
        total_batch_size=plan.total_batch_size,
        lr_factor=preset.lr_factor,
        num_iterations=plan.num_iterations,
        compile=compiles(preset),
        eval_every=max(plan.num_iterations // 4, 1) if preset.minutes else 250,
        eval_tokens=preset.eval_tokens,
        save_every=max(plan.num_iterations // 2, 1) if preset.minutes else 1000,
        **request,
    )


def sft_options(preset: Preset, plan: RunPlan, base: str, name: str, **request) -> sft.SftOptions:
    steps = None
    if preset.minutes:
        steps = max(1, round(SFT_SHARE * plan.num_iterations))
    return sft.SftOptions(base, run=f"{name}-sft", steps=steps, compile=compiles(preset), **request)


def compiles(preset: Preset) -> bool | None:
    return False if preset.minutes else None  # compiling would take a good part of the minutes


def ask(folder: str) -> list[dict]:
    """Greedy answers of the finished model to a few questions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, _ = checkpoint.load_model(folder, device)
    conversations = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    completions = Engine(model, tokenizer).generate(prompts, SamplingParams(max_tokens=64, temperature=0.0))
    return [
        {"prompt": question, "answer": tokenizer.decode(completion.tokens)}
        for question, completion in zip(QUESTIONS, completions, strict=True)
    ]


def summarize(run_dir: str, val_bpb: float, answers: list[dict], records: list[dict], report: str, tuned: str) -> None:
    samples = storage.read_text(storage.join(run_dir, "samples.md")).rpartition("## ")[2]
    print(f"\n=== samples at {samples.strip()}\n\n=== chat")
    for answer in answers:
        print(f"> {answer['prompt']}\n{answer['answer']}")
    print("\n=== done")
    for record in records:
        print(f"{record['stage']:<10}{record['seconds']:8.1f} s")
    print(f"val/bpb   {val_bpb:10.4f}\nreport    {report}\ntalk      nanochat-ray chat --checkpoint {tuned}")


@one_line_errors
def main() -> None:
    options = tyro.cli(SpeedrunOptions, prog="python -m experiments.speedrun", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
