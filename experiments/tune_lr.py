"""Are the base learning rates right? A search at a small depth, and whether what it finds holds at a larger one.

    python -m experiments.tune_lr --preset cpu --depth 1 --transfer-depth 2

Rates are drawn log-uniformly around the base rates; ASHA (arXiv:1810.05934) stops those that fall behind. A ratio
decides how long a run is, so each has a search of its own. Then the best rates and the base rates train the larger
depth.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import tyro
from ray.tune.schedulers import ASHAScheduler

from experiments import sweep
from experiments.report import conclude
from nanochat_ray.cli import one_line_errors, start_ray
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.train.failing import shared

DEPTHS = {"cpu": (1, 2), "gpu": (12, 20)}  # of the search and of the check
MEASUREMENTS = 9  # of val/bpb in a run, besides the one before its first step
NEVER = 100  # measurements after which every trial is stopped
RUNGS_AT = 3  # measurements after which a trial may be stopped first, and by what factor the next rung is later


@dataclass
class TuneLrOptions(sweep.SweepOptions):
    depth: int | None = None
    """Where rates are searched; the default is 1 in the cpu preset and 12 in the gpu preset."""
    transfer_depth: int | None = None
    """Where they are checked; the default is 2 in the cpu preset and 20 in the gpu preset."""
    samples: int = 12
    """Sets of rates; the first are the base rates."""
    factor: float = 4.0
    """Each rate is drawn from its base rate divided by this to multiplied by this."""
    ratios: list[float] | None = None
    """Tokens per scaling parameter, with a search for each; the default is the preset's ratio alone."""


def run(options: TuneLrOptions) -> str:
    """Search, check, and return the uri of the report. Raises what run_trials raises."""
    preset = sweep.preset_of(options)
    depth, larger = DEPTHS[preset.name]
    depth, larger = options.depth or depth, options.transfer_depth or larger
    ratios = options.ratios or [preset.ratio]
    rows = sweep.shared_rows(options, preset, max(ratios) * sweep.scaling_params(preset, max(depth, larger)))
    inputs = {"rows": rows, "preset": asdict(preset), "depth": depth, "factor": options.factor, "seed": options.seed}
    name, folder = sweep.begin("tune_lr", options, inputs, depth=depth, findings=[])
    said = []

    def trial(label: str, depth: int, ratio: float, rates: dict[str, float], count: int) -> dict:
        """One of `count` that differ in their rates alone."""
        run = sweep.pretrain_options(options, replace(preset, ratio=ratio), rows, depth, run=f"{name}/{label}")
        run = sweep.spaced(run, MEASUREMENTS)
        workers, *_ = sweep.share_workers(options, [sweep.plan_of(run)] * count)
        return sweep.trial(label, run, workers, options, base_lrs=rates, columns={"ratio": ratio, **rates})

    failing = shared()
    everything, draws = [], sample_rates(options.samples, options.factor, options.seed)
    for ratio in ratios:
        searched = [trial(f"r{ratio:g}-{i}", depth, ratio, rates, len(draws)) for i, rates in enumerate(draws)]
        everything += searched
        asha = ASHAScheduler("evals", "val/bpb", "min", NEVER, RUNGS_AT, reduction_factor=RUNGS_AT)
        found = sweep.run_trials(folder, searched, scheduler=asha, failing=failing)
        best = min(found, key=lambda row: row["val_bpb"])
        rates = {key: best[key] for key in BASE_LRS}
        check = [
            trial(f"r{ratio:g}-d{larger}-{side}", larger, ratio, lrs, count=2)
            for side, lrs in (("base", BASE_LRS), ("best", rates))
        ]
        everything += check
        results = {row["run"]: row["val_bpb"] for row in sweep.run_trials(folder, check, failing=failing)}
        said += sentences(ratio, depth, larger, found, best, [results[t["name"]] for t in check])
    sweep.write_results(folder, everything)
    sweep.begin("tune_lr", options, inputs, depth=depth, findings=said)
    return conclude(folder, "Search of learning rates")


def sample_rates(count: int, factor: float, seed: int) -> list[dict[str, float]]:
    """The base rates, then draws around them."""
    random = np.random.default_rng(seed)
    return [
        {key: lr * math.exp(random.uniform(-1, 1) * math.log(factor)) if i else lr for key, lr in BASE_LRS.items()}
        for i in range(count)
    ]


def sentences(ratio: float, depth: int, larger: int, found: list[dict], best: dict, checked: list[float]) -> list[str]:
    base = next((row["val_bpb"] for row in found if all(row[key] == lr for key, lr in BASE_LRS.items())), None)
    factors = ", ".join(f"{key.removesuffix('_lr')} × {best[key] / lr:.2f}" for key, lr in BASE_LRS.items())
    gain, transferred = (base - best["val_bpb"]) / base if base else None, (checked[0] - checked[1]) / checked[0]
    beside = f"{gain:.2%} below the base rates" if base else "the base rates were stopped early"
    return [
        f"ratio {ratio:g}, depth {depth}: the best of {len(found)} finished trials is {factors}: "
        f"val_bpb {best['val_bpb']:.4f}, {beside}",
        f"ratio {ratio:g}, depth {larger}: {checked[1]:.4f} with these rates, {checked[0]:.4f} with the base rates: "
        + (f"the gain transfers, {transferred:.2%}" if transferred > 0 else "no gain, the rates do not transfer"),
    ]


@one_line_errors
def main() -> None:
    options = tyro.cli(TuneLrOptions, prog="python -m experiments.tune_lr", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
