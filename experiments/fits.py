"""Laws fitted to results, with 95 % intervals: power laws, and the optimum of each budget of an iso-FLOP grid.

Pure functions of numbers. Every fit is in logarithms, where the noise of a loss is about the same at every size.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
FIT_RANGE = 8  # a parabola is fitted to the points within this factor of the lowest one's size, it bends away beyond
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, which is infinite when the data leave no freedom to tell."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.value:.4g} (no interval: too few points)"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + coefficient·x^exponent. `relative_error` is the standard deviation of y about it, as a share of y."""

    coefficient: Estimate
    exponent: Estimate
    floor: Estimate | None
    relative_error: float
    x_range: tuple[float, float]  # it was fitted over
    _samples: np.ndarray  # (S, 3) of log coefficient, exponent, floor, as likely as the data say

    def __call__(self, x):
        floor = self.floor.value if self.floor else 0.0
        return floor + self.coefficient.value * np.asarray(x, dtype=float) ** self.exponent.value

    def band(self, x) -> tuple[np.ndarray, np.ndarray]:
        """The 95 % interval of the law at each x (not of a new measurement)."""
        x = np.asarray(x, dtype=float)
        if not np.isfinite(self._samples).all():
            return np.full(x.shape, np.nan), np.full(x.shape, np.nan)
        log_a, b, floor = (column[:, None] for column in self._samples.T)
        low, high = np.quantile(floor + np.exp(log_a + b * np.log(x.reshape(1, -1))), _tails(), axis=0)
        return low.reshape(x.shape), high.reshape(x.shape)

    def solve(self, y: float) -> Estimate:
        """The x at which the law reaches y; NaN where it never does."""
        floor = self.floor.value if self.floor else 0.0
        if y <= floor or self.exponent.value == 0:
            return Estimate(math.nan, math.nan, math.nan)
        value = math.exp(math.log((y - floor) / self.coefficient.value) / self.exponent.value)
        if not np.isfinite(self._samples).all():
            return Estimate(value, 0.0, math.inf)
        log_a, b, floors = self._samples.T
        with np.errstate(all="ignore"):
            xs = np.exp((np.log(y - floors) - log_a) / b)
        xs = np.where(np.isnan(xs), np.inf, xs)  # a law that never gets there
        return Estimate(value, *np.quantile(xs, _tails(), method="nearest"))


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def power_law(x, y, with_floor: bool = False, seed: int = 0) -> PowerLaw:
    """Fit by least squares of log y. x, y: positive. Intervals are Student's t of the linearized fit.

    Raises ValueError for fewer points than parameters, or numbers that are not positive.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    parameters = 3 if with_floor else 2
    if len(x) < parameters:
        raise ValueError(f"{len(x)} points for {parameters} parameters: measure more")
    if not ((x > 0).all() and (y > 0).all()):
        raise ValueError("a power law needs positive numbers")
    center = np.log(x).mean()  # of log x: the coefficient and the exponent are then nearly independent
    u = np.log(x) - center
    slope, height = np.polyfit(u, np.log(y), 1)
    best = np.array([height, slope, 0.0])
    if with_floor:
        best = _fit_with_floor(u, y, best)
    residuals = np.log(y) - np.log(best[2] + np.exp(best[0] + best[1] * u))
    share = np.exp(best[0] + best[1] * u) / (best[2] + np.exp(best[0] + best[1] * u))
    jacobian = np.stack([share, share * u, (1 - share) / max(best[2], 1e-300)][:parameters], axis=1)
    freedom = len(x) - parameters
    sigma = math.sqrt((residuals**2).sum() / freedom) if freedom else math.inf
    samples = np.full((1, 3), np.nan)
    errors = np.full(parameters, np.inf)
    if freedom and np.linalg.matrix_rank(jacobian) == parameters:
        covariance = sigma**2 * np.linalg.inv(jacobian.T @ jacobian)
        to_uncentered = np.eye(parameters)
        to_uncentered[0, 1] = -center
        t = stats.t.ppf(_tails()[1], freedom)
        errors = t * np.sqrt(np.diag(to_uncentered @ covariance @ to_uncentered.T))
        draws = np.random.default_rng(seed).multivariate_normal(np.zeros(parameters), covariance, 4000)
        draws *= t / stats.norm.ppf(_tails()[1])
        samples = np.zeros((4000, 3))
        samples[:, :parameters] = best[:parameters] + draws
        samples[:, 0] -= samples[:, 1] * center
    log_a = best[0] - best[1] * center
    return PowerLaw(
        coefficient=Estimate(math.exp(log_a), _exp(log_a - errors[0]), _exp(log_a + errors[0])),
        exponent=Estimate(best[1], best[1] - errors[1], best[1] + errors[1]),
        floor=Estimate(best[2], best[2] - errors[2], best[2] + errors[2]) if with_floor else None,
        relative_error=sigma if freedom else math.nan,
        x_range=(x.min(), x.max()),
        _samples=samples,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _fit_with_floor(u: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(log coefficient at u = 0, exponent, floor), the best of several starts."""

    def residuals(p):
        return np.log(p[2] + np.exp(p[0] + p[1] * u)) - np.log(y)

    bounds = ([-np.inf, -np.inf, 0], [np.inf, np.inf, y.min()])
    fits = []
    for share in (0.05, 0.3, 0.6, 0.9):
        floor = share * y.min()
        slope, height = np.polyfit(u, np.log(y - floor), 1)
        fits.append(optimize.least_squares(residuals, [height, slope, floor], bounds=bounds, x_scale=[1, 0.1, 0.1]))
    return min(fits, key=lambda fit: fit.cost).x


# Iso-FLOP grids


@dataclass(frozen=True)
class Optimum:
    """The best size of one budget. `note` says why it is not used, if it is not."""

    flops: float
    size: Estimate
    tokens: Estimate
    ratio: Estimate
    loss: float
    curve: tuple[float, float, float] | None  # of log size, as np.polyval takes it
    fitted: list[bool]  # which of the budget's points the parabola was fitted to
    note: str = ""


@dataclass(frozen=True)
class IsoFlop:
    """Optima by budget, and against compute the optimal size, tokens and ratio; None with fewer than two optima."""

    optima: list[Optimum]
    size: PowerLaw | None
    tokens: PowerLaw | None
    ratio: PowerLaw | None


def parabola(sizes, losses) -> tuple[np.ndarray | None, np.ndarray, str]:
    """(coefficients in log size, which points it was fitted to, why there is no optimum or "").

    Raises nothing: a budget without an optimum is a result, too.
    """
    log_n, losses = np.log(np.asarray(sizes, dtype=float)), np.asarray(losses, dtype=float)
    near = np.abs(log_n - log_n[losses.argmin()]) <= math.log(FIT_RANGE)
    if near.sum() < 3:
        return None, near, f"{near.sum()} points within a factor {FIT_RANGE} of the lowest: a parabola takes 3"
    curve = np.polyfit(log_n[near], losses[near], 2)
    lowest = losses.argmin()
    if lowest in (log_n.argmin(), log_n.argmax()):
        where = "smallest" if lowest == log_n.argmin() else "largest"
        return curve, near, f"the lowest loss is at the {where} size: the minimum may lie beyond"
    if curve[0] <= 0 or not log_n[near].min() < vertex(curve) < log_n[near].max():
        return curve, near, "the parabola has no minimum within the points"
    return curve, near, ""


def vertex(curve) -> float:
    return -curve[1] / (2 * curve[0])


def isoflop(flops, sizes, tokens, losses, seed: int = 0) -> IsoFlop:
    """The optimum of each budget, by a parabola of loss in log size, and the laws that optima follow.

    flops, sizes, tokens, losses: one of each for every run; equal flops are one budget. Intervals are by bootstrap: the
    residuals of all parabolas are drawn again around them, and everything is fitted again.
    """
    flops, sizes, tokens, losses = (np.asarray(v, dtype=float) for v in (flops, sizes, tokens, losses))
    budgets = []
    for budget in np.unique(flops):
        order = np.flatnonzero(flops == budget)
        order = order[np.argsort(sizes[order])]
        fit = parabola(sizes[order], losses[order])
        budgets.append(_Budget(budget, np.log(sizes[order]), np.log(tokens[order]), losses[order], *fit))
    used = [b for b in budgets if not b.note]
    scattered = _bootstrap(used, seed)
    return IsoFlop([_optimum(b, used, scattered) for b in budgets], *_laws(used, scattered))


@dataclass(frozen=True)
class _Budget:
    flops: float
    log_n: np.ndarray
    log_d: np.ndarray
    losses: np.ndarray
    curve: np.ndarray | None
    near: np.ndarray
    note: str

    @property
    def optimum(self) -> tuple[float, float]:
        """(log size, log tokens), these between the budget's runs, as FLOPs per token are not just 6·size."""
        return vertex(self.curve), float(np.interp(vertex(self.curve), self.log_n, self.log_d))


def _optimum(b: _Budget, used: list[_Budget], scattered: np.ndarray | None) -> Optimum:
    curve = None if b.curve is None else tuple(map(float, b.curve))
    if b.note:
        nothing = Estimate(math.nan, math.nan, math.nan)
        return Optimum(b.flops, nothing, nothing, nothing, math.nan, curve, b.near.tolist(), b.note)
    draws = None if scattered is None else scattered[:, next(i for i, other in enumerate(used) if other is b)]
    size, tokens, ratio = (
        _estimate(np.dot(b.optimum, weights), None if draws is None else draws @ np.array(weights))
        for weights in ((1, 0), (0, 1), (-1, 1))
    )
    return Optimum(b.flops, size, tokens, ratio, float(np.polyval(b.curve, vertex(b.curve))), curve, b.near.tolist())


def _bootstrap(used: list[_Budget], seed: int) -> np.ndarray | None:
    """(S, budgets, 2) of log size and log tokens at the optimum; None when parabolas go through all their points."""
    freedom = sum(b.near.sum() - 3 for b in used)
    if not used or freedom < 1:
        return None
    pooled = np.concatenate([(b.losses - np.polyval(b.curve, b.log_n))[b.near] for b in used])
    # Least squares leave residuals smaller than the noise, and few of them a narrower spread than Student's t.
    pooled *= math.sqrt(len(pooled) / freedom) * stats.t.ppf(_tails()[1], freedom) / stats.norm.ppf(_tails()[1])
    random, draws = np.random.default_rng(seed), np.empty((BOOTSTRAPS, len(used), 2))
    for j, b in enumerate(used):
        log_n = b.log_n[b.near]
        losses = np.polyval(b.curve, log_n) + random.choice(pooled, (BOOTSTRAPS, len(log_n)))
        curves = np.polyfit(log_n, losses.T, 2)
        with np.errstate(all="ignore"):
            optimum = -curves[1] / (2 * curves[0])
        lower_end = log_n[0] if np.polyval(b.curve, log_n[0]) < np.polyval(b.curve, log_n[-1]) else log_n[-1]
        optimum = np.where(curves[0] > 0, optimum, lower_end).clip(log_n[0], log_n[-1])
        draws[:, j] = np.stack([optimum, np.interp(optimum, b.log_n, b.log_d)], axis=1)
    return draws


def _estimate(log_value: float, draws: np.ndarray | None) -> Estimate:
    if draws is None:
        return Estimate(math.exp(log_value), 0.0, math.inf)
    low, high = np.quantile(draws, _tails())
    return Estimate(*np.exp([log_value, min(low, log_value), max(high, log_value)]).tolist())


def _laws(
    used: list[_Budget], scattered: np.ndarray | None
) -> tuple[PowerLaw | None, PowerLaw | None, PowerLaw | None]:
    if len(used) < 2:
        return None, None, None
    log_c, optima = np.log([b.flops for b in used]), np.array([b.optimum for b in used])
    return tuple(
        _law(log_c, optima @ np.array(weights), None if scattered is None else scattered @ np.array(weights))
        for weights in ((1, 0), (0, 1), (-1, 1))
    )


def _law(log_x: np.ndarray, log_y: np.ndarray, drawn: np.ndarray | None) -> PowerLaw:
    """A power law through optima, with the intervals of the bootstrap's laws."""
    slope, height = np.polyfit(log_x, log_y, 1)
    residuals = log_y - np.polyval([slope, height], log_x)
    freedom = len(log_x) - 2
    samples = np.full((1, 3), np.nan)
    exponent, log_a = Estimate(slope, -math.inf, math.inf), (0.0, math.inf)
    if drawn is not None:
        slopes, heights = np.polyfit(log_x, drawn.T, 1)
        samples = np.stack([heights, slopes, np.zeros_like(slopes)], axis=1)
        low, high = np.quantile(slopes, _tails())
        exponent = Estimate(slope, min(low, slope), max(high, slope))
        log_a = [_exp(height) for height in np.quantile(heights, _tails())]
    return PowerLaw(
        coefficient=Estimate(_exp(height), *log_a),
        exponent=exponent,
        floor=None,
        relative_error=math.sqrt((residuals**2).sum() / freedom) if freedom else math.nan,
        x_range=(math.exp(log_x.min()), math.exp(log_x.max())),
        _samples=samples,
    )
