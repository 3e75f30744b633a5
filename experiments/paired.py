"""Two versions of the code, measured in pairs of runs of one depth and seed: tables and verdicts in plain words."""

import math
from statistics import mean, stdev

from scipy import stats

LEVEL = 0.05  # of a two-sided paired t-test
MEASURES = {  # column: heading, text, whether less is better
    "val_bpb": ("val_bpb", "{:.4f}", True),
    "core_metric": ("CORE", "{:.4f}", False),
    "train_time_sec": ("time, s", "{:,.1f}", True),
    "tok_per_sec": ("tok/s", "{:,.0f}", False),
    "mfu": ("MFU", "{:.1%}", False),
    "peak_memory_mb": ("memory, MB", "{:,.0f}", True),
}
TINY = 1e-6  # relative: differences below it are rounding


def pairs(rows: list[dict], column: str, depth: int | None = None) -> list[tuple[float, float]]:
    """(baseline, candidate) of every depth and seed that both have finished, of one depth or all."""
    sides = {"baseline": {}, "candidate": {}}
    for row in rows:
        if row.get(column) is not None and depth in (None, row["depth"]):
            sides[row["side"]][row["depth"], row["seed"]] = row[column]
    return [(value, sides["candidate"][key]) for key, value in sides["baseline"].items() if key in sides["candidate"]]


def p_value(matched: list[tuple[float, float]]) -> float:
    """Of a two-sided paired t-test on relative differences, so that depths weigh the same; NaN for a single pair."""
    differences = [(candidate - baseline) / abs(baseline) if baseline else 0.0 for baseline, candidate in matched]
    if len(differences) < 2:
        return math.nan
    if max(map(abs, differences)) < TINY:
        return 1.0
    if stdev(differences) < TINY:  # the same difference each time
        return 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def verdict(matched: list[tuple[float, float]], less_is_better: bool) -> str:
    """better, worse or not distinguishable, with the mean relative difference and p."""
    if not matched:
        return "not measured"
    change = mean((candidate - baseline) / abs(baseline) if baseline else 0.0 for baseline, candidate in matched)
    p = p_value(matched)
    if math.isnan(p):
        return f"{change:+.2%}, one pair: no test"
    if p >= LEVEL:
        return f"not distinguishable ({change:+.2%}, p {p:.2g}, {len(matched)} pairs)"
    word = "better" if (change < 0) == less_is_better else "worse"
    return f"{word} ({change:+.2%}, p {p:.2g}, {len(matched)} pairs)"


def verdicts(rows: list[dict]) -> list[str]:
    """A line a depth and one over all. The verdict is that of the loss; CORE and the time are told beside it."""
    lines = []
    for depth in [*sorted({row["depth"] for row in rows}), None]:
        where = "over all depths" if depth is None else f"depth {depth}"
        matched = pairs(rows, "val_bpb", depth)
        parts = [verdict(matched, less_is_better=True) + " in val_bpb" if matched else "no pair of runs is finished"]
        for column in ("core_metric", "train_time_sec"):
            if beside := pairs(rows, column, depth):
                heading, _, less_is_better = MEASURES[column]
                parts.append(f"{heading.partition(',')[0]} {verdict(beside, less_is_better)}")
        lines.append(f"{where}: {'; '.join(parts)}")
    return lines


def markdown(rows: list[dict], baseline: str, candidate: str) -> str:
    """A table a depth and the verdicts, for a pull request."""
    text = [f"## {candidate} against {baseline}", "", *(f"- **{line}**" for line in verdicts(rows)[-1:])]
    text += [*(f"- {line}" for line in verdicts(rows)[:-1]), ""]
    for depth in sorted({row["depth"] for row in rows}):
        text += [f"### Depth {depth}", "", "| | baseline | candidate | verdict |", "|---|---|---|---|"]
        for column, (heading, form, less_is_better) in MEASURES.items():
            matched = pairs(rows, column, depth)
            if matched:
                sides = [_spread([pair[i] for pair in matched], form) for i in (0, 1)]
                text.append(f"| {heading} | {sides[0]} | {sides[1]} | {verdict(matched, less_is_better)} |")
        text.append("")
    text.append("Mean ± standard deviation over seeds; the test is a paired t-test on relative differences, level 5 %.")
    return "\n".join(text) + "\n"


def _spread(values: list[float], form: str) -> str:
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread
