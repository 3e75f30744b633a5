"""What the experiments share: training runs as trials of Ray Tune, and their results as one table.

A trial is a function that needs next to nothing; the Ray Train workers that it starts take the GPUs. The runs of a
sweep are in one folder, runs/<sweep>/<run>, and that folder is all that is known of it: a run with a result.json is
finished, any other goes on from its newest checkpoint. So an interrupted sweep is started again with a new Tuner over
what is not finished, rather than by Tuner.restore: Tune's own state is older than what the runs have written, can be
torn by a kill, and would not let depths be added to a sweep.
"""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Literal

import ray
import ray.train
import torch
from ray import tune
from ray.actor import ActorHandle
from rich.console import Console
from rich.live import Live
from rich.table import Table

from nanochat_ray import measuring, storage
from nanochat_ray.data import prepare
from nanochat_ray.evals import bundle, core
from nanochat_ray.model.scaling import BASE_LRS, RunPlan, plan_run
from nanochat_ray.train import hosts, launch, lease, pretrain
from nanochat_ray.train.failing import described, shared
from nanochat_ray.train.loop import DIVERGED, OUT_OF_MEMORY
from nanochat_ray.train.metrics import read_metrics
from nanochat_ray.train.plan import GPU_SHARE, predict_memory, rows_that_fit
from nanochat_ray.train.pretrain import PretrainOptions

HEAD = {"node:__internal_head__": 0.001}  # a trial's own: on the node that, once lost, ends the sweep in any case
AS_LARGE = 0.9  # of the largest run's FLOPs: such runs share the GPUs evenly
CPU_SHARE = 0.9  # of a CPU worker's memory that the plan may fill: it is right to some 10 %

STOPPED = "stopped.json"  # in the folder of a run that the scheduler ended

COUNTS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars", "total")
COLUMNS = [
    "run", "depth", "model_dim", *(f"params_{name}" for name in COUNTS), "num_iterations", "tokens_trained",
    "param_data_ratio", "flops", "val_bpb", "core_metric", "train_time_sec", "tok_per_sec", "mfu", "peak_memory_mb",
    "total_batch_size", "device_batch_size", "workers", "seed", "commit", "notes",
]  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """What a machine can do in one go; the depths decide the rest."""

    name: str
    source: str | list[str]
    vocab_size: int
    sequence_len: int
    head_dim: int
    window_pattern: str
    ratio: float  # tokens per scaling parameter
    total_batch_size: int | None
    lr_factor: float  # times the plan's learning rates
    eval_tokens: int
    compile: bool | None
    core: bool


PRESETS = {
    # A third of a token per parameter: what two cores do for depths 1 to 4 in minutes. A small vocabulary, so that the
    # blocks rather than the tables are most of a small model. The rates are not lowered for the small batch, which
    # would be by a factor 16: at depths 1 and 2 val_bpb was 3.07 and 2.59 with that, 2.48 and 2.05 without, and 2.60
    # and 2.13 with three times as much.
    "cpu": Preset("cpu", "pydocs", 4096, 256, 64, "L", 0.3, 2048, 16, 65_536, False, False),
    "gpu": Preset("gpu", "climbmix", 32768, 2048, 128, "SSSL", 12, None, 1, 10_485_760, None, True),
}


@dataclass
class SweepOptions:
    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu: minutes on a laptop, on docstrings of the installed packages. gpu: nanochat's sizes, on climbmix."""
    source: list[str] | None = None
    """One source or several to mix, as for prepare; the default is the preset's."""
    rows: str | None = None
    """Folder of rows that prepare made, in place of a source."""
    ratio: float | None = None
    """Training tokens per scaling parameter; the default is the preset's."""
    workers: list[int] | None = None
    """Training workers of a run: one number for all, or one a depth. The default is one on CPUs; on GPUs all of them
    for the largest run, or a share if several are as large, and for the others as many as let them be done no later."""
    device_batch_size: int | None = None
    """Rows in one forward pass of a worker; the default is by the memory plan. Halved when memory runs out."""
    bundle: str | None = None
    """Folder of a CORE bundle to score every model on. The gpu preset downloads the published one."""
    max_per_task: int = -1
    """Examples of each CORE task; -1 for all."""
    seed: int = 42
    """Of the weights and of the order of rows."""
    name: str | None = None
    """Name of the sweep's folder in runs/; the default is made of the options."""


def preset_of(options: SweepOptions) -> Preset:
    """The preset with what the options change in it."""
    on_gpus = "GPU" in ray.cluster_resources()
    preset = PRESETS[("gpu" if on_gpus else "cpu") if options.preset == "auto" else options.preset]
    return replace(preset, source=options.source or preset.source, ratio=options.ratio or preset.ratio)


def shared_rows(options: SweepOptions, preset: Preset, most_tokens: float) -> str:
    """The folder of rows that all runs train on, prepared unless it is there."""
    if options.rows:
        return storage.absolute(options.rows)
    wanted = prepare.PrepareOptions(
        preset.source, tokens=int(most_tokens), vocab_size=preset.vocab_size, sequence_len=preset.sequence_len
    )
    return prepare.run(wanted).rows


def pretrain_options(options: SweepOptions, preset: Preset, rows: str, depth: int, **changes) -> PretrainOptions:
    """A run of the sweep, without its name and its workers."""
    return PretrainOptions(
        depth=depth,
        rows=rows,
        head_dim=preset.head_dim,
        window_pattern=preset.window_pattern,
        target_param_data_ratio=preset.ratio,
        total_batch_size=preset.total_batch_size,
        lr_factor=preset.lr_factor,
        device_batch_size=options.device_batch_size,
        eval_tokens=preset.eval_tokens,
        compile=preset.compile,
        seed=options.seed,
        **changes,
    )


def plan_of(options: PretrainOptions) -> RunPlan:
    return pretrain.plan_of(options, pretrain.read_manifest(options.rows))


def scaling_params(preset: Preset, depth: int) -> int:
    """Of a depth, before there are rows to say how long they are."""
    return plan_run(
        depth,
        sequence_len=preset.sequence_len,
        vocab_size=preset.vocab_size,
        head_dim=preset.head_dim,
        window_pattern=preset.window_pattern,
        num_iterations=1,
    ).scaling_params


def spaced(run: PretrainOptions, parts: int = 4) -> PretrainOptions:
    """With a measurement, and a checkpoint to go on from, after each of `parts` of a short run."""
    every = max(1, plan_of(run).num_iterations // parts)
    return replace(run, eval_every=min(every, run.eval_every), save_every=min(every, run.save_every))


def share_workers(options: SweepOptions, plans: Sequence[RunPlan]) -> list[int]:
    """Workers of each run: those asked for, else on GPUs powers of two, at least as many as the memory needs.

    The largest run takes all GPUs, several that are as large share them, and no smaller one is done after it.
    """
    if options.workers:
        if len(options.workers) not in (1, len(plans)):
            raise ValueError(
                f"--workers gives {len(options.workers)} numbers for {len(plans)} runs: give one or as many"
            )
        return [*options.workers] * (len(plans) if len(options.workers) == 1 else 1)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    memory = GPU_SHARE * launch.smallest_gpu() if gpus else math.inf
    most = max(plan.total_flops for plan in plans)
    as_large = sum(plan.total_flops > AS_LARGE * most for plan in plans)
    of_largest = 2 ** int(math.log2(max(1, gpus / as_large))) if as_large > 1 else gpus

    def workers(plan: RunPlan) -> int:
        count = 2 ** math.ceil(math.log2(max(1, of_largest * plan.total_flops / most)))
        while count < gpus and not fits(plan, count, memory):
            count *= 2
        return max(1, min(gpus, count, plan.total_batch_size // plan.config.sequence_len))

    return [workers(plan) for plan in plans]


def fits(plan: RunPlan, workers: int, memory: float) -> bool:
    """Whether a GPU's memory is enough for one of so many workers, with a row a forward pass."""
    return sum(predict_memory(plan.config, workers, 1, False, torch.bfloat16).values()) <= memory


def begin(kind: str, options: SweepOptions, inputs: dict, **about) -> tuple[str, str]:
    """(name, folder) of a sweep. inputs: what all its runs share, so that a folder never mixes those of two sweeps.

    Raises ValueError naming what differs in the folder of that name.
    """
    inputs = json.loads(json.dumps(inputs))
    name = options.name or f"{kind.replace('_', '-')}-{storage.fingerprint(inputs)[:6]}"
    folder = storage.join(storage.home(), "runs", name)
    uri = storage.join(folder, "sweep.json")
    if storage.exists(uri):
        theirs = storage.read_json(uri)["inputs"]
        if differing := [key for key in inputs if inputs[key] != theirs.get(key)]:
            was, now = (", ".join(f"{key} {d.get(key)}" for key in differing) for d in (theirs, inputs))
            raise ValueError(f"{folder} was begun with {was}, not {now}: take another --name or delete it")
    storage.write_json(uri, {"kind": kind, "inputs": inputs, "options": asdict(options), **about})
    return name, folder


def trial(name: str, run: PretrainOptions, workers: int, options: SweepOptions, **more) -> dict:
    """What the trial of a run is given. `name` is that of the run folder in the sweep's."""
    plan, preset = plan_of(run), preset_of(options)
    most = max(1, plan.total_batch_size // workers // plan.config.sequence_len)  # else halving would change nothing
    rows = min(most, run.device_batch_size or device_batch_size(run, workers))
    return {
        "name": name,
        "home": storage.home(),
        "options": asdict(replace(run, workers=workers, device_batch_size=rows)),
        "num_iterations": plan.num_iterations,
        "bundle": options.bundle or (bundle.fetch() if preset.core else None),
        "max_per_task": options.max_per_task,
        "base_lrs": BASE_LRS,
        "columns": {},  # more of them for results.csv
        **more,
    }


def device_batch_size(run: PretrainOptions, workers: int) -> int:
    """Rows of a forward pass: as many as a single run takes, halved until the memory plan fits."""
    plan, scaling = plan_of(run), hosts.scaling_config(workers)
    most = plan.total_batch_size // workers // plan.config.sequence_len
    dtype, memory = launch.worker_dtype(run.dtype, scaling), worker_memory(scaling)
    return rows_that_fit(plan.config, most, workers, not scaling.use_gpu, dtype, memory, run.recompute)


def worker_memory(scaling: ray.train.ScalingConfig) -> float:
    """Bytes that the plan of a worker may fill; inf for GPUs of an unknown kind."""
    if scaling.use_gpu:
        return GPU_SHARE * launch.smallest_gpu()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = scaling.resources_per_worker["CPU"]
    return CPU_SHARE * min(node["memory"] / (node["CPU"] // each) for node in nodes if node.get("CPU", 0) >= each)


# One run


def train_trial(config: dict, failing: ActorHandle) -> None:
    """Train a run to its end and write its result.json. A failure is reported, not raised: Tune would print a page.

    A score that can't be had is reported too, and the run has a result without it."""
    given = config["trial"]
    os.environ["NANOCHAT_RAY_HOME"] = given["home"]  # the driver's: Ray may have been started with another
    options = PretrainOptions(**given["options"])
    measuring.failed.clear()
    try:
        result, options, notes = train_within_memory(options, given["base_lrs"], failing)
        finish_trial(given, options, result.checkpoint, result.run_dir, notes)
    except Exception as error:
        report_failure(given, storage.join(storage.home(), "runs", options.run), error)


def report_failure(given: dict, run_dir: str, error: Exception) -> None:
    """Tell Tune of a failed run, for the next start to try again. One that diverged would only do so again: it is
    finished, with a result that has no loss."""
    if not (found := DIVERGED.search(str(error))):
        tune.report({"error": f"{type(error).__name__}: {error}"})
        return
    row = {"run": storage.name(run_dir), "notes": f"diverged: {found[0]}", "val_bpb": None, "core_metric": None}
    row |= {key: given["options"][key] for key in ("seed", "workers")}
    plan = storage.read_json(storage.join(run_dir, "config.json")).get("plan", {})
    if "param_counts" in plan:  # of pretraining
        row |= planned(plan)
    storage.write_json(storage.join(run_dir, "result.json"), row | given["columns"])


def finish_trial(given: dict, options: PretrainOptions, checkpoint: str, run_dir: str, notes: list[str]) -> None:
    """Score a trained run, and write its result.json."""
    score = None
    if given["bundle"]:
        with measuring.measuring("CORE"):
            score = core.run(
                core.CoreOptions(
                    checkpoint, given["bundle"], given["max_per_task"], actors=options.workers, out=run_dir
                )
            ).core_metric
    notes = "; ".join([*notes, *measuring.failed])
    write_result(run_dir, setup_of(options) | {"core_metric": score, "notes": notes} | given["columns"])
    if measuring.failed:
        tune.report({"unmeasured": measuring.failed})


def train_within_memory(options: PretrainOptions, base_lrs: dict[str, float], failing: ActorHandle):
    """(result, the options it was got with, notes). Out of memory, the device batch is halved; a run that lost its
    workers otherwise goes on as often as a single run does."""
    failures, notes = 0, []
    while True:
        known = ray.get(failing.bad_places.remote())
        try:
            result = pretrain.run(options, report=report_to_tune(options), base_lrs=base_lrs, failing=failing)
            return result, options, notes
        except ray.train.TrainingFailedError as error:
            rows = options.device_batch_size
            if OUT_OF_MEMORY.search(str(error)) and rows > 1:
                options = replace(options, device_batch_size=rows // 2)
                notes.append(f"out of memory with {rows} rows a forward pass, went on with {rows // 2}")
                continue
            failures += 1
            if failures > launch.MAX_FAILURES:
                raise
            if bad := ray.get(failing.bad_places.remote()) - known:
                notes.append(f"workers failed twice on {described(bad)}")
                tune.report({"said": f"{notes[-1]}: all runs go on without if there are others"})


def report_to_tune(options: PretrainOptions) -> Callable[[dict], None]:
    """With the number of measurements of val/bpb so far, the one before the first step included: a scheduler's time."""
    return lambda metrics: tune.report(metrics | {"evals": (metrics["step"] - 1) // options.eval_every + 1})


def setup_of(options: PretrainOptions) -> dict:
    return {"workers": options.workers, "device_batch_size": options.device_batch_size, "seed": options.seed}


def write_result(run_dir: str, more: dict) -> None:
    """A finished run's line of results.csv, measured from config.json and metrics.jsonl, into result.json."""
    config = storage.read_json(storage.join(run_dir, "config.json"))
    plan, lines = config["plan"], read_metrics(run_dir)
    steps = [line for line in lines if "train/loss" in line]
    speeds = {  # MFU is null on a GPU whose peak is not known
        key: median(values) if (values := [line[key] for line in steps if line[key] is not None]) else None
        for key in ("train/tok_per_sec", "train/mfu")
    }
    measured = next((line for line in reversed(lines) if line.get("val/bpb") is not None), None)
    if measured is None:
        raise ValueError(f"{run_dir} has no val/bpb")
    row = {
        "run": storage.name(run_dir),
        **planned(plan),
        "val_bpb": measured["val/bpb"],
        "train_time_sec": lines[-1]["total_training_time"],
        "tok_per_sec": speeds["train/tok_per_sec"],
        "mfu": speeds["train/mfu"],
        "peak_memory_mb": max(line["train/peak_memory_mb"] for line in steps),
        "commit": config.get("commit"),
        **{key.replace("val/bpb", "val_bpb"): bpb for key, bpb in measured.items() if key.startswith("val/bpb/")},
    } | more
    storage.write_json(storage.join(run_dir, "result.json"), row)


def planned(plan: dict) -> dict:
    """The columns that a run's plan decides."""
    tokens = plan["num_iterations"] * plan["total_batch_size"]
    return {
        "depth": plan["depth"],
        "model_dim": plan["n_embd"],
        **{f"params_{name}": plan["param_counts"][name] for name in COUNTS},
        "num_iterations": plan["num_iterations"],
        "tokens_trained": tokens,
        "param_data_ratio": tokens / plan["scaling_params"],
        "flops": float(plan["flops_per_token"]) * tokens,
        "total_batch_size": plan["total_batch_size"],
    }


# All runs


def run_trials(
    folder: str,
    trials: list[dict],
    trainable: Callable | None = None,
    scheduler=None,
    failing: ActorHandle | None = None,
) -> list[dict]:
    """Run what is not finished, as many at once as the cluster has room for; returns the lines of results.csv.

    failing: what trials before have found of the hosts, else they begin to find it.

    Raises ValueError naming the runs that failed, when the others are finished, and KeyboardInterrupt when stopped.
    """
    unfinished = [t for t in trials if not is_finished(folder, t)]
    if done := len(trials) - len(unfinished):
        print(f"{done} of {len(trials)} runs are finished already", flush=True)
    # The smallest first: whichever waits for room, none that would find it is behind. In parallel as many as find room
    # if all are the smallest; what is started beyond that would only keep processes waiting.
    unfinished.sort(key=lambda t: t["options"]["workers"])
    progress = Progress(folder, trials, may_stop=scheduler is not None)
    if unfinished:
        scaling = hosts.scaling_config(1)
        if scaling.use_gpu and (held := hosts.room(scaling) - sum(hosts.free_rooms(scaling).values())):
            print(f"others hold {held} of {hosts.room(scaling)} GPUs: runs that need them wait", flush=True)
        # Runs have logs and a table of their own; Tune has no other way to be told.
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
        os.environ |= {"TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}  # a run that failed has no loss to report
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        filesystem, path = storage.filesystem(folder)
        if trainable is None:
            failing = failing or shared()
            trainable = tune.with_parameters(train_trial, failing=failing)
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([HEAD])),
            param_space={"trial": tune.grid_search(unfinished)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent([t["options"]["workers"] for t in unfinished]),
                scheduler=scheduler,
                trial_dirname_creator=lambda t: f"{t.config['trial']['name']}-{t.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=path, storage_filesystem=filesystem, verbose=0, callbacks=[progress]
            ),
        )
        with lease.hold(folder):
            tuner.fit()
    rows = write_results(folder, trials)
    if progress.errors:
        raise ValueError("\n".join(f"{name} failed: {error}" for name, error in progress.errors.items()))
    missing = len(trials) - len(rows) - sum(storage.exists(storage.join(folder, t["name"], STOPPED)) for t in trials)
    if missing:
        raise KeyboardInterrupt(f"stopped with {missing} runs unfinished: the same command goes on with them")
    return rows


def is_finished(folder: str, trial: dict) -> bool:
    """Whether a run has ended, and has its score if one was to be measured. One that diverged has none."""
    if storage.exists(storage.join(folder, trial["name"], STOPPED)):
        return True
    result = storage.join(folder, trial["name"], "result.json")
    if not storage.exists(result) or not trial["bundle"]:
        return storage.exists(result)
    row = storage.read_json(result)
    return row["core_metric"] is not None or row["val_bpb"] is None


def concurrent(workers: list[int]) -> int:
    """How many of the runs have room at once, at most: so many of the smallest."""
    free = hosts.room(hosts.scaling_config(max(workers)))
    count = 0
    for needed in sorted(workers):
        free -= needed
        count += free >= 0
    return max(1, count)


def write_results(folder: str, trials: list[dict]) -> list[dict]:
    """results.csv of the runs that are finished, in the trials' order; returns its lines."""
    results = [storage.join(folder, t["name"], "result.json") for t in trials]
    rows = [storage.read_json(uri) for uri in results if storage.exists(uri)]
    text = io.StringIO()
    extra = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in COLUMNS]
    writer = csv.DictWriter(text, COLUMNS + extra, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_bytes(storage.join(folder, "results.csv"), text.getvalue().encode())
    return rows


def read_results(folder: str, name: str = "results.csv") -> list[dict]:
    """The lines of results.csv, numbers as numbers and None for what is missing."""
    lines = csv.DictReader(io.StringIO(storage.read_text(storage.join(folder, name))))
    return [{key: _value(text) for key, text in line.items()} for line in lines]


def _value(text: str):
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text or None


class Progress(tune.Callback):
    """One live table of the runs on a terminal; elsewhere a line whenever a tenth of a run is done."""

    def __init__(self, folder: str, trials: list[dict], may_stop: bool):
        self.folder, self.trials, self.may_stop = folder, trials, may_stop
        self.latest: dict[str, dict] = {}
        self.errors: dict[str, str] = {}
        self.live: Live | None = None

    def setup(self, **_) -> None:  # not before: what Tune saves of a sweep is pickled with its callbacks
        console = Console(highlight=False)
        if console.is_terminal:
            self.live = Live(self.table(), console=console, auto_refresh=False)
            self.live.start()

    def on_trial_result(self, iteration, trials, trial, result, **_) -> None:
        given = trial.config["trial"]
        name = given["name"]
        if result.get("error"):
            self.errors[name] = result["error"]
            return
        if "said" in result:
            print(f"{name}: {result['said']}", flush=True)
        for line in result.get("unmeasured", ()):
            measuring.note(f"{name}: {line}")
        if "step" not in result:
            return
        before = self.latest.get(name)
        self.latest[name] = result
        if self.live:
            self.live.update(self.table(), refresh=True)
        elif before is None or tenth(before, given) < tenth(result, given):
            print(" · ".join(cell for cell in self.cells(given) if cell), flush=True)

    def on_trial_complete(self, iteration, trials, trial, **_) -> None:
        name = trial.config["trial"]["name"]
        if name in self.errors:
            return
        result = storage.join(self.folder, name, "result.json")
        if not storage.exists(result) and not self.may_stop:
            self.errors[name] = f"it ended without {result}"
            return
        if not storage.exists(result):  # the scheduler's decision, which holds for a second start, too
            last = self.latest.get(name, {})
            storage.write_json(storage.join(self.folder, name, STOPPED), {"step": last.get("step")})
            said = f"{name} stopped early at step {last.get('step')}, val/bpb {last.get('val/bpb', math.nan):.4f}"
        else:
            row = storage.read_json(result)
            if row.get("val_bpb", row.get("pass@1")) is None:
                said = f"{name} {row['notes']}"
            else:
                score = f"val/bpb {row['val_bpb']:.4f}" if "val_bpb" in row else f"pass@1 {row['pass@1']:.3f}"
                said = f"{name} finished, {score}, {row['train_time_sec']:,.1f} s of training"
            write_results(self.folder, self.trials)
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            print(said, flush=True)

    def on_trial_error(self, iteration, trials, trial, **_) -> None:
        """The trial's own process is lost."""
        self.errors.setdefault(trial.config["trial"]["name"], f"its trial ended early, see {trial.error_file}")

    def on_experiment_end(self, trials, **_) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for given in self.trials:
            table.add_row(*self.cells(given))
        return table

    def cells(self, given: dict) -> list[str]:
        name, steps = given["name"], given["num_iterations"]
        m = self.latest.get(name)
        if name in self.errors or m is None:
            return [name, "failed" if name in self.errors else f"0/{steps}", "", "", "", ""]
        left = (steps - m["step"]) * m["train/dt"]
        return [
            name,
            f"{m['step']}/{steps}",
            next((f"{key} {m[key]:.4f}" for key in ("val/bpb", "rl/reward") if m.get(key) is not None), ""),
            f"{m['train/tok_per_sec']:,.0f} tok/s",
            f"MFU {m['train/mfu']:.1%}",
            f"ETA {int(left) // 60}:{int(left) % 60:02d}",
        ]


def tenth(metrics: dict, given: dict) -> int:
    return 10 * metrics["step"] // given["num_iterations"]
