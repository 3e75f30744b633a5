"""Trains a chat model from raw text, in nanochat's stages.

Source, tokenizer, rows, pretraining, CORE, finetuning, ChatCORE, reinforcement learning, chat answers, report:

    python -m experiments.speedrun                 a laptop: embedded Ray, minutes
    ray job submit --working-dir . -- python -m experiments.speedrun --preset gpu

Everything that later stages need is checked first, and their data are prepared before pretraining. A stage is skipped
if its output exists for the same inputs. So after a stop, run the same command again to continue.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import ray
import ray.train
import torch
import tyro

from experiments import held_out, preflight
from experiments.report import write_report
from nanochat_ray import storage
from nanochat_ray.data import prepare, sources
from nanochat_ray.data.conversations import prepare_conversations
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals import bundle, chat, core
from nanochat_ray.evals.tasks import MixtureOptions, own, sft_conversations
from nanochat_ray.evals.tasks.rewarded import TaskOptions, load_task
from nanochat_ray.measuring import measuring, patiently
from nanochat_ray.model.compiling import why_not_compiled
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import RunPlan, plan_run
from nanochat_ray.session import bpb, check_once, one_line_errors, start_ray
from nanochat_ray.train import checkpoint, hosts, lease, pretrain, rl, sft
from nanochat_ray.train.metrics import read_metrics

COMPILING_PAYS = 2  # minutes of training from which compiling pays; it takes 50 s on a CPU the first time, 12 s later
Stage = Literal["core", "sft", "chatcore", "rl"]


@dataclass(frozen=True)
class Preset:
    """Settings for a kind of machine. The depth decides everything else."""

    depth: int
    source: str
    vocab_size: int
    sequence_len: int
    head_dim: int
    window_pattern: str
    ratio: float | None  # tokens per scaling parameter; None if `minutes` is set
    minutes: float | None  # pretraining time on this machine
    total_batch_size: int | None  # tokens per step of pretraining
    sft_batch_size: int | None  # tokens per step of finetuning; None if as in pretraining
    lr_factor: float  # factor on the plan's learning rates
    eval_tokens: int
    mixture: Literal["hub", "offline"]
    rl: dict  # options of RL that differ from the defaults
    skip: tuple[Stage, ...] = ()
    steps: int | None = None  # of pretraining and of finetuning, in place of ratio and minutes
    examples: int | None = None  # per dataset of the mixture and per task of CORE and ChatCORE; None for all


# RL of the matrices alone. With so few answers per step, AdamW's steps of the other parameters would be noise
# (docs/rl.md).
CPU_RL = {"max_new_tokens": 48, "eval_questions": 200, "eval_samples": 4, "lr_factor": 3, "adamw_factor": 0}
PRESETS = {
    # Batches are small, because a slow CPU makes few steps in these minutes, and the first 40 only warm up. With 4,096
    # tokens instead of 2,048, val/bpb was 5 % lower after two minutes, and equal after five (docs/performance).
    # Finetuning has less data, and gets smaller batches. lr_factor is explained at sweep.PRESETS.
    "cpu": Preset(
        4, "pydocs", 8192, 512, 64, "L", None, 5, 4096, 2048, 16, 16_384, "offline", CPU_RL, ("core", "chatcore")
    ),
    "gpu": Preset(24, "climbmix", 32768, 2048, 128, "SSSL", 8, None, None, None, 1, 10_485_760, "hub", {}),
}
REHEARSAL = {"minutes": None, "steps": 20, "examples": 16, "eval_tokens": 65_536}
REHEARSED_RL = {"steps": 3, "prompts_per_step": 4, "num_samples": 4, "max_new_tokens": 32, "eval_questions": 4}
# Steps of SFT and RL per step of pretraining, if `minutes` is set. A step of pretraining takes as long as two of SFT,
# and a step of RL as long as four of pretraining.
SFT_SHARE, RL_SHARE = 0.8, 0.08


@dataclass
class SpeedrunOptions:
    depth: int | None = None
    """The one dial. Default: 4 without GPUs, 24 with GPUs."""
    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu: minutes on a laptop, with docstrings of the installed packages. gpu: nanochat's speedrun, hours on 8 GPUs,
    with climbmix, the Hub's conversations, CORE and ChatCORE. If the cluster has no GPU yet, the gpu preset requests
    one, or --workers of them. auto: gpu if the cluster has GPUs."""
    source: list[str] | None = None
    """One source, or several to mix, each with its weight: see prepare --help. Default: the preset's."""
    minutes: float | None = None
    """Minutes of pretraining on this machine in the cpu preset. Default: 5."""
    skip: list[Stage] = field(default_factory=list)
    """Stages to skip: core, chatcore, rl, sft (and all stages after it)."""
    identity: str | None = None
    """A jsonl file of conversations about the assistant itself. Finetuning uses each twice: see docs/own-data.md."""
    datasets_dir: str | None = None
    """Folder with the Hub's layout for all datasets except climbmix. Default: download them from the Hub."""
    bundle: str | None = None
    """Folder of a CORE bundle. Default: download the published one once."""
    rehearse: bool = False
    """Run every stage with 20 steps and few examples, to check that all of them work here before a run of hours."""
    workers: int | None = None
    """Training workers. Default: every GPU of the cluster, else one per host."""
    use_gpu: bool | None = None
    """Use GPUs. Default: the preset's. The gpu preset on CPUs is for rehearsals with a small --depth."""
    fp8: bool = False
    """Pretrain with the blocks' matmuls in float8. Needs a Hopper GPU or later, and torchao (the extra `gpu`)."""
    wait_minutes: float = 10
    """Minutes to wait for hosts with room for all workers. Then training starts with fewer and grows later."""
    run: str | None = None
    """Name of the run folder. Default: made from the options."""


class Stages:
    """Runs the stages one by one, and keeps the wall time and result of each in stages.json."""

    def __init__(self, run_dir: str):
        self.uri = storage.join(run_dir, "stages.json")
        self.records = storage.read_json(self.uri) if storage.exists(self.uri) else []

    def result(self, name: str) -> dict:
        """The result of a finished stage; empty if it has not finished."""
        return next((record["result"] for record in self.records if record["stage"] == name), {})

    def run(self, name: str, stage: Callable, describe: Callable[[Any], dict]):
        print(f"\n=== {name}", flush=True)
        record: dict | None = next((r for r in self.records if r["stage"] == name), None)
        if record is None:
            record = {"stage": name, "seconds": 0.0, "result": {}}
            self.records.append(record)
        started = time.monotonic()
        try:
            result = stage()
            record["result"] = describe(result)
            return result
        finally:  # count the time of a stopped stage, too
            record["seconds"] += time.monotonic() - started
            with measuring("writing stages.json"):
                storage.write_json(self.uri, self.records)

    def measure(self, name: str, stage: Callable, describe: Callable[[Any], dict]):
        """Run a stage that no other stage needs. If it fails, the failure is noted and the result is None."""
        with measuring(name), patiently(name):
            return self.run(name, stage, describe)


def run(options: SpeedrunOptions) -> str:
    """Run all stages and return the URI of the report. Raises what the stages raise, except those that only measure."""
    job = find_job(options)
    with lease.hold(job.run_dir):
        return run_stages(job)


def run_stages(job: "Job") -> str:
    plan, stages = job.plan, Stages(job.run_dir)
    print(f"speedrun: depth {plan.depth}, {plan.num_iterations} steps of {plan.total_batch_size:,} tokens")
    print(f"in {job.run_dir}\n\n=== preflight", flush=True)
    preflight.run(checks(job, stages))

    prepare_options = prepare.PrepareOptions(
        source=job.source,
        shards=min(job.shards, prepare.PrepareOptions.shards),
        tokens=None if job.preset.steps else plan.total_tokens,
        vocab_size=plan.config.vocab_size,
        sequence_len=plan.config.sequence_len,
    )
    text = stages.run(
        "source", lambda: prepare.find_sources(prepare_options), lambda found: {"files": sum(s.files for s in found)}
    )
    stages.run("tokenizer", lambda: prepare.find_or_train_tokenizer(prepare_options, text), lambda t: {"folder": t[0]})
    counted = ("rows", "tokens", "cropped_tokens")
    prepared = stages.run(
        "rows",
        lambda: prepare.run(prepare_options, text),
        lambda p: {name: p.manifest["splits"]["train"][name] for name in counted},
    )
    # Prepare the data of later stages before pretraining, so that they don't fail hours later.
    if "sft" in job.after:
        conversations = stages.run("sft data", lambda: make_conversations(job, prepared.tokenizer, stages), dict)
    if "rl" in job.after:
        task = stages.run(
            "rl data", lambda: rl_task(job, stages), lambda task: {"questions": len(task.train)} if task else {}
        )
    if job.after & {"core", "chatcore"}:
        bundle_dir, problems = stages.run("eval data", lambda: load_eval_data(job, stages), lambda _: {})
    base = stages.run(
        "pretrain",
        lambda: pretrain.run(pretrain_options(job, prepared.rows)),
        lambda r: {"steps": r.step, "val/bpb": r.val_bpb},
    )
    newest, answers = base.checkpoint, []
    if "core" in job.after:
        stages.measure("core", lambda: stages.result("core") or measure_core(job, newest, bundle_dir), dict)
    if "sft" in job.after:
        tuned = stages.run(
            "sft",
            lambda: sft.run(sft_options(job, base.checkpoint, conversations["rows"]), conversations["folder"]),
            lambda r: {"steps": r.step, "val/bpb of the assistant": r.val_bpb},
        )
        newest = tuned.checkpoint
    if "chatcore" in job.after:
        stages.measure("chatcore", lambda: stages.result("chatcore") or measure_chatcore(job, newest, problems), dict)
    if "rl" in job.after:
        newest = stages.run("rl", lambda: reinforce(job, newest, task, stages), dict)["checkpoint"]
        if "chatcore" in job.after:
            stage = "chatcore after rl"
            stages.measure(stage, lambda: stages.result(stage) or measure_chatcore(job, newest, problems), dict)
    if "sft" in job.after:
        answered = stages.measure(
            "chat",
            lambda: on_gpus(job.use_gpu, "chat", held_out.ask, [(newest, job.pydocs)])[0],
            lambda answers: {answer["kind"]: answer["right"] / answer["of"] for answer in answers},
        )
        answers = answered or []
    return conclude(job, stages, answers, newest)


@dataclass(frozen=True)
class Job:
    """The options, resolved for this cluster."""

    options: SpeedrunOptions
    preset: Preset
    plan: RunPlan
    source: list[str]  # with weights
    shards: int  # estimated shards of climbmix; the exact number is known when the first shards are prepared
    mixture: MixtureOptions
    after: set[Stage]  # stages after pretraining that are not skipped
    scaling: ray.train.ScalingConfig
    request: dict  # options about workers for pretrain, sft and rl
    run_dir: str

    @property
    def takes_climbmix(self) -> bool:
        return "climbmix" in [sources.parse(text)[0] for text in self.source]

    @property
    def use_gpu(self) -> bool:
        return self.scaling.use_gpu

    @property
    def pydocs(self) -> list[str]:
        """Shards of the docstrings that finetuning asks about. The Hub's mixture has none."""
        return [shard.uri for shard in sources.resolve("pydocs").train] if self.mixture.mixture == "offline" else []


def find_job(options: SpeedrunOptions) -> Job:
    """Resolve the options. Raises ValueError for options that can't be used here."""
    # Only training requests GPUs from the cluster, but check now that the request is possible.
    use_gpu = {"auto": None, "cpu": False, "gpu": True}[options.preset] if options.use_gpu is None else options.use_gpu
    scaling = hosts.scaling_config(options.workers, use_gpu)
    preset = PRESETS[("gpu" if scaling.use_gpu else "cpu") if options.preset == "auto" else options.preset]
    if options.minutes and preset.minutes:
        preset = replace(preset, minutes=options.minutes)
    if options.rehearse:
        preset = replace(preset, **REHEARSAL, rl=REHEARSED_RL)
    depth, source = options.depth or preset.depth, options.source or [preset.source]
    inputs = storage.fingerprint(depth, " ".join(source), asdict(preset), options.identity)
    run_dir = storage.join(storage.home(), "runs", options.run or f"speedrun-d{depth}-{inputs[:6]}")
    plan = find_plan(run_dir, depth, preset)
    left_out = {*preset.skip, *options.skip} | ({"chatcore", "rl"} if "sft" in options.skip else set())
    return Job(
        options=options,
        preset=preset,
        plan=plan,
        source=source,
        shards=min(math.ceil(plan.total_tokens / sources.CLIMBMIX_TOKENS), sources.CLIMBMIX_LAST),
        mixture=MixtureOptions(
            preset.mixture,
            options.datasets_dir,
            conversations=[own.MIXTURE, f"{options.identity}=2"] if options.identity else [],
            max_rows=preset.examples,
        ),
        after=set(get_args(Stage)) - left_out,
        scaling=scaling,
        request={"workers": options.workers, "use_gpu": scaling.use_gpu, "wait_minutes": options.wait_minutes},
        run_dir=run_dir,
    )


def checks(job: Job, stages: Stages) -> preflight.Checks:
    """Checks of everything that the unfinished stages need."""
    found = {
        "packages": partial(preflight.packages, job.options.fp8, job.use_gpu),
        "memory": partial(preflight.memory, job.plan, job.scaling),
    }
    shards = job.shards if job.takes_climbmix else None
    needed = preflight.disk_parts(job.plan, job.run_dir, shards, bool(stages.result("rows")), "sft" in job.after)
    found["disk"] = partial(preflight.disk, needed)
    if shards:
        found["climbmix"] = partial(preflight.climbmix, shards)
    datasets = set()
    if "sft" in job.after and job.mixture.mixture == "hub" and not stages.result("sft data"):
        datasets |= preflight.SFT_DATASETS
    if "sft" in job.after and job.options.identity and not stages.result("sft data"):
        found["identity"] = partial(preflight.identity, job.options.identity)
    if "chatcore" in job.after and not stages.result("chatcore"):
        datasets |= preflight.CHATCORE_DATASETS
        found["sandbox"] = preflight.sandbox
    if "rl" in job.after and job.mixture.mixture == "hub" and not stages.result("rl"):
        datasets |= preflight.RL_DATASETS
    if "core" in job.after and not stages.result("core"):
        found["CORE bundle"] = partial(preflight.core_bundle, job.options.bundle)
    return found | preflight.datasets(datasets, job.options.datasets_dir)


def make_conversations(job: Job, tokenizer_uri: str, stages: Stages) -> dict:
    """{folder, inputs, …} of the rows for finetuning. Rows of the same inputs are reused."""
    tokenizer, T = Tokenizer.load(tokenizer_uri), job.plan.config.sequence_len
    identity = job.options.identity and storage.version(storage.absolute(job.options.identity))
    made, inputs = stages.result("sft data"), storage.fingerprint(asdict(job.mixture), identity, tokenizer.sha, T)
    if made.get("inputs") == inputs and storage.exists(storage.join(made["folder"], "manifest.json")):
        return made
    folder = prepare_conversations(sft_conversations(job.mixture), tokenizer, T)
    counts = storage.read_json(storage.join(folder, "manifest.json"))["train"]
    tokens, most = counts["rows"] * T, job.scaling.max_workers
    batch = sft.batch_size(job.plan.total_batch_size, tokens, T)
    if not sft_steps(job) and (batch < most * T or tokens < sft.MIN_STEPS * batch):
        raise ValueError(
            f"{tokens:,} tokens of conversations are too few: {most} workers would make fewer than {sft.MIN_STEPS} "
            "steps; add conversations, or --skip sft"
        )
    return {"folder": folder, "inputs": inputs} | {name: counts[name] for name in ("conversations", "rows", "tokens")}


def load_eval_data(job: Job, stages: Stages) -> tuple[str | None, dict[str, list[dict]]]:
    """(folder of CORE's bundle, ChatCORE's problems). None and {} if a score is skipped or measured already."""
    bundle_dir, problems = None, {}
    if "core" in job.after and not stages.result("core"):
        bundle_dir = storage.absolute(job.options.bundle) if job.options.bundle else bundle.fetch()
        bundle.read_tasks(bundle_dir)  # raises if a file is missing or damaged
    measured = ["chatcore", *["chatcore after rl"] * ("rl" in job.after)]
    if "chatcore" in job.after and not all(map(stages.result, measured)):
        problems = chat.load_problems(None, job.preset.examples, job.options.datasets_dir)
    return bundle_dir, problems


def measure_core(job: Job, folder: str, bundle_dir: str) -> dict[str, float]:
    """Measure CORE on all GPUs, or on this machine's CPUs. Its files are written to the checkpoint's folder."""
    actors = int(ray.cluster_resources().get("GPU", 0)) if job.use_gpu else 0
    examples = job.preset.examples or -1
    return core.run(core.CoreOptions(folder, bundle_dir, examples, actors=actors, device="cpu")).metrics()


def measure_chatcore(job: Job, folder: str, problems: dict[str, list[dict]]) -> dict[str, float]:
    """Measure ChatCORE, each task on its own GPU, or one after the other on this machine's CPUs."""
    parts = on_gpus(job.use_gpu, "chatcore", answer, [(folder, {name: tasks}) for name, tasks in problems.items()])
    result = chat.ChatResult()
    for part in parts:
        result.accuracy |= part.accuracy
        result.centered |= part.centered
        result.answers |= part.answers
    chat.save(result, folder)
    print(result.table())
    return result.metrics()


def on_gpus(use_gpu: bool, stage: str, function: Callable, calls: list[tuple]) -> list:
    """function(device, *call) for each call, in a Ray task with one GPU, or in this process on the CPUs.

    This process must not use a GPU directly, because another job may have reserved it in Ray."""
    if not use_gpu:
        return [function("cpu", *call) for call in calls]

    def begin(*call):
        yield  # tells the caller that the task has its GPU
        yield function("cuda", *call)

    task = ray.remote(num_gpus=1, num_returns="streaming")(begin)
    results = [task.remote(*call) for call in calls]
    hosts.until_started(results, stage)
    try:
        return [ray.get([*result][-1]) for result in results]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def answer(device: str, folder: str, problems: dict[str, list[dict]]) -> chat.ChatResult:
    model, tokenizer, _ = checkpoint.load_model(folder, device)
    return chat.evaluate_chat(model, tokenizer, problems)


def find_plan(run_dir: str, depth: int, preset: Preset) -> RunPlan:
    """The plan of the depth. A restarted run keeps the number of steps of its first start."""
    dial: dict = {
        "target_param_data_ratio": preset.ratio or 12,
        "sequence_len": preset.sequence_len,
        "vocab_size": preset.vocab_size,
        "head_dim": preset.head_dim,
        "window_pattern": preset.window_pattern,
        "total_batch_size": preset.total_batch_size,
    }
    if preset.minutes is None:
        return plan_run(depth, num_iterations=preset.steps, **dial)
    config = storage.join(run_dir, "config.json")
    if storage.exists(config):
        num_iterations = storage.read_json(config)["plan"]["num_iterations"]
    else:
        num_iterations = steps_in(preset.minutes, plan_run(depth, **dial))
    return plan_run(depth, num_iterations=num_iterations, **dial)


def steps_in(minutes: float, plan: RunPlan) -> int:
    """The training steps that this machine's CPUs make in so many minutes, from the fastest of four steps.

    The time to compile is subtracted. Workers don't compile again, because they use Inductor's cache.
    """
    began = time.monotonic()
    model = GPT(plan.config)
    model.init_weights()
    model.set_compute_dtype(checkpoint.compute_dtype(None, "cpu"))
    optimizer = build_optimizer(model, **plan.lrs, weight_decay=plan.weight_decay)
    rows = plan.total_batch_size // plan.config.sequence_len
    idx = torch.randint(plan.config.vocab_size, (rows, plan.config.sequence_len))
    if minutes >= COMPILING_PAYS and not why_not_compiled("cpu"):
        print("compiling the model and timing its steps", flush=True)
        model.compile_for_training()
        model(idx, idx).backward()
    seconds = []
    for _ in range(4):
        started = time.monotonic()
        model(idx, idx).backward()
        optimizer.step()
        seconds.append(time.monotonic() - started)
    return max(1, int((60 * minutes - (time.monotonic() - began)) / min(seconds)))


def pretrain_options(job: Job, rows: str) -> pretrain.PretrainOptions:
    preset, plan = job.preset, job.plan
    return pretrain.PretrainOptions(
        depth=plan.depth,
        rows=rows,
        run=storage.name(job.run_dir),
        head_dim=preset.head_dim,
        window_pattern=preset.window_pattern,
        target_param_data_ratio=plan.target_param_data_ratio,
        total_batch_size=plan.total_batch_size,
        lr_factor=preset.lr_factor,
        num_iterations=plan.num_iterations,
        compile=compiles(job),
        eval_every=max(plan.num_iterations // 4, 1) if preset.minutes else 250,
        eval_tokens=preset.eval_tokens,
        save_every=max(plan.num_iterations // 2, 1) if preset.minutes else 1000,
        fp8=job.options.fp8,
        **job.request,
    )


def sft_steps(job: Job) -> int | None:
    """The steps of finetuning. None for one epoch."""
    return max(1, round(SFT_SHARE * job.plan.num_iterations)) if job.preset.minutes else job.preset.steps


def sft_options(job: Job, base: str, rows: int) -> sft.SftOptions:
    steps = sft_steps(job)
    if job.preset.minutes:  # at most one epoch; in a second one the model memorizes these conversations
        assert steps and job.preset.sft_batch_size
        steps = min(steps, max(1, rows * job.plan.config.sequence_len // job.preset.sft_batch_size))
    options = sft.SftOptions(
        base,
        run=f"{storage.name(job.run_dir)}-sft",
        steps=steps,
        total_batch_size=job.preset.sft_batch_size,
        compile=compiles(job),
        eval_tokens=job.preset.eval_tokens if job.preset.steps else sft.SftOptions.eval_tokens,
        **job.request,
    )
    most = (job.preset.sft_batch_size or job.plan.total_batch_size) // job.plan.config.sequence_len
    if job.scaling.max_workers > most:  # each worker needs a row
        options.workers = most
    return options


def rl_task(job: Job, stages: Stages) -> rl.Task | None:
    """Return RL's task: GSM8K, or without downloads spelling. None if RL is finished."""
    name = "gsm8k" if job.mixture.mixture == "hub" else "spelling"
    return None if stages.result("rl") else load_task(TaskOptions(task=name, datasets_dir=job.options.datasets_dir))


def rl_options(job: Job, chat_model: str) -> rl.RlOptions:
    options = rl.RlOptions(chat_model, run=f"{storage.name(job.run_dir)}-rl", **job.request, **job.preset.rl)
    if job.preset.minutes:
        options.steps, options.eval_every = max(1, round(RL_SHARE * job.plan.num_iterations)), 0
    if options.workers is None and job.use_gpu:
        options.workers = min(job.scaling.max_workers, options.prompts_per_step)
    return options


def reinforce(job: Job, chat_model: str, task: rl.Task | None, stages: Stages) -> dict:
    """{checkpoint, steps, pass@1 and pass@k before and after}. The earlier result if RL is finished already."""
    if task is None:
        return stages.result("rl")
    result = rl.run(rl_options(job, chat_model), task)
    measured = [line for line in read_metrics(result.run_dir) if "pass@1" in line]
    names = sorted(name for name in measured[0] if name.startswith("pass@")) if measured else []
    scores = {
        f"{name}{when}": line.get(name)
        for name in names
        for when, line in ((" before", measured[0]), ("", measured[-1]))
    }
    return {"checkpoint": result.checkpoint, "steps": result.step} | scores


def compiles(job: Job) -> bool | None:
    """False if compiling would take longer than it saves, else None, so that training decides."""
    few = job.preset.minutes < COMPILING_PAYS if job.preset.minutes else bool(job.preset.steps) and not job.use_gpu
    return False if few else None


def conclude(job: Job, stages: Stages, answers: list[dict], newest: str) -> str:
    """Write the report and print the results. Returns the report's URI."""
    scores = stages.result("core") | stages.result("chatcore") | stages.result("chatcore after rl")
    report = storage.join(job.run_dir, "report.html")
    with measuring("writing the answers and scores"):
        storage.write_json(storage.join(job.run_dir, "chat.json"), answers)
        storage.write_json(storage.join(job.run_dir, "result.json"), scores)  # for the report and the leaderboard
    with measuring("the report"):
        reinforced = [f"{job.run_dir}-rl"] if "rl" in job.after else []
        write_report([job.run_dir, *reinforced], report, title=f"Speedrun, depth {job.plan.depth}")
    with measuring("reading the samples"):
        samples = storage.read_text(storage.join(job.run_dir, "samples.md")).rpartition("## ")[2]
        print(f"\n=== samples at {samples.strip()}")
    if answers:
        print("\n=== chat: held-out questions")
    for answer in answers:
        print(held_out.shown(answer))
    print("\n=== done")
    for record in stages.records:
        print(f"{record['stage']:<10}{record['seconds']:8.1f} s")
    print(f"val/bpb   {bpb(stages.result('pretrain')['val/bpb']):>10}")
    for name, label in (("core_metric", "CORE"), ("chatcore_metric", "ChatCORE")):
        if name in scores:
            print(f"{label:<10}{scores[name]:10.4f}")
    print(f"report    {report}\ntalk      nanochat-ray chat --checkpoint {newest}")
    return report


@one_line_errors
def main() -> None:
    check_once("--source", sys.argv[1:])
    options = tyro.cli(SpeedrunOptions, prog="python -m experiments.speedrun", description=__doc__)
    wants_gpu = options.preset == "gpu" and options.use_gpu is None
    if wants_gpu and "RAY_ADDRESS" not in os.environ and not torch.cuda.is_available():
        raise ValueError("--preset gpu finds no GPU here; rehearse on CPUs: --use-gpu False --rehearse --depth 2")
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
