"""The best mixture of sources, from runs with different shares of them: a law of each source's loss, and its minimum.

The form is that of data mixing laws (Ye et al., arXiv:2403.16952): trained with shares r, a model has
c_i + k_i·exp(Σ_j t_ij·r_j) bits per byte on source i. Shares sum to 1, so k_i is absorbed in t_ij, and K sources take
K + 1 numbers each. A quadratic in the log shares takes about K²/2 and may have no minimum; RegMix's trees
(arXiv:2407.01492) take hundreds of runs. A sum of these laws is convex: it has one minimum. What the form can't show is
a loss that turns up again when a small source is read too often.

Pure functions of numbers, as fits.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from experiments.fits import LEVEL, Estimate

LEAST = 0.15  # least share of a source in a design, in equal shares: below it losses are steeper than the form
CANDIDATES = 2000  # mixtures that a design is chosen from
FLOORS = np.linspace(0, 0.98, 50)  # of the lowest loss: values of c_i that are tried
BOOTSTRAPS = 300


def design(count: int, sizes, seed: int) -> np.ndarray:
    """(count, K) shares: the equal mixture, that by size, then always the mixture furthest from those before it.

    The first mixtures stay the same when count grows. sizes: of each source, in any unit."""
    sizes = np.asarray(sizes, dtype=float)
    equal, least = np.full(len(sizes), 1 / len(sizes)), LEAST / len(sizes)
    by_size = np.maximum(sizes / sizes.sum(), least)
    chosen = [equal, by_size / by_size.sum()]
    draws = np.random.default_rng(seed).dirichlet(np.ones(len(sizes)), CANDIDATES)
    draws = least + (1 - LEAST) * draws
    while len(chosen) < count:
        distances = np.linalg.norm(draws[:, None] - np.array(chosen), axis=2).min(axis=1)
        chosen.append(draws[distances.argmax()])
    return np.array(chosen[:count])


def measured(rows: list[dict], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(shares, bits per byte of each source) of lines of results.csv, each (n, K)."""
    return tuple(np.array([[row[f"{key}/{name}"] for name in names] for row in rows]) for key in ("share", "val_bpb"))


@dataclass(frozen=True)
class Laws:
    """Of K sources, or of S draws of them: floors (…, K) and slopes (…, K, K), that of source i by the share of j."""

    floors: np.ndarray
    slopes: np.ndarray

    def __call__(self, shares: np.ndarray) -> np.ndarray:
        """Bits per byte of each source, (…, K), of one mixture (K,)."""
        return self.floors + np.exp(self.slopes @ shares)


@dataclass(frozen=True)
class Fit:
    """The laws of one depth, and the shares that are best for a target: weights (K,) of the sources' losses."""

    laws: Laws
    draws: Laws  # as likely as the data say
    target: np.ndarray
    best: np.ndarray  # shares (K,)
    shares: list[Estimate]  # the same, with intervals
    relative_error: float  # standard deviation of the target's loss about the laws, as a share of it

    def loss(self, shares: np.ndarray) -> Estimate:
        """The target's bits per byte."""
        return _estimate(self.laws(shares) @ self.target, self.draws(shares) @ self.target)

    def gain(self, shares: np.ndarray, over: np.ndarray) -> Estimate:
        """How much lower the target's loss is with some shares than with others, as a share of it."""
        return _estimate(
            *(1 - (laws(shares) @ self.target) / (laws(over) @ self.target) for laws in (self.laws, self.draws))
        )


def fit(shares, losses, target, seed: int = 0) -> Fit:
    """shares: (n, K) of the runs. losses: (n, K), bits per byte of each source. target: (K,) weights that sum to 1.

    Intervals are by bootstrap: the residuals of whole runs are drawn again around the laws, and all is fitted again.
    Raises ValueError for fewer than K + 2 runs."""
    shares, losses, target = (np.asarray(values, dtype=float) for values in (shares, losses, target))
    count, sources = shares.shape
    freedom = count - sources - 1
    if freedom < 1:
        raise ValueError(f"{count} mixtures of {sources} sources: a law takes at least {sources + 2}")
    laws = _fit_laws(shares, losses)
    fitted = np.array([laws(r) for r in shares])
    residuals = losses - fitted
    error = math.sqrt((((residuals @ target) / (losses @ target)) ** 2).sum() / freedom)
    # Least squares leave residuals smaller than the noise, and few of them a narrower spread than Student's t.
    upper = (1 + LEVEL) / 2
    residuals = residuals * math.sqrt(count / freedom) * stats.t.ppf(upper, freedom) / stats.norm.ppf(upper)
    drawn = np.random.default_rng(seed).integers(count, size=(BOOTSTRAPS, count))
    draws = _fit_laws(shares, fitted + residuals[drawn])
    best = minimum(laws, target)
    scattered = np.array([minimum(Laws(*law), target) for law in zip(draws.floors, draws.slopes, strict=True)])
    estimates = [_estimate(value, around) for value, around in zip(best, scattered.T, strict=True)]
    return Fit(laws, draws, target, best, estimates, error)


def _fit_laws(shares: np.ndarray, losses: np.ndarray) -> Laws:
    """Least squares for each source of losses (…, n, K): linear in the logarithm, for each of the floors."""
    losses = np.swapaxes(losses, -1, -2)  # (…, K, n)
    error = np.full(losses.shape[:-1], np.inf)
    floors, slopes = np.zeros(error.shape), np.zeros((*error.shape, shares.shape[1]))
    for ratio in FLOORS:
        floor = ratio * losses.min(axis=-1)
        above = losses - floor[..., None]
        weighted = shares * above[..., None]  # a residual of the logarithm counts as that of the loss
        transposed = np.swapaxes(weighted, -1, -2)
        slope = np.linalg.solve(transposed @ weighted, transposed @ (above * np.log(above))[..., None])[..., 0]
        squares = ((floor[..., None] + np.exp(slope @ shares.T) - losses) ** 2).sum(axis=-1)
        better = squares < error
        error, floors = np.where(better, squares, error), np.where(better, floor, floors)
        slopes = np.where(better[..., None], slope, slopes)
    return Laws(floors, slopes)


def minimum(laws: Laws, target: np.ndarray) -> np.ndarray:
    """The shares (K,) of the lowest loss, none below those of a design."""
    sources = len(target)
    return optimize.minimize(
        lambda r: laws(r) @ target,
        np.full(sources, 1 / sources),
        jac=lambda r: (target * np.exp(laws.slopes @ r)) @ laws.slopes,
        bounds=[(LEAST / sources, 1)] * sources,
        constraints={"type": "eq", "fun": lambda r: r.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
    ).x


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def same_order(losses, others) -> tuple[int, int, float]:
    """(pairs of mixtures that two depths put in the same order, all pairs, p of Kendall's test that there is none)."""
    first, second = (np.sign(np.subtract.outer(values, values)) for values in (losses, others))
    pairs = np.triu_indices(len(first), 1)
    return int((first == second)[pairs].sum()), len(pairs[0]), float(stats.kendalltau(losses, others).pvalue)
