"""Are the base learning rates right? A search at a small depth, and whether its find holds there and at a larger one.

    python -m experiments.tune_lr --preset cpu --depth 1 --transfer-depth 2

Rates are drawn log-uniformly around the base rates; ASHA (arXiv:1810.05934) stops those that fall behind. A ratio
decides how long a run is, so each has a search of its own. The best of many runs is best by luck, too: so the best
rates and the base rates are then trained at both depths with seeds that the search has not seen, and compared in pairs.
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

DEPTHS = {"cpu": (1, 2), "gpu": (12, 20)}  # of the search and of the check
MEASUREMENTS = 9  # of val/bpb in a run, besides the one before its first step
NEVER = 100  # measurements after which every trial is stopped
RUNG = 6  # the measurement at which a trial may be stopped: after 5 of 9, the one before the first step counts
KEPT = 3  # one of so many goes on


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
    check_seeds: int = 5
    """Seeds with which the best rates and the base rates are trained again, at each of the two depths."""
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

    def trial(label: str, depth: int, ratio: float, rates: dict[str, float], count: int, seed: int, **columns) -> dict:
        """One of `count` that differ in their rates alone."""
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
        asha = ASHAScheduler("evals", "val/bpb", "min", NEVER, RUNG, reduction_factor=KEPT)
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
    """The base rates, then draws around them."""
    random = np.random.default_rng(seed)
    return [
        {key: lr * math.exp(random.uniform(-1, 1) * math.log(factor)) if i else lr for key, lr in BASE_LRS.items()}
        for i in range(count)
    ]


def best_seen(ratio: float, depth: int, found: list[dict], best: dict) -> str:
    """A line on the search. It gives no gain: the best of many single runs is better than its rates are."""
    factors = ", ".join(f"{key.removesuffix('_lr')} × {best[key] / lr:.2f}" for key, lr in BASE_LRS.items())
    line = f"ratio {ratio:g}, depth {depth}: the best seen of {len(found)} finished trials is {factors}"
    if all(best[key] == lr for key, lr in BASE_LRS.items()):
        return f"{line}: the base rates, nothing to check"
    return line


@one_line_errors
def main() -> None:
    options = tyro.cli(TuneLrOptions, prog="python -m experiments.tune_lr", description=__doc__)
    start_ray()
    run(options)


if __name__ == "__main__":
    main()
