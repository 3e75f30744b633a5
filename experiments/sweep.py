"""Shared by the experiments: training runs as trials of Ray Tune, and their results as one table.

A trial is a function that needs almost no resources. It starts Ray Train workers, which take the GPUs. The runs of a
sweep are in one folder, runs/<sweep>/<run>, and this folder is the sweep's only state: a run with a result.json is
finished, and any other run resumes from its newest checkpoint. So an interrupted sweep starts a new Tuner with the
unfinished runs instead of calling Tuner.restore. Tune's own state is older than the files of the runs, a kill can
damage it, and it does not allow to add depths to a sweep.
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
from typing import Any, Literal

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
from nanochat_ray.measuring import one_line
from nanochat_ray.model.scaling import BASE_LRS, RunPlan, plan_run
from nanochat_ray.train import hosts, launch, lease, pretrain
from nanochat_ray.train.failing import described, shared
from nanochat_ray.train.loop import DIVERGED, OUT_OF_MEMORY
from nanochat_ray.train.metrics import read_metrics
from nanochat_ray.train.plan import GPU_SHARE, predict_memory, rows_that_fit
from nanochat_ray.train.pretrain import PretrainOptions

HEAD = {"node:__internal_head__": 0.001}  # trials run on the head node, because losing it ends the sweep anyway
AS_LARGE = 0.9  # runs with more than this share of the largest run's FLOPs share the GPUs evenly
CPU_SHARE = 0.9  # share of a CPU worker's memory that the plan may fill; the plan is accurate to about 10 %

STOPPED = "stopped.json"  # file in the folder of a run that the scheduler stopped

COUNTS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars", "total")
COLUMNS = [
    "run", "depth", "model_dim", *(f"params_{name}" for name in COUNTS), "num_iterations", "tokens_trained",
    "param_data_ratio", "flops", "val_bpb", "core_metric", "train_time_sec", "tok_per_sec", "mfu", "peak_memory_mb",
    "total_batch_size", "device_batch_size", "workers", "seed", "commit", "notes",
]  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Settings for a kind of machine. The depth decides everything else."""

    name: str
    source: Any  # str or list[str]
    vocab_size: int
    sequence_len: int
    head_dim: int
    window_pattern: str
    ratio: float  # tokens per scaling parameter
    total_batch_size: int | None
    lr_factor: float  # factor on the plan's learning rates
    eval_tokens: int
    compile: bool | None
    core: bool


PRESETS = {
    # Two cores train 0.3 tokens per parameter for depths 1 to 4 in minutes. The vocabulary is small, so that the blocks
    # and not the tables hold most parameters. lr_factor 16 undoes the plan's lower rates for a small batch: val_bpb at
    # depths 1 and 2 was 3.07 and 2.59 with a factor of 1, 2.48 and 2.05 with 16, and 2.60 and 2.13 with 48.
    "cpu": Preset("cpu", "pydocs", 4096, 256, 64, "L", 0.3, 2048, 16, 65_536, False, False),
    "gpu": Preset("gpu", "climbmix", 32768, 2048, 128, "SSSL", 12, None, 1, 10_485_760, None, True),
}


@dataclass
class SweepOptions:
    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu: minutes on a laptop, with docstrings of the installed packages. gpu: nanochat's sizes, with climbmix. auto:
    gpu if the cluster has GPUs."""
    source: list[str] | None = None
    """One source or several to mix, as for prepare. Default: the preset's."""
    rows: str | None = None
    """Folder of prepared rows, used in place of a source."""
    ratio: float | None = None
    """Training tokens per scaling parameter. Default: the preset's."""
    workers: list[int] | None = None
    """Training workers per run: one number for all runs, or one per depth. Default: 1 on CPUs. On GPUs, the largest run
    takes all GPUs (several of about that size share them), and smaller runs take enough to finish no later."""
    device_batch_size: int | None = None
    """Rows in one forward pass of a worker. Default: from the memory plan. It is halved if memory runs out."""
    bundle: str | None = None
    """Folder of a CORE bundle, on which every model is scored. The gpu preset downloads the published one."""
    max_per_task: int = -1
    """Examples per CORE task. -1 uses all."""
    seed: int = 42
    """Seed of the weights and of the order of rows."""
    name: str | None = None
    """Name of the sweep's folder in runs/. Default: made from the options."""


def preset_of(options: SweepOptions) -> Preset:
    """The preset with the changes that the options make."""
    on_gpus = "GPU" in ray.cluster_resources()
    preset = PRESETS[("gpu" if on_gpus else "cpu") if options.preset == "auto" else options.preset]
    return replace(preset, source=options.source or preset.source, ratio=options.ratio or preset.ratio)


def shared_rows(options: SweepOptions, preset: Preset, most_tokens: float) -> str:
    """The folder of rows that all runs train on. It is prepared if it does not exist."""
    if options.rows:
        return storage.absolute(options.rows)
    wanted = prepare.PrepareOptions(
        preset.source, tokens=int(most_tokens), vocab_size=preset.vocab_size, sequence_len=preset.sequence_len
    )
    return prepare.run(wanted).rows


def pretrain_options(options: SweepOptions, preset: Preset, rows: str, depth: int, **changes) -> PretrainOptions:
    """Options of one run of the sweep, without its name and workers."""
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
    assert options.rows
    return pretrain.plan_of(options, pretrain.read_manifest(options.rows))


def scaling_params(preset: Preset, depth: int) -> int:
    """The scaling parameters of a depth, before rows exist."""
    return plan_run(
        depth,
        sequence_len=preset.sequence_len,
        vocab_size=preset.vocab_size,
        head_dim=preset.head_dim,
        window_pattern=preset.window_pattern,
        num_iterations=1,
    ).scaling_params


def spaced(run: PretrainOptions, parts: int = 4) -> PretrainOptions:
    """Make a short run measure and save after each of `parts` equal parts."""
    every = max(1, plan_of(run).num_iterations // parts)
    return replace(run, eval_every=min(every, run.eval_every), save_every=min(every, run.save_every))


def share_workers(options: SweepOptions, plans: Sequence[RunPlan]) -> list[int]:
    """Workers of each run: those in the options, else on GPUs a power of two, at least as many as the memory needs.

    The largest run takes all GPUs. Several runs of about that size share them. Smaller runs finish no later.
    """
    if options.workers:
        if len(options.workers) not in (1, len(plans)):
            raise ValueError(
                f"--workers has {len(options.workers)} numbers for {len(plans)} runs: give one number, or one per run"
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
    """Whether a GPU has enough memory for one of so many workers, with one row per forward pass."""
    return sum(predict_memory(plan.config, workers, 1, False, torch.bfloat16).values()) <= memory


def begin(kind: str, options: SweepOptions, inputs: dict, **about) -> tuple[str, str]:
    """Write sweep.json and return (name, folder) of the sweep. inputs: the settings that all its runs share.

    Raises ValueError that names the differences if the folder exists with other inputs, so that sweeps never mix.
    """
    inputs = json.loads(json.dumps(inputs))
    name = options.name or f"{kind.replace('_', '-')}-{storage.fingerprint(inputs)[:6]}"
    folder = storage.join(storage.home(), "runs", name)
    uri = storage.join(folder, "sweep.json")
    if storage.exists(uri):
        theirs = storage.read_json(uri)["inputs"]
        if differing := [key for key in inputs if inputs[key] != theirs.get(key)]:
            was, now = (", ".join(f"{key} {d.get(key)}" for key in differing) for d in (theirs, inputs))
            raise ValueError(f"{folder} was started with {was}, not {now}: take another --name or delete the folder")
    storage.write_json(uri, {"kind": kind, "inputs": inputs, "options": asdict(options), **about})
    return name, folder


def trial(name: str, run: PretrainOptions, workers: int, options: SweepOptions, **more) -> dict:
    """The configuration of a run's trial. `name`: the run's folder inside the sweep's."""
    plan, preset = plan_of(run), preset_of(options)
    most = max(1, plan.total_batch_size // workers // plan.config.sequence_len)  # more rows than exist can't be halved
    rows = min(most, run.device_batch_size or device_batch_size(run, workers))
    return {
        "name": name,
        "home": storage.home(),
        "options": asdict(replace(run, workers=workers, device_batch_size=rows)),
        "num_iterations": plan.num_iterations,
        "bundle": options.bundle or (bundle.fetch() if preset.core else None),
        "max_per_task": options.max_per_task,
        "base_lrs": BASE_LRS,
        "columns": {},  # further columns of results.csv
        **more,
    }


def device_batch_size(run: PretrainOptions, workers: int) -> int:
    """Rows in a forward pass, as a single run chooses them: halved until the memory plan fits."""
    plan, scaling = plan_of(run), hosts.scaling_config(workers)
    most = plan.total_batch_size // workers // plan.config.sequence_len
    dtype, memory = launch.worker_dtype(run.dtype, scaling), worker_memory(scaling)
    return rows_that_fit(plan.config, most, workers, not scaling.use_gpu, dtype, memory, run.recompute)


def worker_memory(scaling: ray.train.ScalingConfig) -> float:
    """Bytes that a worker's plan may fill. inf for GPUs of an unknown type."""
    if scaling.use_gpu:
        return GPU_SHARE * launch.smallest_gpu()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = scaling.resources_per_worker["CPU"]
    return CPU_SHARE * min(node["memory"] / (node["CPU"] // each) for node in nodes if node.get("CPU", 0) >= each)


# One run


def train_trial(config: dict, failing: ActorHandle) -> None:
    """Train a run to its end and write its result.json.

    A failure is reported, not raised, because Tune would print a page of trace. A score that can't be measured is
    reported, too, and the result is written without it."""
    given = config["trial"]
    os.environ["NANOCHAT_RAY_HOME"] = given["home"]  # the driver's, because Ray may have been started with another
    options = PretrainOptions(**given["options"])
    measuring.failed.clear()
    try:
        result, options, notes = train_within_memory(options, given["base_lrs"], failing)
        finish_trial(given, options, result.checkpoint, result.run_dir, notes)
    except Exception as error:
        report_failure(given, storage.join(storage.home(), "runs", given["options"]["run"]), error)


def report_failure(given: dict, run_dir: str, error: Exception) -> None:
    """Report a failed run to Tune. The next start of the sweep tries it again.

    A run that diverged would do so again, so it counts as finished, with a result that has no loss. A campaign's
    candidate has limits, and any failure of it counts so."""
    found = DIVERGED.search(str(error))
    if not found and not given.get("limits"):
        tune.report({"error": f"{type(error).__name__}: {error}"})
        return
    row = {"run": storage.name(run_dir), "val_bpb": None, "core_metric": None}
    row |= {"notes": f"diverged: {found[0]}" if found else f"failed: {one_line(error)}"}
    row |= {key: given["options"][key] for key in ("seed", "workers", "depth") if key in given["options"]}
    config = storage.join(run_dir, "config.json")
    plan = storage.read_json(config).get("plan", {}) if storage.exists(config) else {}
    if "param_counts" in plan:  # a pretraining run; RL has no such plan
        row |= planned(plan)
    storage.write_json(storage.join(run_dir, "result.json"), row | given["columns"])


def finish_trial(given: dict, options: PretrainOptions, checkpoint: str, run_dir: str, notes: list[str]) -> None:
    """Score a trained run, and write its result.json."""
    score = None
    if given["bundle"]:
        with measuring.measuring("CORE"):
            score = core.run(
                core.CoreOptions(
                    checkpoint, given["bundle"], given["max_per_task"], actors=options.workers or 1, out=run_dir
                )
            ).core_metric
    outcome = {"core_metric": score, "notes": "; ".join([*notes, *measuring.failed])}
    write_result(run_dir, setup_of(options) | outcome | given["columns"])
    if measuring.failed:
        tune.report({"unmeasured": measuring.failed})


def train_within_memory(options: PretrainOptions, base_lrs: dict[str, float], failing: ActorHandle):
    """Train and return (result, the final options, notes).

    If memory runs out, the device batch is halved. After other failures of workers, the run resumes as often as a
    single run does."""
    failures, notes = 0, []
    while True:
        known = ray.get(failing.bad_places.remote())
        try:
            result = pretrain.run(options, report=report_to_tune(options), base_lrs=base_lrs, failing=failing)
            return result, options, notes
        except ray.train.TrainingFailedError as error:
            rows = options.device_batch_size or 1
            if OUT_OF_MEMORY.search(str(error)) and rows > 1:
                options = replace(options, device_batch_size=rows // 2)
                notes.append(f"out of memory with {rows} rows per forward pass, continued with {rows // 2}")
                continue
            failures += 1
            if failures > launch.MAX_FAILURES:
                raise
            if bad := ray.get(failing.bad_places.remote()) - known:
                notes.append(f"workers failed twice on {described(bad)}")
                tune.report({"said": f"{notes[-1]}: all runs avoid them if there are others"})


def report_to_tune(options: PretrainOptions) -> Callable[[dict], None]:
    """A report function that adds "evals", the measurements of val/bpb so far, which is a scheduler's unit of time."""
    return lambda metrics: tune.report(metrics | {"evals": (metrics["step"] - 1) // options.eval_every + 1})


def setup_of(options: PretrainOptions) -> dict:
    return {"workers": options.workers, "device_batch_size": options.device_batch_size, "seed": options.seed}


def write_result(run_dir: str, more: dict) -> None:
    """Write result.json of a finished run, its line in results.csv, from config.json and metrics.jsonl."""
    config = storage.read_json(storage.join(run_dir, "config.json"))
    plan, lines = config["plan"], read_metrics(run_dir)
    steps = [line for line in lines if "train/loss" in line]
    speeds = {  # MFU is null on a GPU with an unknown peak
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
    """The columns of results.csv that follow from a run's plan."""
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
    """Run the unfinished trials, as many in parallel as the cluster has room for. Returns the lines of results.csv.

    failing: the actor that knows failing hosts from earlier trials; by default a new one.

    When all runs have ended, raises ValueError that names those that failed. Raises KeyboardInterrupt when stopped.
    """
    unfinished = [t for t in trials if not is_finished(folder, t)]
    if done := len(trials) - len(unfinished):
        print(f"{done} of {len(trials)} runs are finished already", flush=True)
    # Start small trials first, so that no trial that fits waits behind one that does not. Limit parallel trials to the
    # number of the smallest ones that fit. More trials would only be waiting processes.
    unfinished.sort(key=lambda t: t["options"]["workers"])
    progress = Progress(folder, trials, may_stop=scheduler is not None)
    if unfinished:
        scaling = hosts.scaling_config(1)
        if scaling.use_gpu and (held := hosts.room(scaling) - sum(hosts.free_rooms(scaling).values())):
            print(f"other jobs hold {held} of {hosts.room(scaling)} GPUs: runs that need them wait", flush=True)
        # Turn off Tune's logs and table, because runs have their own. Tune has only environment variables for this.
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
        os.environ |= {"TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}  # a failed run reports no loss
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
        raise KeyboardInterrupt(f"stopped with {missing} runs unfinished: run the same command again to continue them")
    return rows


def is_finished(folder: str, trial: dict) -> bool:
    """Whether a run has ended and, if CORE is measured, has its score. A diverged run needs no score."""
    if storage.exists(storage.join(folder, trial["name"], STOPPED)):
        return True
    result = storage.join(folder, trial["name"], "result.json")
    if not storage.exists(result) or not trial["bundle"]:
        return storage.exists(result)
    row = storage.read_json(result)
    return row["core_metric"] is not None or row["val_bpb"] is None


def concurrent(workers: list[int]) -> int:
    """How many runs fit in parallel: the number of the smallest ones that fit."""
    free = hosts.room(hosts.scaling_config(max(workers)))
    count = 0
    for needed in sorted(workers):
        free -= needed
        count += free >= 0
    return max(1, count)


def write_results(folder: str, trials: list[dict]) -> list[dict]:
    """Write results.csv of the finished runs, in the trials' order. Returns its lines."""
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
    """The lines of results.csv. Numbers become int or float, and empty fields None."""
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
    """Prints progress: a live table on a terminal, else one line per tenth of a run."""

    def __init__(self, folder: str, trials: list[dict], may_stop: bool):
        self.folder, self.trials, self.may_stop = folder, trials, may_stop
        self.latest: dict[str, dict] = {}
        self.errors: dict[str, str] = {}
        self.live: Live | None = None

    def setup(self, **_) -> None:  # not in __init__, because Tune pickles the callback
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
        if not storage.exists(result):  # the scheduler stopped it; remember that for the next start
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
        """The process of a trial has died."""
        self.errors.setdefault(trial.config["trial"]["name"], f"its process ended early, see {trial.error_file}")

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
