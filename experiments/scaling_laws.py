"""Finds the best model size for a compute budget: a grid of depths at equal FLOPs, and the laws of its optima.

    python -m experiments.scaling_laws --preset cpu --flops 1e12 3e12 --depths 1 2 3 4
    ray job submit --working-dir . -- python -m experiments.scaling_laws --flops 1e18 2.15e18 4.64e18 1e19

The runs of a budget differ only in depth, and so in the tokens that the budget allows. After a stop, run the same
command again to continue.
"""

from dataclasses import asdict, dataclass, replace

import tyro

from experiments import sweep
from experiments.report import conclude
from nanochat_ray.session import one_line_errors, start_ray

FLOPS = {"cpu": [1e12, 3e12], "gpu": [1e18, 2.15e18, 4.64e18, 1e19]}
DEPTHS = {"cpu": [1, 2, 3, 4], "gpu": [10, 12, 14, 16, 18, 20, 22, 24]}
FLOPS_PER_TOKEN_AND_PARAMETER = 6  # lower bound


@dataclass
class ScalingLawsOptions(sweep.SweepOptions):
    flops: list[float] | None = None
    """Training FLOPs of each budget. Default: 1e12 and 3e12 in the cpu preset, 1e18 to 1e19 in the gpu preset."""
    depths: list[int] | None = None
    """Depths to train. Default: 1 to 4 in the cpu preset, 10, 12, … 24 in the gpu preset."""


def run(options: ScalingLawsOptions) -> str:
    """Train the grid and return the URI of the report. Raises what run_trials raises, and ValueError if a budget is
    less than one step."""
    preset = sweep.preset_of(options)
    budgets, depths = sorted(options.flops or FLOPS[preset.name]), sorted(options.depths or DEPTHS[preset.name])
    smallest = sweep.scaling_params(preset, min(depths))
    rows = sweep.shared_rows(options, preset, max(budgets) / (FLOPS_PER_TOKEN_AND_PARAMETER * smallest))
    inputs = {"rows": rows, "preset": asdict(preset), "seed": options.seed}
    name, folder = sweep.begin("scaling_laws", options, inputs, budgets=budgets)
    runs = {
        f"{budget:.3g}-d{depth}": sweep.spaced(
            sweep.pretrain_options(options, preset, rows, depth, target_flops=budget), parts=2
        )
        for budget in budgets
        for depth in depths
    }
    workers = sweep.share_workers(options, [sweep.plan_of(run) for run in runs.values()])
    trials = [
        sweep.trial(label, replace(run, run=f"{name}/{label}"), n, options)
        for (label, run), n in zip(runs.items(), workers, strict=True)
    ]
    print(f"scaling_laws: {len(budgets)} budgets × {len(depths)} depths, in {folder}", flush=True)
    sweep.run_trials(folder, trials)
    return conclude(folder, "Scaling laws")


@one_line_errors
def main() -> None:
    options = tyro.cli(ScalingLawsOptions, prog="python -m experiments.scaling_laws", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
