"""Finds the best mixture of sources from runs with different shares, by a law of each source's loss.

The law is that of Ye et al. (arXiv:2403.16952): a model trained with shares r has c_i + k_i·exp(Σ_j t_ij·r_j) bits per
byte on source i. Shares sum to 1, so k_i can be absorbed into t_ij, and the law of a source has K + 1 parameters for K
sources. A weighted sum of these laws is convex, so it has one minimum. Alternatives: a quadratic in the log shares has
about K²/2 parameters and may have no minimum, and RegMix's trees (arXiv:2407.01492) need hundreds of runs. The law
can't describe a loss that rises again when a small source is read too often.

Pure functions of numbers, like fits.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from experiments.fits import LEVEL, Estimate

MIN_SHARE = 0.15  # times the equal share: least share of a source; below it, losses are steeper than the law
CANDIDATES = 2000  # random mixtures from which a design is chosen
FLOORS = np.linspace(0, 0.98, 50)  # values of c_i to try, as shares of the lowest loss
BOOTSTRAPS = 300  # resamples


def design(count: int, sizes, seed: int) -> np.ndarray:
    """Shares (count, K): equal shares, shares by size, then repeatedly the mixture farthest from those chosen so far.

    The first mixtures don't depend on count. sizes: (K,), in any unit."""
    sizes = np.asarray(sizes, dtype=float)
    equal, least = np.full(len(sizes), 1 / len(sizes)), MIN_SHARE / len(sizes)
    by_size = np.maximum(sizes / sizes.sum(), least)
    chosen = [equal, by_size / by_size.sum()]
    draws = np.random.default_rng(seed).dirichlet(np.ones(len(sizes)), CANDIDATES)
    draws = least + (1 - MIN_SHARE) * draws
    while len(chosen) < count:
        distances = np.linalg.norm(draws[:, None] - np.array(chosen), axis=2).min(axis=1)
        chosen.append(draws[distances.argmax()])
    return np.array(chosen[:count])


def measured(rows: list[dict], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(shares, bits per byte) of each source, from lines of results.csv; each (n, K)."""
    shares, losses = ([[row[f"{key}/{name}"] for name in names] for row in rows] for key in ("share", "val_bpb"))
    return np.array(shares), np.array(losses)


@dataclass(frozen=True)
class Laws:
    """The laws of K sources; with a leading dimension, those of S resamples."""

    floors: np.ndarray  # (…, K): c_i
    slopes: np.ndarray  # (…, K, K): t_ij, source i by the share of j

    def __call__(self, shares: np.ndarray) -> np.ndarray:
        """Bits per byte of each source, (…, K), for the shares (K,) of one mixture."""
        return self.floors + np.exp(self.slopes @ shares)


@dataclass(frozen=True)
class Fit:
    """The laws of one depth, and the best shares for a target."""

    laws: Laws
    draws: Laws  # of the bootstrap
    target: np.ndarray  # weights (K,) of the sources' losses
    best: np.ndarray  # shares (K,)
    shares: list[Estimate]  # best, with intervals
    relative_error: float  # standard deviation of the target's loss around the laws, as a share of it

    def loss(self, shares: np.ndarray) -> Estimate:
        """The target's bits per byte."""
        return _estimate(float(self.laws(shares) @ self.target), self.draws(shares) @ self.target)

    def gain(self, shares: np.ndarray, over: np.ndarray) -> Estimate:
        """How much lower the target's loss is with `shares` than with `over`, as a share of the latter."""
        return _estimate(
            *(1 - (laws(shares) @ self.target) / (laws(over) @ self.target) for laws in (self.laws, self.draws))
        )


def fit(shares, losses, target, seed: int = 0) -> Fit:
    """Fit the laws. shares, losses: (n, K), shares and bits per byte of each source. target: (K,), sums to 1.

    Intervals are by bootstrap: the residuals of whole runs are resampled, and everything is fitted again.
    Raises ValueError for fewer than K + 2 runs."""
    shares, losses, target = (np.asarray(values, dtype=float) for values in (shares, losses, target))
    count, sources = shares.shape
    freedom = count - sources - 1
    if freedom < 1:
        raise ValueError(f"{count} mixtures of {sources} sources are too few: a law needs at least {sources + 2}")
    laws = _fit_laws(shares, losses)
    fitted = np.array([laws(r) for r in shares])
    residuals = losses - fitted
    error = math.sqrt((((residuals @ target) / (losses @ target)) ** 2).sum() / freedom)
    # Scale up: least squares make residuals smaller than the noise. Student's t corrects for few runs.
    upper = (1 + LEVEL) / 2
    residuals = residuals * math.sqrt(count / freedom) * stats.t.ppf(upper, freedom) / stats.norm.ppf(upper)
    drawn = np.random.default_rng(seed).integers(count, size=(BOOTSTRAPS, count))
    draws = _fit_laws(shares, fitted + residuals[drawn])
    best = minimum(laws, target)
    scattered = np.array([minimum(Laws(*law), target) for law in zip(draws.floors, draws.slopes, strict=True)])
    estimates = [_estimate(value, around) for value, around in zip(best, scattered.T, strict=True)]
    return Fit(laws, draws, target, best, estimates, error)


def _fit_laws(shares: np.ndarray, losses: np.ndarray) -> Laws:
    """Least squares for each source of losses (…, n, K). For a given floor, the law is linear in the logarithm."""
    losses = np.swapaxes(losses, -1, -2)  # (…, K, n)
    error = np.full(losses.shape[:-1], np.inf)
    floors, slopes = np.zeros(error.shape), np.zeros((*error.shape, shares.shape[1]))
    for ratio in FLOORS:
        floor = ratio * losses.min(axis=-1)
        above = losses - floor[..., None]
        weighted = shares * above[..., None]  # weights make a residual of the logarithm count as one of the loss
        transposed = np.swapaxes(weighted, -1, -2)
        slope = np.linalg.solve(transposed @ weighted, transposed @ (above * np.log(above))[..., None])[..., 0]
        squares = ((floor[..., None] + np.exp(slope @ shares.T) - losses) ** 2).sum(axis=-1)
        better = squares < error
        error, floors = np.where(better, squares, error), np.where(better, floor, floors)
        slopes = np.where(better[..., None], slope, slopes)
    return Laws(floors, slopes)


def minimum(laws: Laws, target: np.ndarray) -> np.ndarray:
    """The shares (K,) with the lowest loss, none below the least share of a design."""
    sources = len(target)
    return optimize.minimize(
        lambda r: laws(r) @ target,
        np.full(sources, 1 / sources),
        jac=lambda r: (target * np.exp(laws.slopes @ r)) @ laws.slopes,
        bounds=[(MIN_SHARE / sources, 1)] * sources,
        constraints={"type": "eq", "fun": lambda r: r.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
    ).x


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def same_order(losses, others) -> tuple[int, int, float]:
    """(pairs of mixtures that both depths order the same way, all pairs, p-value of Kendall's test)."""
    first, second = (np.sign(np.subtract.outer(values, values)) for values in (losses, others))
    pairs = np.triu_indices(len(first), 1)
    return int((first == second)[pairs].sum()), len(pairs[0]), float(stats.kendalltau(losses, others).pvalue)
