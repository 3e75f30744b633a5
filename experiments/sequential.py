"""When to stop a comparison that is looked at several times: group-sequential tests with O'Brien-Fleming spending.

A test that is looked at after every few seeds finds what is not there more often than its level says. Here each look
spends a part of the level, very little at the first (O'Brien & Fleming 1979; the spending function of Lan & DeMets,
"Discrete sequential boundaries for clinical trials", Biometrika 70, 1983). The bounds of the normal test become
levels of the paired t-test, as in Jennison & Turnbull, "Group Sequential Methods", 2000, chapter 11.
"""

import math
from functools import cache

import numpy as np
from scipy import optimize, stats

from experiments import paired

WORSE = 0.05  # probability at one depth that a candidate that is no worse than the baseline is stopped as worse
GRID = np.linspace(-9, 9, 1001)  # standard deviations


@cache
def levels(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """One-sided levels for the p-values of looks after so many seeds, which together reject a true hypothesis with
    probability alpha.

    The crossing probabilities are of a Brownian motion at information n / looks[-1], integrated from look to look
    (Armitage, McPherson & Rowe 1969).
    """
    times = np.array(looks) / looks[-1]
    spent = 2 * stats.norm.sf(stats.norm.isf(alpha / 2) / np.sqrt(times))
    values, density, found = np.zeros(1), np.ones(1), []  # density: of paths that no bound has stopped, times the step
    for k, time in enumerate(times):
        step = math.sqrt(time - (times[k - 1] if k else 0))
        spend = spent[k] - (spent[k - 1] if k else 0)

        def excess(bound: float, values=values, density=density, step=step, spend=spend) -> float:
            return float(density @ stats.norm.sf((bound - values) / step)) - spend

        bound = optimize.brentq(excess, -9, 40)
        found.append(float(stats.norm.sf(bound / math.sqrt(time))))
        grid = GRID[GRID < bound]
        arrivals = stats.norm.pdf((grid[:, None] - values) / step) / step
        values, density = grid, arrivals @ density * (GRID[1] - GRID[0])
    return tuple(found)


def decide(changes: list[float], looks: tuple[int, ...], alpha: float) -> str:
    """better, worse, not distinguishable, or "more" when the next look needs more seeds.

    changes: candidate minus baseline by seed in the order of the seeds; less is better. A candidate that is not better
    is called better with probability alpha at most, one that is not worse is called worse with probability WORSE.
    """
    better, worse = levels(looks, alpha), levels(looks, WORSE)
    for n, accept, reject in zip(looks, better, worse, strict=True):
        if len(changes) < n:
            return "more"
        seen = changes[:n]
        p = paired.p_value(seen) / 2  # of the side on which the mean lies
        if np.mean(seen) < 0 and p < accept:
            return "better"
        if np.mean(seen) > 0 and p < reject:
            return "worse"
    return "not distinguishable"
