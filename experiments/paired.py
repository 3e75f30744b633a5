"""Compares two versions of the code by pairs of runs with the same depth and seed: tables and verdicts."""

import math
from statistics import mean, stdev

from scipy import optimize, stats

LEVEL = 0.05  # significance level of two-sided tests, over all verdicts of a comparison
POWER = 0.8
MEASURES = {  # column: heading, format, whether less is better
    "val_bpb": ("val_bpb", "{:.4f}", True),
    "core_metric": ("CORE", "{:.4f}", False),
    "pass@1": ("pass@1", "{:.3f}", False),
    "reward": ("reward", "{:.3f}", False),
    "train_time_sec": ("time, s", "{:,.1f}", True),
    "tok_per_sec": ("tok/s", "{:,.0f}", False),
    "mfu": ("MFU", "{:.1%}", False),
    "peak_memory_mb": ("memory, MB", "{:,.0f}", True),
}
SCORES = {"core_metric", "pass@1", "reward"}  # these may be 0, so their differences are absolute; others are relative
ROUNDING = 1e-6  # smaller differences are rounding errors


def pairs(rows: list[dict], column: str, depth: int | None = None) -> dict[tuple[int, int], tuple[float, float]]:
    """{(depth, seed): (baseline, candidate)} of pairs of which both runs are measured, at one depth or at all."""
    sides = {"baseline": {}, "candidate": {}}
    for row in rows:
        if is_measured(row, column) and depth in (None, row["depth"]):
            sides[row["side"]][row["depth"], row["seed"]] = row[column]
    return {
        key: (value, sides["candidate"][key]) for key, value in sides["baseline"].items() if key in sides["candidate"]
    }


def is_measured(row: dict, column: str) -> bool:
    return row.get(column) is not None and math.isfinite(row[column])


def differences(column: str, matched: dict[tuple[int, int], tuple[float, float]]) -> list[float]:
    """Candidate minus baseline, one number per seed: the mean over depths.

    Differences are relative to the baseline, so that all depths have the same weight; those of SCORES are absolute. A
    seed is one observation, because it gives the same order of rows at each depth, so its differences may be
    correlated. Only seeds with a pair at every depth count. A baseline of 0 has no relative difference; it is the time
    of a run too short to be timed.
    """
    depths, by_seed = {depth for depth, _ in matched}, {}
    for (_, seed), (baseline, candidate) in matched.items():
        if column in SCORES or baseline:
            scale = 1 if column in SCORES else abs(baseline)
            by_seed.setdefault(seed, []).append((candidate - baseline) / scale)
    return [mean(changes) for changes in by_seed.values() if len(changes) == len(depths)]


def p_value(changes: list[float]) -> float:
    """The p-value of a two-sided paired t-test. NaN for a single pair."""
    if len(changes) < 2:
        return math.nan
    return float(2 * stats.t.sf(abs(mean(changes)) / _error(changes), len(changes) - 1))


def interval(changes: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean difference, by Student's t. It needs at least two pairs."""
    margin = float(stats.t.ppf(1 - LEVEL / 2, len(changes) - 1)) * _error(changes)
    return mean(changes) - margin, mean(changes) + margin


def detectable(changes: list[float]) -> float:
    """The true difference that a test with these pairs' number and scatter detects with a power of 80 %."""
    df = len(changes) - 1
    critical = stats.t.ppf(1 - LEVEL / 2, df)
    found = optimize.brentq(lambda shift: stats.nct.sf(critical, df, shift) - POWER, 0, 10 * critical)
    return found * _error(changes)


def _error(changes: list[float]) -> float:
    return max(stdev(changes), ROUNDING) / math.sqrt(len(changes))


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method (1979). NaN means that there was no test."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        adjusted[i] = largest
    return adjusted


def change(column: str, changes: list[float]) -> str:
    """The mean difference with its 95 % interval."""
    form = "{:+.3f}" if column in SCORES else "{:+.2%}"
    if len(changes) < 2:
        return form.format(mean(changes)) if changes else "not measured"
    low, high = map(form.format, interval(changes))
    return f"{form.format(mean(changes))} [{low}, {high}]"


def verdict(column: str, changes: list[float], p: float) -> str:
    """Better, worse or not distinguishable by p, with the difference, its interval and the detectable difference."""
    if not changes:
        return "not measured"
    shown = change(column, changes)
    if math.isnan(p):
        return f"{shown}, one pair: no test"
    about = f"{shown}, p {p:.2g}, {len(changes)} seeds"
    if p < LEVEL:
        return f"{'better' if (mean(changes) < 0) == MEASURES[column][2] else 'worse'} ({about})"
    if stdev(changes) > ROUNDING:
        least = detectable(changes)
        about += f"; {least:.3f}" if column in SCORES else f"; {least:.2%}"
        about += " would be detected in 80 of 100 such comparisons"
    return f"not distinguishable ({about})"


def decisive(rows: list[dict]) -> str:
    """The column of the verdict: pass@1 after RL, else the loss."""
    return "pass@1" if any(row.get("pass@1") is not None for row in rows) else "val_bpb"


def verdicts(rows: list[dict]) -> list[str]:
    """One line per depth and one over all depths. The verdict is on the loss, or on pass@1 after RL. Other measures are
    added without a verdict.

    Depths are tested, with Holm's correction, only if the test over all depths finds a difference. So equal code is
    called better or worse in at most 5 % of comparisons. A candidate that diverges where the baseline does not is
    worse, whatever its other runs give.
    """
    decides = decisive(rows)
    depths = sorted({row["depth"] for row in rows})
    changes = {depth: differences(decides, pairs(rows, decides, depth)) for depth in [*depths, None]}
    p_overall = p_value(changes[None])
    p_depths = holm([p_value(changes[depth]) for depth in depths])
    lines = []
    for depth, p in zip([*depths, None], [*p_depths, p_overall], strict=True):
        where = "over all depths" if depth is None else f"depth {depth}"
        if not pairs(rows, decides, depth):
            said = "no pair of runs is finished"
        elif depth is not None and not math.isnan(p) and not p_overall < LEVEL:
            said = f"{change(decides, changes[depth])} in {decides}"
        else:
            said = f"{verdict(decides, changes[depth], p)} in {decides}"
        parts = [said]
        for column in ("core_metric", "reward", "train_time_sec"):
            if beside := differences(column, pairs(rows, column, depth)):
                parts.append(f"{MEASURES[column][0].partition(',')[0]} {change(column, beside)}")
        lines.append(f"{where}: {'; '.join(parts)}")
    if any(": worse" in line for line in lines[:-1]):
        lines[-1] = lines[-1].replace(": better", ": better on average, worse at a depth", 1)
    lost = diverged(rows, decides)
    if only := [run for run in lost["candidate"] if run not in lost["baseline"]]:
        lines[-1] = f"over all depths: worse, because the candidate diverged at {_named(only)}; other runs: " + (
            lines[-1].removeprefix("over all depths: ")
        )
    if lost["baseline"]:
        lines[-1] += f"; the baseline diverged at {_named(lost['baseline'])}"
    if 0 < len(changes[None]) < 3:
        lines[-1] += "; fewer than three seeds detect only large differences"
    return lines


def diverged(rows: list[dict], column: str) -> dict[str, list[tuple[int, int]]]:
    """{side: (depth, seed) of each run that ended without a number}."""
    lost = {"baseline": [], "candidate": []}
    for row in rows:
        if not is_measured(row, column):
            lost[row["side"]].append((row["depth"], row["seed"]))
    return lost


def _named(runs: list[tuple[int, int]]) -> str:
    return ", ".join(f"depth {depth} seed {seed}" for depth, seed in runs)


def markdown(rows: list[dict], baseline: str, candidate: str) -> str:
    """The verdicts and a table per depth, for a pull request."""
    *by_depth, overall = verdicts(rows)
    text = [f"## {candidate} against {baseline}", "", f"- **{overall}**", *(f"- {line}" for line in by_depth), ""]
    for depth in sorted({row["depth"] for row in rows}):
        text += [f"### Depth {depth}", "", "| | baseline | candidate | change |", "|---|---|---|---|"]
        for column, (heading, form, _) in MEASURES.items():
            if matched := pairs(rows, column, depth):
                sides = [_spread([pair[i] for pair in matched.values()], form) for i in (0, 1)]
                changed = change(column, differences(column, matched))
                text.append(f"| {heading} | {sides[0]} | {sides[1]} | {changed} |")
        text.append("")
    text.append(
        "Mean ± standard deviation over seeds; changes with 95 % intervals. The verdict is a paired t-test at 5 %, "
        "with a seed's mean over depths as one observation. Depths are tested after it, with Holm's correction."
    )
    return "\n".join(text) + "\n"


def _spread(values: list[float], form: str) -> str:
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread
