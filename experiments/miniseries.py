"""Trains one model per depth, and writes a table of results and the laws that they follow.

    python -m experiments.miniseries --preset cpu --depths 1 2 3 4
    ray job submit --working-dir . -- python -m experiments.miniseries --depths 12 14 16 18 20 22 24 26

The runs share one tokenizer and one set of rows. As many train in parallel as the cluster has room for. After a stop,
run the same command again: it skips finished depths and resumes the others from their newest checkpoints.
"""

from dataclasses import asdict, dataclass, replace

import tyro

from experiments import sweep
from experiments.report import conclude
from nanochat_ray.session import one_line_errors, start_ray

DEPTHS = {"cpu": [1, 2, 3, 4], "gpu": list(range(12, 27, 2))}


@dataclass
class MiniseriesOptions(sweep.SweepOptions):
    depths: list[int] | None = None
    """Depths to train. Default: 1 to 4 in the cpu preset, 12, 14, … 26 in the gpu preset."""


def run(options: MiniseriesOptions) -> str:
    """Train the series and return the URI of the report. Raises what run_trials raises."""
    preset = sweep.preset_of(options)
    depths = options.depths or DEPTHS[preset.name]
    if len(set(depths)) < len(depths):
        raise ValueError(f"--depths {' '.join(map(str, depths))}: a depth is named twice; name each once")
    rows = sweep.shared_rows(options, preset, preset.ratio * sweep.scaling_params(preset, max(depths)))
    inputs = {"rows": rows, "preset": asdict(preset), "seed": options.seed}
    name, folder = sweep.begin("miniseries", options, inputs)
    runs = [sweep.spaced(sweep.pretrain_options(options, preset, rows, depth)) for depth in depths]
    plans = [sweep.plan_of(run) for run in runs]
    workers = sweep.share_workers(options, plans)
    trials = [
        sweep.trial(f"d{run.depth}", replace(run, run=f"{name}/d{run.depth}"), n, options)
        for run, n in zip(runs, workers, strict=True)
    ]
    print(f"miniseries: {', '.join(t['name'] for t in trials)}, in {folder}", flush=True)
    sweep.run_trials(folder, trials)
    return conclude(folder, "Miniseries")


@one_line_errors
def main() -> None:
    options = tyro.cli(MiniseriesOptions, prog="python -m experiments.miniseries", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
