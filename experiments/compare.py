"""Tests whether a change is better: the same runs with and without it, and a paired test.

    python -m experiments.compare --baseline main --candidate HEAD --depths 1 2 --seeds 1 2 3
    ray job submit --working-dir . -- python -m experiments.compare --baseline FOLDER --candidate FOLDER
    python -m experiments.compare --baseline HEAD --stage rl --both checkpoint=RUN task=letters --change num_samples=8
    python -m experiments.compare --candidate main --source TEXT --data FILTERED     # is other text better?

The change may be in the code, in options, or in both. A version is a git revision, or the folder of a checkout with its
uncommitted changes. Its code is sent to the cluster as a Ray runtime environment. Baseline and candidate take turns on
the same nodes, in alternating order, so that other load on the nodes affects both. The verdict is printed, and written
to compare.md for a pull request.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import ray
import tyro
from ray import tune

from experiments import paired, sweep
from experiments.report import conclude
from nanochat_ray import measuring, storage
from nanochat_ray.data import prepare, sources
from nanochat_ray.evals import bpb
from nanochat_ray.evals.tasks.rewarded import TaskOptions, load_task
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train import checkpoint, hosts, rl
from nanochat_ray.train.metrics import read_metrics
from nanochat_ray.train.pretrain import PretrainOptions, read_manifest

DEPTHS = {"cpu": [1, 2], "gpu": [12, 16]}
SEEDS = [1, 2, 3, 4, 5]
# Tokens per scaling parameter. The cpu preset's 0.3 is too short for bad learning rates to show at depth 2.
CPU_RATIO = 1.0
DECIDED = ("run", "seed", "depth", "rows")  # set by options of compare, so not by --both or --change
CODE = ("nanochat_ray", "pyproject.toml")  # the parts of a version that a run needs
POLL_SECONDS = 2.0


@dataclass(kw_only=True)
class RlTrial(TaskOptions, rl.RlOptions):
    """The options that --both and --change can set with --stage rl."""


@dataclass
class CompareOptions(sweep.SweepOptions):
    stage: Literal["pretrain", "rl"] = "pretrain"
    """pretrain trains new models at each depth. rl trains one checkpoint on one task."""
    baseline: str = "main"
    """A git revision, or the folder of a checkout."""
    candidate: str = "HEAD"
    """A git revision, or the folder of a checkout."""
    both: list[str] = field(default_factory=list)
    """NAME=VALUE options of the stage for all runs. rl needs checkpoint=… and task=…."""
    change: list[str] = field(default_factory=list)
    """NAME=VALUE options of the stage for the candidate's runs only."""
    data: list[str] | None = None
    """Sources for the candidate in place of --source, with or without weights. Both sides use the tokenizer of --source
    and are scored on its validation rows."""
    depths: list[int] | None = None
    """Depths to pretrain. Default: 1 and 2 in the cpu preset, 12 and 16 in the gpu preset."""
    seeds: list[int] | None = None
    """Each side runs once per seed. A seed sets the weights and the order of rows, or of questions and answers.
    Default: 1 to 5."""
    ratio: float | None = None
    """Training tokens per scaling parameter. Default: 1 in the cpu preset, the preset's own in the gpu preset."""


def run(options: CompareOptions) -> str:
    """Train both sides and return the URI of compare.md. Raises ValueError for an unknown version or option, and what
    run_trials raises."""
    sides = {"baseline": archive(options.baseline), "candidate": archive(options.candidate)}
    hashes = {side: storage.fingerprint(code.hex())[:8] for side, (code, _) in sides.items()}
    labels = {side: describe(getattr(options, side), sides[side][1]) for side in sides}
    labels["candidate"] += "".join(f", {change}" for change in options.change)
    if options.data:
        labels["candidate"] += f", on {' '.join(options.data)}"
    plan = {"pretrain": pretraining, "rl": reinforcement}[options.stage]
    inputs, trials, task = plan(options)
    inputs |= {"code": hashes, "both": options.both, "change": options.change}
    name, folder = sweep.begin("compare", options, inputs, **labels)
    for side, (code, _) in sides.items():
        storage.write_bytes(storage.join(folder, "code", f"{side}-{hashes[side]}.zip"), code)
    for trial in trials:
        side = trial["columns"]["side"]
        trial["options"]["run"] = f"{name}/{trial['name']}"
        trial["code"] = storage.join(folder, "code", f"{side}-{hashes[side]}.zip")
        trial["columns"]["commit"] = sides[side][1]
    print(f"compare: {labels['candidate']} against {labels['baseline']}, {len(trials)} runs in {folder}", flush=True)
    results = sweep.run_trials(folder, trials, tune.with_parameters(train_version, task=task))
    markdown = paired.markdown(results, labels["baseline"], labels["candidate"])
    out = storage.join(folder, "compare.md")
    storage.write_bytes(out, markdown.encode())
    conclude(folder, "Comparison")
    print(f"markdown  {out}")
    return out


def pretraining(options: CompareOptions) -> tuple[dict, list[dict], None]:
    """(inputs, trials, None): a pair of runs for each depth and seed."""
    preset = sweep.preset_of(options)
    if preset.name == "cpu" and options.ratio is None:
        preset = replace(preset, ratio=CPU_RATIO)
    depths = sorted(options.depths or DEPTHS[preset.name])
    most_tokens = preset.ratio * sweep.scaling_params(preset, max(depths))
    rows = dict.fromkeys(("baseline", "candidate"), sweep.shared_rows(options, preset, most_tokens))
    if options.data:
        rows["candidate"] = candidate_rows(options, preset, rows["baseline"], most_tokens)
    trials = []
    for side, given in sides_of(options).items():
        runs = [sweep.pretrain_options(options, preset, rows["baseline"], depth) for depth in depths]
        runs = [sweep.spaced(with_options(run, given)) for run in runs]
        workers = sweep.share_workers(options, [sweep.plan_of(run) for run in runs])
        for run, n in zip(runs, workers, strict=True):
            for seed in options.seeds or SEEDS:
                label = f"{side}-d{run.depth}-s{seed}"
                run = replace(run, seed=seed, rows=rows[side])
                scored_on = rows["baseline"] if options.data else None
                trials.append(sweep.trial(label, run, n, options, columns={"side": side}, scored_on=scored_on))
    return {"rows": rows["baseline"], "data": rows["candidate"], "preset": asdict(preset)}, in_turns(trials), None


def reinforcement(options: CompareOptions) -> tuple[dict, list[dict], rl.Task]:
    """(inputs, trials, the task): a pair of runs for each seed, from one checkpoint."""
    sides = {side: with_options(RlTrial(checkpoint="", task=""), given) for side, given in sides_of(options).items()}
    base = sides["baseline"]
    if not base.checkpoint or not base.task:
        raise ValueError("--stage rl needs a chat model and a task: add --both checkpoint=… task=…")
    candidate = sides["candidate"]
    if options.data or (candidate.checkpoint, candidate.task) != (base.checkpoint, base.task):
        raise ValueError("--stage rl uses one checkpoint and one task for both sides, and no --data: remove them")
    start = checkpoint.resolve_checkpoint(storage.absolute(base.checkpoint))
    task = load_task(base)
    depth = checkpoint.read_meta(start)["model_config"]["n_layer"]
    trials = []
    for side, given in sides.items():
        o = rl.RlOptions(**{name: getattr(given, name) for name in rl.RlOptions.__dataclass_fields__})
        o = replace(o, checkpoint=start, workers=o.workers or 1)
        rl.check(o, task)
        for seed in options.seeds or SEEDS:
            trials.append(
                {
                    "name": f"{side}-s{seed}",
                    "home": storage.home(),
                    "options": asdict(replace(o, seed=seed)),
                    "num_iterations": rl.num_steps(o, task),
                    "bundle": None,
                    "columns": {"side": side, "depth": depth},
                }
            )
    return {"checkpoint": start, "task": base.task}, in_turns(trials), task


def sides_of(options: CompareOptions) -> dict[str, list[str]]:
    """{side: NAME=VALUE options of the stage}."""
    return {"baseline": options.both, "candidate": [*options.both, *options.change]}


def with_options(default, given: list[str]):
    """The dataclass with the NAME=VALUE options set. Raises ValueError if the form is wrong, or if compare sets the
    option itself. tyro reports unknown names."""
    if malformed := [text for text in given if "=" not in text]:
        raise ValueError(f"{malformed[0]!r} is not NAME=VALUE: give --both and --change options in this form")
    if decided := [text for text in given if text.partition("=")[0] in DECIDED]:
        raise ValueError(f"{decided[0]!r}: --both and --change can't set {', '.join(DECIDED)}; see --help")
    flags = [flag for text in given for flag in (f"--{text.partition('=')[0]}", text.partition("=")[2])]
    config = (tyro.conf.FlagConversionOff,)
    return tyro.cli(type(default), args=flags, default=default, prog="--both and --change, as options:", config=config)


def in_turns(trials: list[dict]) -> list[dict]:
    """Sort by seed, then depth, with the two sides of a pair together. The first side alternates over seeds and depths,
    so that neither gains if the machine becomes slower or faster."""
    pairs = [(t["options"]["seed"], t["options"].get("depth", 0)) for t in trials]
    seeds, depths = ({value: i for i, value in enumerate(sorted(set(values)))} for values in zip(*pairs, strict=True))

    def turn(trial: dict) -> tuple[int, int, bool]:
        seed, depth = trial["options"]["seed"], trial["options"].get("depth", 0)
        candidate_first = (seeds[seed] + depths[depth]) % 2 == 1
        return seed, depth, (trial["columns"]["side"] == "candidate") != candidate_first

    return sorted(trials, key=turn)


def describe(version: str, commit: str | None) -> str:
    name = Path(version).resolve().name if os.path.isdir(version) else version
    return f"{name} ({commit})" if commit and not commit.startswith(name) else name


# Other data


def candidate_rows(options: CompareOptions, preset: sweep.Preset, baseline: str, tokens: float) -> str:
    """The folder of rows of --data, prepared with the baseline's tokenizer. Existing rows are reused.

    Raises ValueError if the training text contains validation documents, on which both sides are scored."""
    if options.rows:
        raise ValueError("--data can't be used with --rows, because rows don't name their text: use --source")
    assert options.data
    same: dict = {"tokens": int(tokens), "vocab_size": preset.vocab_size, "sequence_len": preset.sequence_len}
    theirs = prepare.PrepareOptions(preset.source, **same)
    ours = prepare.PrepareOptions(options.data, tokenizer=read_manifest(baseline)["tokenizer"], **same)
    found = prepare.find_sources(ours)
    check_held_out(prepare.find_sources(theirs), found)
    return prepare.run(ours, found).rows


def check_held_out(baseline: list[sources.Source], candidate: list[sources.Source]) -> None:
    """Raises ValueError if the candidate trains on validation documents of the baseline.

    Sources that both sides use are skipped, because they hold out the same documents for both."""
    held_out = {document for source in baseline for document in hashes(source.val)}
    both = {source.fingerprint for source in baseline} & {source.fingerprint for source in candidate}
    for source in candidate:
        if source.fingerprint in both:
            continue
        if seen := held_out.intersection(hashes(source.train)):
            raise ValueError(
                f"{source.name} has {len(seen):,} of the {len(held_out):,} documents that both sides are scored on: "
                "remove them, for example by putting the same val/ folder beside both"
            )


def hashes(shards: Sequence[sources.Shard]) -> Iterator[int]:
    """Hashes of the documents without leading and trailing white space."""
    for shard in shards:
        for text in sources.read_documents(shard, sources.Reading()):
            yield hash(text.strip())


# Versions of the code


def archive(version: str) -> tuple[bytes, str | None]:
    """(zip of the version's code, its commit). Equal code gives equal bytes.

    Raises ValueError if the version is neither a folder with this package nor a revision of this repository.
    """
    if os.path.isdir(version):
        return zip_folder(Path(version)), commit_of(version)
    here = Path(__file__).parents[1]
    commit = git(here, "rev-parse", "--short=12", "--verify", f"{version}^{{commit}}")
    if commit is None:
        raise ValueError(f"{version!r} is neither a folder nor a revision of the git repository in {here}: name one")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree.zip"
        if git(here, "archive", f"--output={tree}", commit, *CODE) is None:
            raise ValueError(f"revision {version!r} has no {' and '.join(CODE)}")
        shutil.unpack_archive(tree, Path(folder) / "tree")
        return zip_folder(Path(folder) / "tree"), commit


def zip_folder(folder: Path) -> bytes:
    """Zip CODE of a folder under one top folder, as Ray expects, without times and caches."""
    files = [f for part in CODE for f in ([folder / part] if (folder / part).is_file() else (folder / part).rglob("*"))]
    files = sorted(f for f in files if f.is_file() and "__pycache__" not in f.parts)
    if not any(f.name == "pretrain.py" for f in files):
        raise ValueError(f"{folder} has no nanochat_ray/train/pretrain.py: give the folder of a checkout")
    with tempfile.TemporaryFile() as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in files:
                entry = zipfile.ZipInfo(f"code/{file.relative_to(folder).as_posix()}")
                entry.external_attr = 0o644 << 16
                packed.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
        out.seek(0)
        return out.read()


def commit_of(folder: str) -> str | None:
    return git(Path(folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12") or None


def git(folder: Path, *command: str) -> str | None:
    """What git prints, or None if it fails or is not installed."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


# One run


def train_version(config: dict, task: rl.Task | None) -> None:
    """Train with the version's own code. Score it and write the result with this code. task: only for RL."""
    given = config["trial"]
    os.environ["NANOCHAT_RAY_HOME"] = given["home"]
    kind = rl.RlOptions if task else PretrainOptions
    options: Any = kind(**given["options"])
    run_dir = storage.join(storage.home(), "runs", options.run)
    measuring.failed.clear()
    try:
        uri = given["code"] if storage.is_remote(given["code"]) else f"file://{given['code']}"
        changed = {k: v for k, v in given["options"].items() if v != getattr(kind, k, None)}
        began = time.monotonic()
        trained = watch(_train_there(uri).remote(changed, task), run_dir, given.get("limits", {}))
        if task:
            write_rl_result(run_dir, given)
            return
        if given["scored_on"]:  # the baseline's validation rows
            given["columns"] |= {"val_bpb": score(trained, given["scored_on"], options)}
        if "wall_sec" in given["columns"]:
            given["columns"] |= {"wall_sec": time.monotonic() - began}
        sweep.finish_trial(given, options, trained, run_dir, notes=[])
    except Exception as error:
        sweep.report_failure(given, run_dir, error)


def _train_there(code: str):
    """A Ray task that trains with another version of the code and returns the checkpoint."""

    # A nested function is pickled by value. A module's function would be imported from the other version by name.
    def train_there(options: dict, task) -> str:
        from nanochat_ray.train import pretrain

        if not os.path.samefile(os.path.dirname(pretrain.__file__), "nanochat_ray/train"):
            raise ImportError(f"imported {pretrain.__file__} instead of {os.getcwd()}: see ray_started_elsewhere")
        if task is None:
            return pretrain.run(pretrain.PretrainOptions(**options)).checkpoint
        from nanochat_ray.train import rl

        return rl.run(rl.RlOptions(**options), task).checkpoint

    environment = {"working_dir": code, "env_vars": {"NANOCHAT_RAY_HOME": storage.home()}}
    return ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(train_there)


def write_rl_result(run_dir: str, given: dict) -> None:
    """Write result.json of a finished RL run, its line in results.csv, from metrics.jsonl."""
    options, lines = given["options"], read_metrics(run_dir)
    rewards = [line["rl/reward"] for line in lines if "rl/reward" in line]
    scores = [line for line in lines if "pass@1" in line]
    row = {
        "run": storage.name(run_dir),
        "num_iterations": given["num_iterations"],
        "train_time_sec": lines[-1]["total_training_time"],
        "seed": options["seed"],
        "workers": options["workers"],
        "answers": given["num_iterations"] * options["prompts_per_step"] * options["num_samples"],
        "reward": mean(rewards[-max(1, len(rewards) // 4) :]),  # over the last quarter of the steps
        "pass@1_before": scores[0]["pass@1"],
        "pass@1": scores[-1]["pass@1"],
        f"pass@{options['eval_samples']}": scores[-1][f"pass@{options['eval_samples']}"],
    }
    storage.write_json(storage.join(run_dir, "result.json"), row | given["columns"])


def score(checkpoint: str, rows: str, options: PretrainOptions) -> float:
    """Bits per byte on the validation rows of a folder, measured with the resources of a training worker."""
    scaling = hosts.scaling_config(1, options.use_gpu)
    device = "cuda" if scaling.use_gpu else "cpu"
    given = bpb.BpbOptions(checkpoint, rows, options.eval_tokens, device=device, dtype=options.dtype)
    resources = {"num_cpus": 1, "num_gpus": int(scaling.use_gpu)}
    # "DEFAULT": the trial's own placement group has no room for it.
    measured = ray.remote(**resources, scheduling_strategy="DEFAULT")(bpb.run).remote(given)
    return ray.get(measured)["val/bpb"]


def watch(result: ray.ObjectRef, run_dir: str, limits: dict) -> str:
    """Wait for a run and report its progress to Tune.

    limits: {}, or the most `seconds` of wall time and the most `memory_mb`. A run that exceeds one is ended. Raises
    TimeoutError or MemoryError then."""
    shown, began = None, time.monotonic()
    while not ray.wait([result], timeout=POLL_SECONDS)[0]:
        steps = [line for line in read_metrics(run_dir) if "train/loss" in line]
        if steps and steps[-1]["step"] != shown:
            shown = steps[-1]["step"]
            tune.report(steps[-1])
        if not limits:
            continue
        peak = steps[-1]["train/peak_memory_mb"] if steps else 0
        if time.monotonic() - began < limits["seconds"] and peak < limits["memory_mb"]:
            continue
        ray.cancel(result, force=True)  # its workers end with it, as it owns them
        if peak >= limits["memory_mb"]:
            raise MemoryError(f"{peak:,.0f} MB at step {shown}, more than {limits['memory_mb']:,.0f}")
        raise TimeoutError(f"not done after {limits['seconds']:.0f} s, at step {shown}")
    return ray.get(result)


@contextlib.contextmanager
def ray_started_elsewhere() -> Generator[None]:
    """Start Ray from an empty directory, which must exist while Ray runs.

    Without a job's working directory, Ray puts the current directory first on its workers' path, before a version's
    code. So it must not contain this package."""
    with tempfile.TemporaryDirectory() as empty:
        with contextlib.chdir(empty):
            start_ray()
        yield


@one_line_errors
def main() -> None:
    options = tyro.cli(CompareOptions, prog="python -m experiments.compare", description=__doc__)
    with ray_started_elsewhere():
        run(options)


if __name__ == "__main__":
    main()
