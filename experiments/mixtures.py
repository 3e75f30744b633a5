"""Finds the best shares of sources: trains with different shares, fits a law of the loss, and checks its optimum.

    python -m experiments.mixtures --preset cpu --sources pydocs notes.txt code/ --depths 1 2 --points 8
    ray job submit --working-dir . -- python -m experiments.mixtures --sources climbmix hub:OWNER/NAME --depths 8 12

The mixtures are equal shares, shares by size, and others that cover the range of shares. Each is trained at each depth
with the same tokenizer and validation rows. The law is that of arXiv:2403.16952 (experiments/mixing_laws.py), with
bootstrap intervals. Then the best mixture of the smallest depth is trained at every depth. This checks the law, and
whether the result of a small model holds for a larger one.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import numpy as np
import tyro

from experiments import mixing_laws, sweep
from experiments.report import conclude
from nanochat_ray import storage
from nanochat_ray.data.mixture import read_parts
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train.failing import shared
from nanochat_ray.train.pretrain import read_manifest

DEPTHS = {"cpu": [1, 2], "gpu": [8, 12]}


@dataclass
class MixturesOptions(sweep.SweepOptions):
    source: Annotated[list[str], tyro.conf.arg(name="sources")] = field(default_factory=list)  # ty: ignore[incompatible-mutable-override]
    """Two or more sources to mix, named as for prepare, but without weights."""
    depths: list[int] | None = None
    """Depths to train. Default: 1 and 2 in the cpu preset, 8 and 12 in the gpu preset."""
    points: int = 8
    """Mixtures at each depth, at least the number of sources plus 2. More mixtures make the intervals narrower."""
    target: list[str] = field(default_factory=list)
    """The loss to minimize: NAME is the val/bpb of one source, NAME=WEIGHT … a weighted mean. Default: the mean of all
    sources."""


def run(options: MixturesOptions) -> str:
    """Train the mixtures and return the URI of the report. Raises what run_trials raises, and ValueError for options
    that don't fit together."""
    preset = sweep.preset_of(options)
    depths = sorted(set(options.depths or DEPTHS[preset.name]))
    if len(options.source) < 2 and not options.rows:
        raise ValueError("--sources names fewer than two sources: name at least two to mix")
    rows = sweep.shared_rows(options, preset, preset.ratio * sweep.scaling_params(preset, max(depths)))
    parts = read_parts(rows)
    names = [part.name for part in parts]
    if len(parts) < 2 or options.points < len(parts) + 2:
        raise ValueError(
            f"--points {options.points} is too few for {len(parts)} sources: give two sources or more, and at least "
            f"--points {len(parts) + 2}"
        )
    target = target_weights(options.target, names)
    sizes = [read_manifest(part.rows)["splits"]["train"]["rows"] for part in parts]
    inputs = {"rows": rows, "preset": asdict(preset), "seed": options.seed}
    name, folder = sweep.begin("mixtures", options, inputs, sources=names, target=target)

    def trials(labelled: dict[str, np.ndarray]) -> list[dict]:
        """The trials of all depths for {label: shares}."""
        made = []
        mixed = {label: mix(rows, shares) for label, shares in labelled.items()}
        runs = [
            (label, sweep.spaced(sweep.pretrain_options(options, preset, mixed[label], depth)))
            for depth in depths
            for label in labelled
        ]
        given = options
        if options.workers and len(options.workers) > 1:  # a number per depth
            given = replace(options, workers=[n for n in options.workers for _ in labelled])
        workers = sweep.share_workers(given, [sweep.plan_of(run) for _, run in runs])
        for (label, run), count in zip(runs, workers, strict=True):
            shares = {f"share/{name}": share for name, share in zip(names, labelled[label].tolist(), strict=True)}
            run_name = f"d{run.depth}-{label}"
            run = replace(run, run=f"{name}/{run_name}")
            made.append(sweep.trial(run_name, run, count, options, columns={"mixture": label} | shares))
        return made

    points = mixing_laws.design(options.points, sizes, options.seed).round(3)
    labels = ["equal", "size", *(f"p{i}" for i in range(3, options.points + 1))]
    failing = shared()
    everything = trials(dict(zip(labels, points, strict=True)))
    print(f"mixtures: {options.points} of {', '.join(names)}, {len(everything)} runs in {folder}", flush=True)
    found = [row for row in sweep.run_trials(folder, everything, failing=failing) if row["depth"] == depths[0]]
    best = mixing_laws.fit(*mixing_laws.measured(found, names), list(target.values())).best.round(3)
    check = trials({f"best-{storage.fingerprint(best.tolist())[:4]}": best})
    sweep.run_trials(folder, check, failing=failing)
    sweep.write_results(folder, everything + check)
    return conclude(folder, "Mixtures")


def target_weights(wanted: list[str], names: list[str]) -> dict[str, float]:
    """{source: weight of its loss in the target}; the weights sum to 1. Raises ValueError for an unknown source."""
    weights = {}
    for text in wanted or names:
        name, _, weight = (text, "", "1") if text in names else text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[text] = -1.0
    if any(name not in names or weight < 0 for name, weight in weights.items()) or not sum(weights.values()):
        raise ValueError(f"--target {' '.join(wanted)}: give NAME or NAME=WEIGHT, with names of {', '.join(names)}")
    return {name: weights.get(name, 0.0) / sum(weights.values()) for name in names}


def mix(rows: str, shares: np.ndarray) -> str:
    """Write a folder of rows that mixes the sources of `rows` with other shares. It only has a manifest."""
    manifest = read_manifest(rows)
    parts = [part | {"weight": share} for part, share in zip(manifest["mixture"], shares.tolist(), strict=True)]
    fingerprint = storage.fingerprint(manifest["source_fingerprint"], shares.tolist())
    uri = f"{rows}-{fingerprint[:8]}"
    storage.write_json(
        storage.join(uri, "manifest.json"), manifest | {"mixture": parts, "source_fingerprint": fingerprint}
    )
    return uri


@one_line_errors
def main() -> None:
    options = tyro.cli(MixturesOptions, prog="python -m experiments.mixtures", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
