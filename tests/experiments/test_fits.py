"""Fits recover the laws that made the numbers, within their intervals, and say when there is nothing to fit."""

import math

import numpy as np
import pytest

from experiments import fits

SEEDS = range(100)


def holds(estimate: fits.Estimate, true: float) -> bool:
    return estimate.low <= true <= estimate.high


def share_recovered(make) -> np.ndarray:
    """By parameter, of how many seeds the interval holds the truth."""
    return np.sum([make(np.random.default_rng(seed)) for seed in SEEDS], axis=0)


def test_power_laws_are_recovered():
    x = np.geomspace(1e18, 1e20, 5)

    def recovered(random):
        law = fits.power_law(x, 60 * x**-0.06 * np.exp(random.normal(0, 0.003, len(x))))
        return holds(law.coefficient, 60), holds(law.exponent, -0.06), holds(law.solve(3.5), (3.5 / 60) ** (-1 / 0.06))

    assert (share_recovered(recovered) >= 90).all()


def test_power_laws_with_a_floor_are_recovered():
    x = np.geomspace(1e17, 1e21, 6)

    def recovered(random):
        law = fits.power_law(x, (0.55 + 200 * x**-0.15) * np.exp(random.normal(0, 0.002, len(x))), with_floor=True)
        return holds(law.coefficient, 200), holds(law.exponent, -0.15), holds(law.floor, 0.55)

    assert (share_recovered(recovered) >= 90).all()


def test_a_floor_is_allowed_for_far_beyond_the_points():
    """Whether there is one or not: thirty times the largest x, the interval of the law holds the truth."""
    x = np.geomspace(1e18, 3e19, 8)

    def recovered(random):
        held = []
        for coefficient, exponent, floor in ((200, -0.15, 0.55), (60, -0.06, 0.0)):
            noise = np.exp(random.normal(0, 0.003, len(x)))
            law = fits.power_law(x, (floor + coefficient * x**exponent) * noise, with_floor=True)
            low, high = law.band(9e20)
            held += [low <= floor + coefficient * 9e20**exponent <= high, holds(law.floor, floor)]
        return tuple(map(bool, held))

    assert (share_recovered(recovered) >= 90).all()


# Chinchilla's law (arXiv:2203.15556): loss = E + A/N^a + B/D^b with C = 6·N·D has its optimum at N = G·(C/6)^(b/(a+b)).
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
G = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))


def optimal_size(flops):
    return G * (flops / 6) ** (BETA / (ALPHA + BETA))


def grid(budgets, spread, random, noise=0.002):
    """Runs around each budget's optimum, as isoflop takes them."""
    flops, sizes = np.meshgrid(budgets, spread, indexing="ij")
    flops, sizes = flops.ravel(), (optimal_size(flops) * sizes).ravel()
    tokens = flops / 6 / sizes
    losses = (E + A / sizes**ALPHA + B / tokens**BETA) * np.exp(random.normal(0, noise, len(sizes)))
    return flops, sizes, tokens, losses


def test_the_optima_of_an_iso_flop_grid_are_recovered():
    def recovered(random):
        fit = fits.isoflop(*grid(np.geomspace(1e18, 1e19, 4), np.geomspace(0.4, 3.5, 6), random))
        return (
            holds(fit.size.exponent, BETA / (ALPHA + BETA)),
            holds(fit.tokens.exponent, ALPHA / (ALPHA + BETA)),
            holds(fit.ratio.exponent, (ALPHA - BETA) / (ALPHA + BETA)),
            *(holds(best.size, optimal_size(best.flops)) for best in fit.optima),
        )

    assert (share_recovered(recovered) >= 90).all()


def test_a_noisier_budget_has_wider_intervals():
    """Noise of 0.6 % in the first budget and of 0.1 % in the last."""

    def recovered(random):
        flops, sizes, tokens, losses = grid(np.geomspace(1e18, 1e19, 4), np.geomspace(0.4, 3.5, 6), random, noise=0)
        losses *= np.exp(random.normal(size=24) * np.repeat([0.006, 0.003, 0.002, 0.001], 6))
        fit = fits.isoflop(flops, sizes, tokens, losses)
        return tuple(best.note != "" or holds(best.size, optimal_size(best.flops)) for best in fit.optima)

    assert (share_recovered(recovered) >= 88).all()


def test_a_budget_without_a_minimum_is_said_to_be_so_and_not_used():
    budgets, spread = [1e18, 2e18, 4e18], np.geomspace(0.2, 3.5, 9)
    flops, sizes, tokens, losses = grid(budgets, spread, np.random.default_rng(0), noise=0)
    kept = (flops != 2e18) | (sizes < 0.9 * optimal_size(2e18))  # of the second only what is left of its minimum
    fit = fits.isoflop(*(v[kept] for v in (flops, sizes, tokens, losses)))
    assert [bool(best.note) for best in fit.optima] == [False, True, False]
    assert "the lowest loss is at the largest size" in fit.optima[1].note
    assert math.isnan(fit.optima[1].size.value)
    assert fit.size.exponent.value == pytest.approx(BETA / (ALPHA + BETA), abs=0.01)
    alone = fits.isoflop(*(v[flops == 1e18] for v in (flops, sizes, tokens, losses)))
    assert alone.size is None and not alone.optima[0].note
    two = flops == 1e18
    two[2:] = False
    assert "a parabola needs 3" in fits.isoflop(*(v[two] for v in (flops, sizes, tokens, losses))).optima[0].note


def test_far_points_are_left_out_of_a_parabola():
    sizes = np.geomspace(0.05, 20, 9) * 1e8
    fit = fits.isoflop(np.full(9, 1e18), sizes, 1e18 / 6 / sizes, 2 + 0.1 * np.log(sizes / 1e8) ** 2)
    near = fit.optima[0].fitted
    assert sum(near) < 9 and not near[0] and near[4]
    assert fit.optima[0].size.value == pytest.approx(1e8, rel=1e-6)


def test_as_many_points_as_parameters_give_no_interval_and_fewer_an_error():
    law = fits.power_law([1e18, 1e19], [1.0, 0.9])
    assert law(1e20) == pytest.approx(0.81)
    assert law.solve(0.81).value == pytest.approx(1e20)
    assert math.isinf(law.exponent.high) and "too few points" in str(law.exponent)
    assert np.isnan(law.band([1e20])).all()
    with pytest.raises(ValueError, match="1 points for 2 parameters"):
        fits.power_law([1e18], [1.0])
    with pytest.raises(ValueError, match="1 points for 2 parameters"):
        fits.power_law([1e18, 1e18, 1e18], [1.0, 0.9, 0.8])
    flat = fits.power_law([1e18, 1e19, 1e20, 1e21], [1.0] * 4, with_floor=True)
    assert abs(flat(1e22) - 1) < 1e-6
    with pytest.raises(ValueError, match="positive"):
        fits.power_law([1e18, 1e19], [1.0, -0.5])


def test_a_floor_is_never_reached():
    x = np.geomspace(1e17, 1e21, 6)
    law = fits.power_law(x, 0.55 + 200 * x**-0.15, with_floor=True)
    assert math.isnan(law.solve(0.5).value)
    low, high = law.band(x)
    assert (low <= law(x)).all() and (law(x) <= high).all()
