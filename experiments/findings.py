"""Reads the folder of a sweep and describes its results in sentences, a table and figures, by the kind of sweep."""

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from experiments import fits, ledger, mixing_laws, paired
from experiments.leaderboard import GPT2_CORE
from experiments.svg import GRID, INK, SERIES, empty_figure, style, svg
from experiments.sweep import read_results
from nanochat_ray import storage
from nanochat_ray.model.scaling import RunPlan, plan_run

MAX_EXTRAPOLATION = 100  # no prediction above this multiple of the largest run's FLOPs
MAX_DEPTH = 200
MIN_DEPTHS_FOR_FLOOR = 5  # for a law with a floor; with fewer depths, its interval is too wide to be useful
MIN_DEPTHS_FOR_CORE = 5  # for a prediction of CORE
CORE_SCATTER = 0.01  # difference of CORE between equal runs
WIDE_INTERVAL = 0.2  # an interval of an exponent near 0.5 that is wider says little

# Definitions of a model's size N: the parameters that count.
COUNTED = {
    "transformer + lm_head": ("params_transformer_matrices", "params_lm_head"),
    "all": ("params_total",),
    "without embeddings": ("params_transformer_matrices", "params_scalars"),
}


# Columns of results.csv that come first in the table, and columns left out of it, which are in the runs' own tables.
FIRST = (
    "side", "depth", "flops", "val_bpb", "core_metric", "pass@1", "reward", "train_time_sec", "tok_per_sec", "mfu",
    "peak_memory_mb",
)  # fmt: skip
LEFT_OUT = ("model_dim", "params_wte", "params_value_embeds", "params_scalars", "params_lm_head", "seed", "commit")


FORMS = {"flops": "{:.3g}"} | {column: form for column, (_, form, _) in paired.MEASURES.items()}


@dataclass
class Findings:
    title: str
    sentences: list[str] = field(default_factory=list)
    figures: list[tuple[str, Markup]] = field(default_factory=list)  # (caption, SVG)
    columns: list[str] = field(default_factory=list)
    table: list[list] = field(default_factory=list)


def read(folder: str) -> Findings | None:
    """The findings of a sweep's folder. None if it is not the folder of a sweep."""
    uri = storage.join(folder, "sweep.json")
    if not storage.exists(uri):
        return None
    about = storage.read_json(uri)
    results = storage.join(folder, "results.csv")
    rows = read_results(folder) if storage.exists(results) else []
    if not rows:
        return Findings(about["kind"], ["No run is finished yet."])
    decides = paired.decisive(rows)
    measured = [row for row in rows if paired.is_measured(row, decides)]
    if measured:
        found = KINDS[about["kind"]](rows if about["kind"] == "compare" else measured, about, folder)
    else:
        found = Findings(about["kind"], ["no run has ended with a number"])
    found.sentences += [
        f"{row['run']} is left out: {row.get('notes') or f'{decides} is not a number'}"
        for row in rows
        if row not in measured
    ]
    shown = [key for key in rows[0] if key not in LEFT_OUT and any(row[key] is not None for row in rows)]
    found.columns = ["run", *sorted(shown[1:], key=lambda key: key not in FIRST)]
    found.table = [[_cell(key, row[key]) for key in found.columns] for row in rows]
    return found


def _cell(key: str, value):
    return value if value is None or key not in FORMS else FORMS[key].format(value)


# Miniseries


def miniseries(rows: list[dict], about: dict, folder: str) -> Findings:
    found = Findings("Miniseries")
    flops, bpb = ([row[key] for row in rows] for key in ("flops", "val_bpb"))
    if len(rows) >= 2:
        floored = len(rows) >= MIN_DEPTHS_FOR_FLOOR
        law = fits.power_law(flops, bpb, with_floor=floored)
        floor = f"{law.floor} + " if floored else ""
        found.sentences.append(f"val_bpb = {floor}{_law(law, 'FLOPs')}, over {len(rows)} depths")
        if not floored:
            found.sentences[-1] += (
                f", assuming no floor: {MIN_DEPTHS_FOR_FLOOR} depths are needed to fit one, so don't extrapolate"
            )
        found.figures.append(("Bits per byte against training FLOPs", _series_figure(rows, "val_bpb", law, bpb)))
    else:
        found.sentences.append("only one depth is finished: a law needs two, and its intervals need three")
    scored = [row for row in rows if row.get("core_metric") is not None]
    found.sentences.append(predict_depth(scored, dial_of(folder, rows[0]["run"])))
    if len(scored) >= 2:
        errors = fits.power_law([row["flops"] for row in scored], [1 - row["core_metric"] for row in scored])
        cores = [row["core_metric"] for row in scored]
        found.figures.append(("CORE against training FLOPs", _series_figure(scored, "core_metric", errors, cores)))
    return found


def predict_depth(scored: list[dict], dial: dict) -> str:
    """The depth that reaches GPT-2's CORE, or why it can't be predicted, as a sentence. dial: plan_run's arguments."""
    goal = f"CORE {GPT2_CORE}"
    reached = [row for row in scored if row["core_metric"] >= GPT2_CORE]
    if reached:
        first = min(reached, key=lambda row: row["depth"])
        near = first["core_metric"] < GPT2_CORE + CORE_SCATTER
        return f"{goal} is reached at depth {first['depth']} (CORE {first['core_metric']:.4f})" + (
            f", but equal runs differ by {CORE_SCATTER:g}: train it with more seeds" if near else ""
        )
    unknown = f"the depth that reaches {goal} can't be predicted from these runs: "
    if len(scored) < MIN_DEPTHS_FOR_CORE:
        return unknown + f"{len(scored)} of them have a CORE score, and a prediction needs {MIN_DEPTHS_FOR_CORE}"
    law = fits.power_law([row["flops"] for row in scored], [1 - row["core_metric"] for row in scored])
    if law.exponent.high >= 0:
        return unknown + f"CORE does not clearly rise with FLOPs (exponent of 1 - CORE: {law.exponent})"
    flops = law.solve(1 - GPT2_CORE)
    most = max(row["flops"] for row in scored)
    if flops.value > MAX_EXTRAPOLATION * most:
        return unknown + f"it would need {flops} FLOPs, but the largest run had {most:.3g}"
    depth, low, high = (depth_of(f, dial) for f in (flops.value, flops.low, flops.high))
    ends = f"[{low}, {high if high < MAX_DEPTH else 'no end'}]"
    return f"{goal} is predicted at depth {depth} {ends}, of {flops} FLOPs, if 1 - CORE = {_law(law, 'FLOPs')}"


def depth_of(flops: float, dial: dict) -> int:
    """The smallest depth whose run takes at least so many FLOPs."""
    return 1 + bisect_left(range(1, MAX_DEPTH), flops, key=lambda depth: plan_of_depth(depth, dial).total_flops)


def plan_of_depth(depth: int, dial: dict) -> RunPlan:
    return plan_run(depth, **dial)


def dial_of(folder: str, run: str) -> dict:
    """The arguments of plan_run for a run, without its depth and horizon."""
    config = storage.read_json(storage.join(folder, run, "config.json"))
    model = config["plan"]["config"]
    return {
        "target_param_data_ratio": config["plan"]["target_param_data_ratio"],
        "head_dim": config["plan"]["head_dim"],
        "total_batch_size": config["total_batch_size"],
        **{key: model[key] for key in ("sequence_len", "vocab_size", "window_pattern")},
    }


def _law(law: fits.PowerLaw, x: str) -> str:
    error = "" if math.isnan(law.relative_error) else f" (points scatter by {law.relative_error:.2%})"
    return f"{law.coefficient} · {x}^{law.exponent}{error}"


def _series_figure(rows: list[dict], key: str, law: fits.PowerLaw, values: list[float]) -> Markup:
    """Results by depth with their law. CORE's law is one of 1 - CORE."""
    figure, axes = empty_figure(5.6, 3.6)
    flops = np.array([row["flops"] for row in rows])
    beyond = 1 if law.floor is None and key == "val_bpb" else 3  # don't extrapolate a law without a floor
    x = np.geomspace(flops.min() / min(beyond, 1.5), flops.max() * beyond, 60)
    y, (low, high) = law(x), law.band(x)
    if key == "core_metric":
        y, low, high = 1 - y, 1 - high, 1 - low
    axes.set_xscale("log")
    axes.plot(x, y, color=SERIES[0], linewidth=1.7)
    margin = 0.5 * (max(values) - min(values)) or 0.1
    top, bottom = max(values) + margin, min(values) - margin
    if np.isfinite(low).all():
        axes.fill_between(x, low.clip(bottom, top), high.clip(bottom, top), color=SERIES[0], alpha=0.15, linewidth=0)
    axes.plot(flops, values, "o", color=SERIES[0], markersize=5)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"d{row['depth']}", (row["flops"], value), (5, 5), textcoords="offset points", color=INK, fontsize=9
        )
    axes.set_ylim(bottom, top)
    style(axes, "training FLOPs; band: 95 % interval of the law")
    return svg(figure, f"{key} against FLOPs")


# Scaling laws


def scaling_laws(rows: list[dict], about: dict, folder: str) -> Findings:
    found = Findings("Scaling laws")
    for row in rows:  # the requested FLOPs; a whole number of steps gives a little more or less
        row["budget"] = _budget(row["flops"], about["budgets"])
    fitted = {name: iso_flop(rows, name) for name in COUNTED}
    lawful = {name: fit for name, fit in fitted.items() if fit.size}
    for name, fit in fitted.items():
        found.sentences += [f"N = {name}: {sentence}" for sentence in _sentences(fit)]
    if not lawful:
        found.sentences.append("no law: it needs two budgets with a minimum inside their range of sizes")
    for name, fit in fitted.items():
        found.figures.append((f"Loss at equal FLOPs, N = {name}", _iso_figure(rows, name, fit)))
    if name := next(iter(lawful), None):
        for key, label in (("size", "optimal N"), ("tokens", "optimal D, tokens"), ("ratio", "optimal D / N")):
            found.figures.append((f"{label}, N = {name}", _optimum_figure(lawful[name], key, label)))
    return found


def _budget(flops: float, budgets: list[float]) -> float:
    return min(budgets, key=lambda budget: abs(math.log(budget / flops)))


def iso_flop(rows: list[dict], counted: str) -> fits.IsoFlop:
    return fits.isoflop(
        [row["budget"] for row in rows],
        [size(row, counted) for row in rows],
        [row["tokens_trained"] for row in rows],
        [row["val_bpb"] for row in rows],
    )


def size(row: dict, counted: str) -> float:
    return sum(row[key] for key in COUNTED[counted])


def _sentences(fit: fits.IsoFlop) -> list[str]:
    lines = []
    for best in fit.optima:
        if best.note:
            lines.append(f"the budget of {best.flops:.3g} FLOPs is not used, {best.note}")
            continue
        lines.append(
            f"at {best.flops:.3g} FLOPs the optimum is N {best.size}, D {best.tokens}, D/N {best.ratio}, "
            f"val_bpb {best.loss:.4f}"
        )
        if not all(best.fitted):
            left_out = best.fitted.count(False)
            lines[-1] += f"; {left_out} points (hollow) are left out, more than a factor {fits.FIT_RANGE} away"
        if best.near_edge:
            lines[-1] += "; it is near the smallest or largest size, so the estimate is biased: train more depths"
    if fit.size and fit.tokens and fit.ratio:
        lines.append(
            f"optimal N = {_law(fit.size, 'FLOPs')}, D = {_law(fit.tokens, 'FLOPs')}, D/N = {_law(fit.ratio, 'FLOPs')}"
        )
        if math.isfinite(fit.size.exponent.width) and fit.size.exponent.width > WIDE_INTERVAL:
            lines[-1] += "; the intervals are too wide to tell whether N or D should grow faster"
    return lines


def _iso_figure(rows: list[dict], counted: str, fit: fits.IsoFlop) -> Markup:
    """A parabola per budget. Filled points were fitted, hollow ones lie outside, and a cross marks the optimum."""
    figure, axes = empty_figure(5.6, 3.8)
    axes.set_xscale("log")
    for i, best in enumerate(fit.optima):
        color = SERIES[i % len(SERIES)]
        points = sorted((size(row, counted), row["val_bpb"]) for row in rows if row["budget"] == best.flops)
        for inside in (True, False):
            chosen = [p for p, fitted in zip(points, best.fitted, strict=True) if fitted == inside]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), "o", color=color, markersize=5, mfc=color if inside else "none")
        inner = [p[0] for p, fitted in zip(points, best.fitted, strict=True) if fitted]
        if best.curve:
            x = np.geomspace(min(inner), max(inner), 60)
            axes.plot(x, np.polyval(best.curve, np.log(x)), color=color, linewidth=1.5)
        if not best.note:
            axes.plot([best.size.value], [best.loss], "x", color=color, markersize=9, markeredgewidth=2)
        text = f"{best.flops:.3g}" + (" (not used)" if best.note else "")
        axes.annotate(text, points[-1], (6, 0), textcoords="offset points", color=color, fontsize=9)
    axes.margins(x=0.18)
    style(axes, "parameters N, by FLOPs; filled: fitted, cross: optimum")
    return svg(figure, f"iso-FLOP curves, {counted}")


def _optimum_figure(fit: fits.IsoFlop, key: str, label: str) -> Markup:
    figure, axes = empty_figure(4.2, 2.9, left=0.17)
    law, used = getattr(fit, key), [best for best in fit.optima if not best.note]
    axes.set_xscale("log")
    axes.set_yscale("log")
    flops = np.array([best.flops for best in used])
    inside, beyond = np.geomspace(flops.min(), flops.max(), 30), np.geomspace(flops.max(), flops.max() * 10, 30)
    axes.plot(inside, law(inside), color=SERIES[0], linewidth=1.7)
    axes.plot(beyond, law(beyond), color=SERIES[0], linewidth=1.7, linestyle=(0, (4, 2)))
    x = np.concatenate([inside, beyond])
    low, high = law.band(x)
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, color=SERIES[0], alpha=0.15, linewidth=0)
    axes.plot(flops, [getattr(best, key).value for best in used], "o", color=SERIES[0], markersize=5)
    for best in used:
        value = getattr(best, key)
        if math.isfinite(value.high):
            axes.plot([best.flops] * 2, [value.low, value.high], color=SERIES[0], linewidth=1.2)
    style(axes, "training FLOPs; dashed: beyond the budgets")
    return svg(figure, f"{label} against FLOPs")


# Comparisons and searches


def compare(rows: list[dict], about: dict, folder: str) -> Findings:
    found = Findings(f"{about['candidate']} against {about['baseline']}", paired.verdicts(rows))
    decides = paired.decisive(rows)
    finished = [row for row in rows if paired.is_measured(row, decides)]
    figure, axes = empty_figure(5.6, 3.6)
    for i, side in enumerate(("baseline", "candidate")):
        points = [(row["depth"] + (i - 0.5) * 0.12, row[decides]) for row in finished if row["side"] == side]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=SERIES[i], markersize=5, alpha=0.8)
    style(axes, "depth")
    axes.set_xticks(sorted({row["depth"] for row in finished}))
    found.figures.append(
        (f"{decides} of every seed: the baseline left, the candidate right", svg(figure, f"{decides} by side"))
    )
    return found


def research(rows: list[dict], about: dict, folder: str) -> Findings:
    """A campaign: what became of each candidate, and the tree of what was tried."""
    candidates = ledger.Ledger(folder).all()
    count = Counter(c.status for c in candidates)
    hours = sum(c.seconds for c in candidates) / 3600
    statuses = ", ".join(f"{n} {status}" for status, n in count.items())
    found = Findings(f"Research from {about['baseline']}")
    found.sentences.append(f"{len(candidates)} candidates: {statuses}; their runs took {hours:.2f} h")
    found.sentences += [f"{c.name}: {c.status}, {c.said} (level {c.level:.2%}, {c.seconds:,.0f} s)" for c in candidates]
    ablation = storage.join(folder, "ablation.json")
    for name, said in (storage.read_json(ablation) if storage.exists(ablation) else {}).items():
        found.sentences.append(f"without {name}: {said}")

    def branch(parent: str | None, indent: str) -> list[str]:
        lines = []
        for c in (c for c in candidates if c.parent == parent and c.status != "proposed"):
            lines += [
                f"{indent}{c.name}: {c.status}",
                *(branch(c.name, indent + "    ") if c.status == "accepted" else []),
            ]
        return lines

    tree = escape("\n".join([about["baseline"], *branch(None, "    ")]))
    found.figures.append(("What was tried, below what it started from", Markup("<pre>{}</pre>").format(tree)))
    return found


def tune_lr(rows: list[dict], about: dict, folder: str) -> Findings:
    found = Findings("Search of learning rates", list(about.get("findings", [])))
    figure, axes = empty_figure(5.6, 3.6)
    axes.set_xscale("log")
    searched = [row for row in rows if row["depth"] == about["depth"] and row.get("side") is None]
    axes.plot(
        [row["matrix_lr"] for row in searched], [row["val_bpb"] for row in searched], "o", color=SERIES[0], markersize=5
    )
    style(axes, "matrix_lr")
    found.figures.append(
        ("Bits per byte against the base rate of the matrices, finished trials", svg(figure, "bpb by rate"))
    )
    return found


# Mixtures


def mixtures(rows: list[dict], about: dict, folder: str) -> Findings:
    found = Findings("Mixtures")
    names, target = about["sources"], np.array(list(about["target"].values()))
    for row in rows:
        row["target_bpb"] = round(float(mixing_laws.measured([row], names)[1][0] @ target), 4)
    goal = " + ".join(f"{weight:.2g}·{name}" for name, weight in about["target"].items() if weight)
    found.sentences.append(f"target_bpb is {goal}, in bits per byte; intervals are 95 %")
    fitted, points = {}, {}
    for depth in sorted({row["depth"] for row in rows}):
        of_depth = [row for row in rows if row["depth"] == depth]
        points[depth] = {row["mixture"]: row for row in of_depth if not row["mixture"].startswith("best-")}
        try:
            fitted[depth] = mixing_laws.fit(*mixing_laws.measured(list(points[depth].values()), names), target)
        except ValueError as error:
            found.sentences.append(f"depth {depth}: {error}")
            continue
        found.sentences += _best_mixture(depth, fitted[depth], names, points[depth], of_depth)
    for smaller, larger in zip(fitted, list(fitted)[1:], strict=False):
        found.sentences += _transfer(smaller, larger, fitted, points)
    if fitted:
        found.figures.append(
            ("The best share of each source, by depth, with its interval", _shares_figure(fitted, names))
        )
        caption = "Bits per byte of the target: measured, against those of the law"
        found.figures.append((caption, _law_figure(fitted, points, names)))
    return found


def _best_mixture(
    depth: int, fit: mixing_laws.Fit, names: list[str], points: dict[str, dict], rows: list[dict]
) -> list[str]:
    """The best mixture of a depth, its gain, and the results of the runs that checked it."""
    shares = ", ".join(
        f"{name} {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
        for name, share in zip(names, fit.shares, strict=True)
    )
    lines = [
        f"depth {depth}: the best mixture is {shares}: target_bpb {fit.loss(fit.best)} by the law "
        f"(points scatter by {fit.relative_error:.2%})"
    ]
    for label, words in (("equal", "the equal mixture"), ("size", "the mixture by size")):
        if label in points:
            shares_there, _ = mixing_laws.measured([points[label]], names)
            lines.append(f"depth {depth}: the best mixture {_gain(fit.gain(fit.best, shares_there[0]), words)}")
    lowest = min(points.values(), key=lambda row: row["target_bpb"])
    measured = f"the lowest of the {len(points)} mixtures, {lowest['mixture']}, has {lowest['target_bpb']:.4f}"
    for row in rows:
        if row["mixture"] not in points:
            shares_there, _ = mixing_laws.measured([row], names)
            measured += (
                f"; a run with the smallest depth's best mixture has {row['target_bpb']:.4f}, "
                f"and the law predicts {fit.loss(shares_there[0])}"
            )
    return [*lines, f"depth {depth}, measured: {measured}"]


def _gain(gain: fits.Estimate, than: str) -> str:
    where = "below" if gain.value >= 0 else "above"
    interval = f"[{-gain.high:+.2%}, {-gain.low:+.2%}]"
    if gain.low > 0 or gain.high < 0:
        return f"is {abs(gain.value):.2%} {where} {than} {interval}"
    return f"is not distinguishable from {than}: {abs(gain.value):.2%} {where} it {interval}"


def _transfer(
    smaller: int, larger: int, fitted: dict[int, mixing_laws.Fit], points: dict[int, dict[str, dict]]
) -> list[str]:
    """Whether the order of the mixtures and the best mixture are the same at the next depth."""
    both = [label for label in points[smaller] if label in points[larger]]
    same, pairs, p = mixing_laws.same_order(
        *([points[depth][label]["target_bpb"] for label in both] for depth in (smaller, larger))
    )
    small, large = fitted[smaller], fitted[larger]
    equal = np.full(len(small.best), 1 / len(small.best))
    lost = large.gain(large.best, small.best)
    holds = "holds" if large.gain(small.best, equal).low > 0 else "is not shown to hold"
    return [
        f"depths {smaller} and {larger} order {same} of {pairs} pairs of mixtures the same way (Kendall's p {p:.2g})",
        f"the best mixture of depth {smaller} {holds} at depth {larger}: by the law of that depth it "
        f"{_gain(large.gain(small.best, equal), 'the equal mixture')}, and is {lost.value:.2%} above the best",
    ]


def _shares_figure(fitted: dict[int, mixing_laws.Fit], names: list[str]) -> Markup:
    figure, axes = empty_figure(5.6, 3.4)
    for i, (depth, fit) in enumerate(fitted.items()):
        x = np.arange(len(names)) + (i - (len(fitted) - 1) / 2) * 0.15
        for at, share in zip(x, fit.shares, strict=True):
            axes.plot([at, at], [share.low, share.high], color=SERIES[i % len(SERIES)], linewidth=1.5)
        axes.plot(x, fit.best, "o", color=SERIES[i % len(SERIES)], markersize=5)
        axes.annotate(f"d{depth}", (x[-1], fit.best[-1]), (5, 5), textcoords="offset points", color=INK, fontsize=9)
    axes.margins(x=0.1)
    style(axes, "share of the training rows, by source")
    axes.set_xticks(range(len(names)), names)
    return svg(figure, "best shares by source")


def _law_figure(fitted: dict[int, mixing_laws.Fit], points: dict[int, dict[str, dict]], names: list[str]) -> Markup:
    figure, axes = empty_figure(5.6, 3.6)
    for i, (depth, fit) in enumerate(fitted.items()):
        shares, _ = mixing_laws.measured(list(points[depth].values()), names)
        x, y = [fit.loss(r).value for r in shares], [row["target_bpb"] for row in points[depth].values()]
        axes.plot([min(x), max(x)], [min(x), max(x)], color=GRID, linewidth=1.2)
        axes.plot(x, y, "o", color=SERIES[i % len(SERIES)], markersize=5)
        axes.annotate(f"d{depth}", (max(x), max(y)), (-18, 0), textcoords="offset points", color=INK, fontsize=9)
    style(axes, "by the law")
    return svg(figure, "measured against the law")


KINDS = {
    "miniseries": miniseries,
    "scaling_laws": scaling_laws,
    "compare": compare,
    "research": research,
    "tune_lr": tune_lr,
    "mixtures": mixtures,
}
