"""Two versions of the code, measured in pairs of runs of one depth and seed: tables and verdicts in plain words."""

import math
from statistics import mean, stdev

from scipy import stats

LEVEL = 0.05  # of a two-sided paired t-test
MEASURES = {  # column: heading, text, whether less is better
    "val_bpb": ("val_bpb", "{:.4f}", True),
    "core_metric": ("CORE", "{:.4f}", False),
    "pass@1": ("pass@1", "{:.3f}", False),
    "reward": ("reward", "{:.3f}", False),
    "train_time_sec": ("time, s", "{:,.1f}", True),
    "tok_per_sec": ("tok/s", "{:,.0f}", False),
    "mfu": ("MFU", "{:.1%}", False),
    "peak_memory_mb": ("memory, MB", "{:,.0f}", True),
}
SCORES = {"core_metric", "pass@1", "reward"}  # may be 0: their differences are absolute, those of others relative
TINY = 1e-6  # differences below it are rounding


def pairs(rows: list[dict], column: str, depth: int | None = None) -> list[tuple[float, float]]:
    """(baseline, candidate) of every depth and seed that both have finished, of one depth or all."""
    sides = {"baseline": {}, "candidate": {}}
    for row in rows:
        if row.get(column) is not None and depth in (None, row["depth"]):
            sides[row["side"]][row["depth"], row["seed"]] = row[column]
    return [(value, sides["candidate"][key]) for key, value in sides["baseline"].items() if key in sides["candidate"]]


def differences(column: str, matched: list[tuple[float, float]]) -> list[float]:
    """Candidate minus baseline by pair; relative to the baseline, so that depths weigh the same, but for scores. A
    baseline of 0, as the time of a run that was too short to be timed, has no relative difference."""
    if column in SCORES:
        return [candidate - baseline for baseline, candidate in matched]
    return [(candidate - baseline) / abs(baseline) for baseline, candidate in matched if baseline]


def p_value(changes: list[float]) -> float:
    """Of a two-sided paired t-test of differences; NaN for a single pair."""
    if len(changes) < 2:
        return math.nan
    if max(map(abs, changes)) < TINY:
        return 1.0
    if stdev(changes) < TINY:  # the same difference each time
        return 0.0
    return float(stats.ttest_1samp(changes, 0.0).pvalue)


def verdict(column: str, matched: list[tuple[float, float]]) -> str:
    """better, worse or not distinguishable, with the mean difference and p."""
    changes = differences(column, matched)
    if not changes:
        return "not measured"
    p, change = p_value(changes), mean(changes)
    shown = f"{change:+.3f}" if column in SCORES else f"{change:+.2%}"
    if math.isnan(p):
        return f"{shown}, one pair: no test"
    if p >= LEVEL:
        return f"not distinguishable ({shown}, p {p:.2g}, {len(matched)} pairs)"
    word = "better" if (change < 0) == MEASURES[column][2] else "worse"
    return f"{word} ({shown}, p {p:.2g}, {len(matched)} pairs)"


def decisive(rows: list[dict]) -> str:
    """The column of the verdict: the loss, or after RL pass@1."""
    return "pass@1" if any(row.get("pass@1") is not None for row in rows) else "val_bpb"


def verdicts(rows: list[dict]) -> list[str]:
    """A line a depth and one over all. The verdict is that of the loss, or of pass@1 after RL; what else was measured
    is told beside it."""
    lines = []
    decides = decisive(rows)
    for depth in [*sorted({row["depth"] for row in rows}), None]:
        where = "over all depths" if depth is None else f"depth {depth}"
        matched = pairs(rows, decides, depth)
        said = f"{verdict(decides, matched)} in {decides}"
        parts = [said if matched else "no pair of runs is finished"]
        for column in ("core_metric", "reward", "train_time_sec"):
            if beside := pairs(rows, column, depth):
                parts.append(f"{MEASURES[column][0].partition(',')[0]} {verdict(column, beside)}")
        lines.append(f"{where}: {'; '.join(parts)}")
    return lines


def markdown(rows: list[dict], baseline: str, candidate: str) -> str:
    """A table a depth and the verdicts, for a pull request."""
    text = [f"## {candidate} against {baseline}", "", *(f"- **{line}**" for line in verdicts(rows)[-1:])]
    text += [*(f"- {line}" for line in verdicts(rows)[:-1]), ""]
    for depth in sorted({row["depth"] for row in rows}):
        text += [f"### Depth {depth}", "", "| | baseline | candidate | verdict |", "|---|---|---|---|"]
        for column, (heading, form, _) in MEASURES.items():
            matched = pairs(rows, column, depth)
            if matched:
                sides = [_spread([pair[i] for pair in matched], form) for i in (0, 1)]
                text.append(f"| {heading} | {sides[0]} | {sides[1]} | {verdict(column, matched)} |")
        text.append("")
    text.append("Mean ± standard deviation over seeds; the test is a paired t-test on differences, level 5 %.")
    return "\n".join(text) + "\n"


def _spread(values: list[float], form: str) -> str:
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread
