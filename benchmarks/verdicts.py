"""How often the verdicts of experiments/ are right: simulated results whose truth is known.

python -m benchmarks.verdicts          # the tables of docs/experiments.md, a minute of one core
"""

import numpy as np
import tyro

from experiments import fits, paired, research, sequential
from experiments.compare import in_turns
from experiments.leaderboard import crossing

TIME_SD = 0.1  # of the logarithm of a pair's ratio of times to the target
DEPTHS = {1: (12,), 3: (12, 14, 16)}


def comparison(random, effects, seeds=5, sd=0.002, together=0.0, drift=0.0, time_sd=0.003) -> list[dict]:
    """Rows of a comparison. effects: relative, by depth. sd: of a run's loss, relative. together: the correlation that
    differences of one seed have over depths. drift: by which each run takes longer than the one before it."""
    depths = DEPTHS[len(effects)]
    trials = [
        {"options": {"seed": seed, "depth": depth}, "columns": {"side": side}}
        for seed in range(seeds)
        for depth in depths
        for side in ("baseline", "candidate")
    ]
    shared = random.normal(size=(seeds, 2)) * np.sqrt(together)
    rows = []
    for turn, trial in enumerate(in_turns(trials)):
        side, seed, depth = trial["columns"]["side"], *trial["options"].values()
        noise = shared[seed, int(side == "candidate")] + random.normal() * np.sqrt(1 - together)
        effect = effects[depths.index(depth)] * (side == "candidate")
        time = 100 * (1 + drift * turn) * (1 + time_sd * random.normal())
        rows.append({"side": side, "seed": seed, "depth": depth, "val_bpb": (1 + effect) * (1 + sd * noise)})
        rows[-1]["train_time_sec"] = time
    return rows


def words(rows: list[dict]) -> list[str]:
    """The word of each line of verdicts, the one over all depths last; "" for a line without a verdict."""
    lines = [line.partition(": ")[2] for line in paired.verdicts(rows)]
    return [next((w for w in ("better", "worse", "not distinguishable") if line.startswith(w)), "") for line in lines]


def share(draws: int, says, **options) -> float:
    """In how many of so many simulated comparisons `says(words)` is true."""
    random = np.random.default_rng(0)
    return float(np.mean([says(words(comparison(random, **options))) for _ in range(draws)]))


def any_verdict(said: list[str]) -> bool:
    return "better" in said or "worse" in said


def time_differs(draws: int, **options) -> float:
    """In how many comparisons of equal codes the interval of the change of time does not hold 0."""
    random, found = np.random.default_rng(0), 0
    for _ in range(draws):
        matched = paired.pairs(comparison(random, effects=[0.0], **options), "train_time_sec")
        low, high = paired.interval(paired.differences("train_time_sec", matched))
        found += not low <= 0 <= high
    return found / draws


def rates_found(draws: int, seeds: int, sd: float = 0.01, effect: float = 0.0) -> tuple[float, float]:
    """A search that found rates by luck: how often its check calls them better, and the mean gain it shows."""
    random, better, gains = np.random.default_rng(0), 0, []
    for _ in range(draws):
        rows = comparison(random, effects=[-effect], seeds=seeds, sd=sd)
        better += words(rows)[-1] == "better"
        gains += paired.differences("val_bpb", paired.pairs(rows, "val_bpb"))
    return better / draws, -float(np.mean(gains))


def times_to_target(draws: int, measurements: int, sd: float, above: float = 0.0) -> tuple[float, float]:
    """(mean time, share with a time) of a leaderboard, for runs that come down to the target at time 1, at 0.04 bpb a
    unit of time, and go on to 1.25. Those that truly end `above` it should have none."""
    random, target, found = np.random.default_rng(0), 0.75, []
    times = np.linspace(0, 1.25, measurements + 1)
    true = target + 0.04 * (1 - times) if not above else target + above + 0.04 * (1.25 - times)
    for _ in range(draws):
        values = true + sd * random.normal(size=len(times))
        lines = [
            {"step": t, "total_training_time": t, "total_training_flops": t, "val/bpb": v}
            for t, v in zip(times, values, strict=True)
        ]
        if reached := crossing(lines, target):
            found.append(reached["total_training_time"])
    return float(np.mean(found)) if found else float("nan"), len(found) / draws


def drawn(random, level: float, effect: float = 0.0, depths: int = 1, heavy: bool = False) -> str:
    """The last decision on a candidate whose time to the target is shorter by `effect`: "better" only if at all depths.

    The logarithm of a pair's ratio of times has a standard deviation of TIME_SD; heavy: by Student's t of 3 degrees."""
    for _ in range(depths):
        noise = (
            random.standard_t(3, research.LOOKS[-1]) / np.sqrt(3) if heavy else random.normal(size=research.LOOKS[-1])
        )
        changes = [*(TIME_SD * noise + np.log1p(-effect))]
        if (said := sequential.decide(changes, tuple(research.LOOKS), level)) != "better":
            return said
    return "better"


def campaigns(draws: int, candidates: int, **options) -> float:
    """In how many campaigns of so many candidates, all equal to the baseline, any is accepted."""
    random, level, found = np.random.default_rng(0), research.CAMPAIGN_LEVEL / candidates, 0
    for _ in range(draws):
        found += any(drawn(random, level, **options) == "better" for _ in range(candidates))
    return found / draws


def candidates_found(draws: int, candidates: int, effect: float, **options) -> float:
    """How many candidates of a campaign that are faster by `effect` at each depth are accepted."""
    random, level = np.random.default_rng(0), research.CAMPAIGN_LEVEL / candidates
    return float(np.mean([drawn(random, level, effect, **options) == "better" for _ in range(draws)]))


def coverage(draws: int, floor: float, with_floor: bool, noise: float) -> tuple[float, float]:
    """Of laws fitted to 8 depths: how often 95 % intervals hold the exponent, and the value at 30 times the FLOPs."""
    x, beyond = np.geomspace(1e18, 3e19, 8), 9e20
    coefficient, exponent = (200, -0.15) if floor else (60, -0.06)
    random, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(draws):
        y = (floor + coefficient * x**exponent) * np.exp(random.normal(0, noise, len(x)))
        law = fits.power_law(x, y, with_floor)
        low, high = law.band(beyond)
        held += [
            law.exponent.low <= exponent <= law.exponent.high,
            low <= floor + coefficient * beyond**exponent <= high,
        ]
    return tuple(held / draws)


def table(*head: str, rows: list[list]) -> None:
    cells = [list(head), ["---"] * len(head), *rows]
    print(
        "\n"
        + "\n".join("| " + " | ".join(c if isinstance(c, str) else f"{c:.1%}" for c in row) + " |" for row in cells)
    )


def main(draws: int = 500) -> None:
    """Print the tables.

    Args:
        draws: Simulated results for each number.
    """
    rows = [
        [f"{depths} depths, correlation {together}"]
        + [share(draws, any_verdict, effects=[0.0] * depths, seeds=n, together=together) for n in (3, 5)]
        for depths, together in ((1, 0.0), (3, 0.0), (3, 0.5))
    ]
    table("equal codes: better or worse on any line", "3 seeds", "5 seeds", rows=rows)
    rows = [
        [f"{depths} depths, better by {effect:.1%}"]
        + [
            share(draws, lambda said: said[-1] == "better", effects=[-effect] * depths, seeds=n, sd=0.001)
            for n in (2, 3, 5, 8)
        ]
        for depths in (1, 3)
        for effect in (0.001, 0.002, 0.005)
    ]
    table("found, runs scatter by 0.1 %", *(f"{n} seeds" for n in (2, 3, 5, 8)), rows=rows)
    rows = [
        [f"{drift:.1%} a run"] + [time_differs(draws, seeds=n, drift=drift) for n in (3, 4, 5, 6)]
        for drift in (0.0, 0.001, 0.002, 0.005)
    ]
    table("equal codes, a machine that slows down: times differ", *(f"{n} seeds" for n in (3, 4, 5, 6)), rows=rows)
    rows = [
        [
            f"{'a floor' if floor else 'no floor'}, noise {noise:.1%}",
            *coverage(draws, floor, True, noise),
            *coverage(draws, floor, False, noise),
        ]
        for floor in (0.55, 0.0)
        for noise in (0.001, 0.003)
    ]
    table(
        "truth", "exponent", "at 30 × FLOPs", "exponent, no floor fitted", "at 30 × FLOPs, no floor fitted", rows=rows
    )
    rows = [
        [
            f"{sd} bpb, {n} measurements",
            f"{times_to_target(draws, n, sd)[0]:.3f}",
            times_to_target(draws, n, sd, above=0.002)[1],
        ]
        for sd in (0.0005, 0.002, 0.004)
        for n in (5, 20, 100)
    ]
    table("noise of a measurement", "mean time, 1 is true", "listed though it ends .002 above", rows=rows)
    effects = (0.05, 0.1, 0.2, 0.3)
    rows = [
        [f"{n} candidates, {depths} depths{', heavy tails' if heavy else ''}"]
        + [campaigns(draws // 5, n, depths=depths, heavy=heavy)]
        + [candidates_found(draws, n, effect, depths=depths, heavy=heavy) for effect in effects]
        for n, depths, heavy in ((20, 1, False), (20, 1, True), (20, 3, False), (200, 1, False), (200, 1, True))
    ]
    table("campaign", "equal codes: any accepted", *(f"faster by {effect:.0%}" for effect in effects), rows=rows)
    rows = [[f"{sd:.1%}", *(rates_found(draws, seeds, sd)[0] for seeds in (3, 5))] for sd in (0.002, 0.01)]
    table("rates that don't matter, scatter of a run: better", "3 seeds", "5 seeds", rows=rows)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.verdicts")
