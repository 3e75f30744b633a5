"""Fits laws to results, with 95 % intervals: power laws, and the optimum of each budget of an iso-FLOP grid.

Pure functions of numbers. All fits are in logarithms, where the noise of a loss is about the same at every size.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
FIT_RANGE = 8  # fit a parabola to sizes within this factor of the best; farther points don't follow it
BOOTSTRAPS = 1000  # resamples


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, which is infinite if there are too few data for one."""

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
    """y = floor + coefficient·x^exponent. relative_error: standard deviation of y around the law, as a share of y."""

    coefficient: Estimate
    exponent: Estimate
    floor: Estimate | None
    relative_error: float
    x_range: tuple[float, float]  # of the fitted points
    _laws: np.ndarray  # (S, 3): log coefficient, exponent, floor on the edge of the confidence set, or of resamples
    _tails: tuple[float, float]  # quantiles of these laws at the ends of an interval

    def __call__(self, x):
        floor = self.floor.value if self.floor else 0.0
        return floor + self.coefficient.value * np.asarray(x, dtype=float) ** self.exponent.value

    def band(self, x) -> tuple[np.ndarray, np.ndarray]:
        """The 95 % interval of the law at each x (not of a new measurement)."""
        x = np.asarray(x, dtype=float)
        if not np.isfinite(self._laws).all():
            return np.full(x.shape, np.nan), np.full(x.shape, np.nan)
        log_a, b, floor = (column[:, None] for column in self._laws.T)
        low, high = np.quantile(floor + np.exp(log_a + b * np.log(x.reshape(1, -1))), self._tails, axis=0)
        return low.reshape(x.shape), high.reshape(x.shape)

    def solve(self, y: float) -> Estimate:
        """The x at which the law reaches y; NaN if it never does."""
        floor = self.floor.value if self.floor else 0.0
        if y <= floor or self.exponent.value == 0:
            return Estimate(math.nan, math.nan, math.nan)
        value = _exp(math.log((y - floor) / self.coefficient.value) / self.exponent.value)
        if not np.isfinite(self._laws).all():
            return Estimate(value, 0.0, math.inf)
        log_a, b, floors = self._laws.T
        with np.errstate(all="ignore"):
            xs = np.exp((np.log(y - floors) - log_a) / b)
        xs = np.where(np.isnan(xs), np.inf, xs)  # this law never reaches y
        return Estimate(value, *np.quantile(xs, self._tails, method="nearest").tolist())


QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def power_law(x, y, with_floor: bool = False) -> PowerLaw:
    """Fit a law by least squares of log y. x, y: positive, (n,).

    Intervals are by profile likelihood. They span the laws whose sum of squares is within the bound of the F
    distribution. Without a floor this equals Student's t. A floor is at least 0.

    Raises ValueError for fewer different x than parameters, and for numbers that are not positive.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    parameters = 3 if with_floor else 2
    if len(np.unique(x)) < parameters:
        raise ValueError(f"{len(np.unique(x))} points for {parameters} parameters: measure more")
    if not ((x > 0).all() and (y > 0).all()):
        raise ValueError(f"a power law needs positive numbers, but the lowest are x {x.min()}, y {y.min()}")
    center = np.log(x).mean()  # centering log x makes the coefficient and the exponent nearly independent
    u = np.log(x) - center
    freedom = len(x) - parameters
    bound = stats.f.ppf(LEVEL, 1, freedom) / freedom if freedom else 0.0
    floors = np.linspace(0, y.min() * (1 - 1e-6), FLOORS) if with_floor else np.zeros(1)
    for _ in range(ZOOMS if with_floor else 1):
        fit = _fit_at_floors(u, y, floors)
        inside = np.flatnonzero(fit.squares <= fit.squares.min() * (1 + bound))
        ends = floors[[max(inside[0] - 1, 0), min(inside[-1] + 1, len(floors) - 1)]]
        best = fit.squares.argmin()
        (height, slope), floor, squares = fit.line[best], floors[best], fit.squares[best]
        kept = _edge(fit, inside, squares * (1 + bound), floors) if freedom else np.full((1, 3), np.nan)
        floors = np.unique(np.append(np.linspace(*ends, FLOORS), floor))
    kept[:, 0] -= kept[:, 1] * center
    ranges = np.stack([kept.min(0), kept.max(0)]) if freedom else np.array([[-np.inf] * 3, [np.inf] * 3])
    log_a = height - slope * center
    return PowerLaw(
        coefficient=Estimate(_exp(log_a), *map(_exp, ranges[:, 0])),
        exponent=Estimate(float(slope), *ranges[:, 1].tolist()),
        floor=Estimate(float(floor), *ranges[:, 2].tolist()) if with_floor else None,
        relative_error=math.sqrt(squares / freedom) if freedom else math.nan,
        x_range=(x.min(), x.max()),
        _laws=kept,
        _tails=(0.0, 1.0),
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


FLOORS, ZOOMS = 100, 3  # floors in a grid, and grids, each between the floors within the bound
ANGLES = 48  # laws on the edge of the confidence set, per floor
STEPS = 8  # of Gauss-Newton


@dataclass(frozen=True)
class _AtFloors:
    """The best line of log (y - floor) against u for each of F floors, by least squares of log y."""

    line: np.ndarray  # (F, 2): height at u = 0, slope
    covariance: np.ndarray  # (F, 2, 2), for a variance of 1
    squares: np.ndarray  # (F,): sum of squared residuals


def _fit_at_floors(u: np.ndarray, y: np.ndarray, floors: np.ndarray) -> _AtFloors:
    design = np.stack([np.ones_like(u), u], axis=1)
    target, floors = np.log(y), floors[:, None]
    above = np.log(y - floors)
    line = np.linalg.lstsq(design, above.T, rcond=None)[0].T
    with np.errstate(all="ignore"):
        for _ in range(STEPS):
            law = floors + np.exp(line @ design.T)
            jacobian = ((law - floors) / law)[:, :, None] * design  # (F, n, 2)
            residuals = target - np.log(law)
            covariance = np.linalg.pinv(np.einsum("fni,fnj->fij", jacobian, jacobian))
            step = np.einsum("fij,fnj,fn->fi", covariance, jacobian, residuals)
            line = line + step.clip(-1, 1)
        squares = ((target - np.log(floors + np.exp(line @ design.T))) ** 2).sum(1)
    return _AtFloors(line, covariance, np.where(np.isfinite(squares), squares, np.inf))


def _edge(fit: _AtFloors, inside: np.ndarray, most: float, floors: np.ndarray) -> np.ndarray:
    """(S, 3): height, slope, floor of laws whose sum of squares is `most`, the edge of the confidence set."""
    angles = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    radius = np.sqrt((most - fit.squares[inside]).clip(0))
    values, vectors = np.linalg.eigh(fit.covariance[inside])
    roots = vectors * np.sqrt(values.clip(0))[:, None, :]
    lines = fit.line[inside][:, :, None] + radius[:, None, None] * (roots @ circle)
    edge = np.concatenate([lines, np.broadcast_to(floors[inside][:, None, None], (len(inside), 1, ANGLES))], axis=1)
    return edge.transpose(0, 2, 1).reshape(-1, 3)


# Iso-FLOP grids


@dataclass(frozen=True)
class Optimum:
    """The best size of one budget. `note` says why it is not used, else it is ""."""

    flops: float
    size: Estimate
    tokens: Estimate
    ratio: Estimate
    loss: float
    curve: tuple[float, ...] | None  # coefficients in log size, for np.polyval
    fitted: list[bool]  # whether the parabola was fitted to each of the budget's points
    note: str = ""
    near_edge: bool = False  # whether it lies outside all sizes but the smallest or the largest


@dataclass(frozen=True)
class IsoFlop:
    """The optima of all budgets, and the laws of optimal size, tokens and ratio. None with fewer than two optima."""

    optima: list[Optimum]
    size: PowerLaw | None
    tokens: PowerLaw | None
    ratio: PowerLaw | None


def parabola(sizes, losses) -> tuple[np.ndarray | None, np.ndarray, str]:
    """(coefficients in log size, bool mask of fitted points, why there is no optimum or "").

    It raises no errors, because a budget without an optimum is a result, too.
    """
    log_n, losses = np.log(np.asarray(sizes, dtype=float)), np.asarray(losses, dtype=float)
    near = np.abs(log_n - log_n[losses.argmin()]) <= math.log(FIT_RANGE)
    if near.sum() < 3:
        return None, near, f"{near.sum()} points within a factor {FIT_RANGE} of the lowest: a parabola needs 3"
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
    """The optimum of each budget, by a parabola of loss in log size, and the laws of these optima.

    flops, sizes, tokens, losses: (n,), one value per run. Runs with equal flops are one budget. Intervals are by
    bootstrap: the residuals of all parabolas are resampled, and everything is fitted again.
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
    curve: Any  # coefficients in log size; None only if there is a note
    near: np.ndarray
    note: str

    @property
    def optimum(self) -> tuple[float, float]:
        """(log size, log tokens). Tokens are interpolated between runs, because FLOPs per token are not just 6·size."""
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
    near_edge = not b.log_n[1] <= vertex(b.curve) <= b.log_n[-2]
    loss = float(np.polyval(b.curve, vertex(b.curve)))
    return Optimum(b.flops, size, tokens, ratio, loss, curve, b.near.tolist(), near_edge=near_edge)


def _bootstrap(used: list[_Budget], seed: int) -> np.ndarray | None:
    """(S, budgets, 2): log size and log tokens at the optimum. None if all parabolas fit their points exactly."""
    if not used or all(b.near.sum() == 3 for b in used):
        return None
    scattered = [_residuals(b) for b in used]
    pooled = np.concatenate([r for r in scattered if len(r)])
    random, draws = np.random.default_rng(seed), np.empty((BOOTSTRAPS, len(used), 2))
    for j, b in enumerate(used):
        log_n = b.log_n[b.near]
        drawn_from = scattered[j] if len(scattered[j]) else pooled
        losses = np.polyval(b.curve, log_n) + random.choice(drawn_from, (BOOTSTRAPS, len(log_n)))
        curves = np.polyfit(log_n, losses.T, 2)
        with np.errstate(all="ignore"):
            optimum = -curves[1] / (2 * curves[0])
        lower_end = log_n[0] if np.polyval(b.curve, log_n[0]) < np.polyval(b.curve, log_n[-1]) else log_n[-1]
        optimum = np.where(curves[0] > 0, optimum, lower_end).clip(log_n[0], log_n[-1])
        draws[:, j] = np.stack([optimum, np.interp(optimum, b.log_n, b.log_d)], axis=1)
    return draws


def _residuals(b: _Budget) -> np.ndarray:
    """Residuals of one budget's parabola, because short runs are noisier. Empty if it fits its points exactly.

    They are scaled up, because least squares make residuals smaller than the noise, and by Student's t for few points.
    """
    freedom = int(b.near.sum()) - 3
    if not freedom:
        return np.empty(0)
    found = (b.losses - np.polyval(b.curve, b.log_n))[b.near]
    return found * math.sqrt(len(found) / freedom) * stats.t.ppf(QUANTILES[1], freedom) / stats.norm.ppf(QUANTILES[1])


def _estimate(log_value: float, draws: np.ndarray | None) -> Estimate:
    if draws is None:
        return Estimate(math.exp(log_value), 0.0, math.inf)
    low, high = np.quantile(draws, QUANTILES)
    return Estimate(*np.exp([log_value, min(low, log_value), max(high, log_value)]).tolist())


def _laws(used: list[_Budget], scattered: np.ndarray | None) -> tuple[PowerLaw | None, ...]:
    if len(used) < 2:
        return None, None, None
    log_c, optima = np.log([b.flops for b in used]), np.array([b.optimum for b in used])
    return tuple(
        _law(log_c, optima @ np.array(weights), None if scattered is None else scattered @ np.array(weights))
        for weights in ((1, 0), (0, 1), (-1, 1))
    )


def _law(log_x: np.ndarray, log_y: np.ndarray, drawn: np.ndarray | None) -> PowerLaw:
    """A power law through the optima. Its intervals come from the resampled laws."""
    slope, height = np.polyfit(log_x, log_y, 1)
    residuals = log_y - np.polyval([slope, height], log_x)
    freedom = len(log_x) - 2
    samples = np.full((1, 3), np.nan)
    exponent, log_a = Estimate(slope, -math.inf, math.inf), (0.0, math.inf)
    if drawn is not None:
        slopes, heights = np.polyfit(log_x, drawn.T, 1)
        samples = np.stack([heights, slopes, np.zeros_like(slopes)], axis=1)
        low, high = np.quantile(slopes, QUANTILES)
        exponent = Estimate(slope, min(low, slope), max(high, slope))
        log_a = [_exp(height) for height in np.quantile(heights, QUANTILES)]
    return PowerLaw(
        coefficient=Estimate(_exp(height), *log_a),
        exponent=exponent,
        floor=None,
        relative_error=math.sqrt((residuals**2).sum() / freedom) if freedom else math.nan,
        x_range=(math.exp(log_x.min()), math.exp(log_x.max())),
        _laws=samples,
        _tails=QUANTILES,
    )
