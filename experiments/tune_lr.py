"""Searches learning rates at a small depth, and checks the result there and at a larger depth.

    python -m experiments.tune_lr --preset cpu --depth 1 --transfer-depth 2

Rates are drawn log-uniformly around the base rates, and ASHA (arXiv:1810.05934) stops bad trials early. Each ratio of
tokens to parameters has its own search, because it sets the length of a run. The best of many runs is partly best by
chance. So the best rates and the base rates are trained again at both depths with new seeds and compared in pairs.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import tyro
from ray.tune.schedulers import ASHAScheduler

from experiments import paired, sweep
from experiments.compare import in_turns
from experiments.report import conclude
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train.failing import shared

DEPTHS = {"cpu": (1, 2), "gpu": (12, 20)}  # (of the search, of the check)
MEASUREMENTS = 9  # of val/bpb per run, besides the one before the first step
MAX_T = 100  # upper bound on measurements per trial (ASHA)
GRACE_PERIOD = 6  # first measurement at which a trial may be stopped (ASHA); the one before the first step counts
REDUCTION_FACTOR = 3  # one of so many trials continues (ASHA)


@dataclass
class TuneLrOptions(sweep.SweepOptions):
    depth: int | None = None
    """Depth of the search. Default: 1 in the cpu preset, 12 in the gpu preset."""
    transfer_depth: int | None = None
    """Larger depth at which the best rates are checked. Default: 2 in the cpu preset, 20 in the gpu preset."""
    samples: int = 12
    """Sets of rates to try. The first set is the base rates."""
    factor: float = 4.0
    """Each rate is drawn between its base rate divided by this factor and multiplied by it."""
    check_seeds: int = 5
    """Seeds for the check at each of the two depths."""
    ratios: list[float] | None = None
    """Tokens per scaling parameter. Each ratio has its own search. Default: the preset's ratio."""


def run(options: TuneLrOptions) -> str:
    """Search, check, and return the URI of the report. Raises what run_trials raises."""
    preset = sweep.preset_of(options)
    depth, larger = DEPTHS[preset.name]
    depth, larger = options.depth or depth, options.transfer_depth or larger
    ratios = options.ratios or [preset.ratio]
    rows = sweep.shared_rows(options, preset, max(ratios) * sweep.scaling_params(preset, max(depth, larger)))
    inputs = {"rows": rows, "preset": asdict(preset), "depth": depth, "factor": options.factor, "seed": options.seed}
    name, folder = sweep.begin("tune_lr", options, inputs, depth=depth, findings=[])
    said = []

    def trial(label: str, depth: int, ratio: float, rates: dict[str, float], count: int, seed: int, **columns) -> dict:
        """One of `count` trials that share the GPUs."""
        run = sweep.pretrain_options(options, replace(preset, ratio=ratio), rows, depth, run=f"{name}/{label}")
        run = replace(sweep.spaced(run, MEASUREMENTS), seed=seed)
        workers, *_ = sweep.share_workers(options, [sweep.plan_of(run)] * count)
        return sweep.trial(
            label, run, workers, options, base_lrs=rates, columns={"ratio": ratio, "side": None, **rates, **columns}
        )

    failing = shared()
    everything, draws = [], sample_rates(options.samples, options.factor, options.seed)
    for ratio in ratios:
        searched = [
            trial(f"r{ratio:g}-{i}", depth, ratio, rates, len(draws), options.seed) for i, rates in enumerate(draws)
        ]
        everything += searched
        asha = ASHAScheduler("evals", "val/bpb", "min", MAX_T, GRACE_PERIOD, reduction_factor=REDUCTION_FACTOR)
        found = sweep.run_trials(folder, searched, scheduler=asha, failing=failing)
        found = [row for row in found if paired.is_measured(row, "val_bpb")]
        if not found:
            said.append(f"ratio {ratio:g}, depth {depth}: every run diverged")
            continue
        best = min(found, key=lambda row: row["val_bpb"])
        said.append(best_seen(ratio, depth, found, best))
        rates = {key: best[key] for key in BASE_LRS}
        if rates == BASE_LRS:
            continue
        check = in_turns(
            [
                trial(f"r{ratio:g}-d{d}-{side}-s{seed}", d, ratio, lrs, 2 * options.check_seeds, seed, side=side)
                for d in sorted({depth, larger})
                for seed in range(options.seed + 1, options.seed + 1 + options.check_seeds)
                for side, lrs in (("baseline", BASE_LRS), ("candidate", rates))
            ]
        )
        everything += check
        lines = paired.verdicts(sweep.run_trials(folder, check, failing=failing))
        said += [f"ratio {ratio:g}, best rates against base rates with fresh seeds, {line}" for line in lines]
    sweep.write_results(folder, everything)
    sweep.begin("tune_lr", options, inputs, depth=depth, findings=said)
    return conclude(folder, "Search of learning rates")


def sample_rates(count: int, factor: float, seed: int) -> list[dict[str, float]]:
    """The base rates, then count − 1 random sets of rates around them."""
    random = np.random.default_rng(seed)
    return [
        {key: lr * math.exp(random.uniform(-1, 1) * math.log(factor)) if i else lr for key, lr in BASE_LRS.items()}
        for i in range(count)
    ]


def best_seen(ratio: float, depth: int, found: list[dict], best: dict) -> str:
    """A sentence on the best trial. It names no gain, because the best of many single runs is partly best by chance."""
    factors = ", ".join(f"{key.removesuffix('_lr')} × {best[key] / lr:.2f}" for key, lr in BASE_LRS.items())
    line = f"ratio {ratio:g}, depth {depth}: the best of {len(found)} finished trials has {factors}"
    if all(best[key] == lr for key, lr in BASE_LRS.items()):
        return f"{line}: these are the base rates, so there is nothing to check"
    return line


@one_line_errors
def main() -> None:
    options = tyro.cli(TuneLrOptions, prog="python -m experiments.tune_lr", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
