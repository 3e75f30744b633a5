"""The search of learning rates: what is tried, and what is said of it."""

import pytest

from experiments import tune_lr
from nanochat_ray.model.scaling import BASE_LRS


def test_base_rates_first_then_draws_within_the_factor():
    drawn = tune_lr.sample_rates(50, 4.0, seed=1)
    assert drawn[0] == BASE_LRS
    for key, base in BASE_LRS.items():
        factors = [rates[key] / base for rates in drawn]
        assert 0.25 <= min(factors) < 0.4 and 2.5 < max(factors) <= 4
    assert tune_lr.sample_rates(5, 4.0, seed=1) == drawn[:5]  # more samples can be added to a search


@pytest.mark.parametrize(("best", "said"), [(1.9, "the gain transfers, 5.00%"), (2.0, "the rates do not transfer")])
def test_whether_rates_transfer(best, said):
    double = {key: 2 * lr for key, lr in BASE_LRS.items()}
    found = [{"val_bpb": 3.0, **BASE_LRS}, {"val_bpb": 2.7, **double}]
    first, second = tune_lr.sentences(0.3, 1, 2, found, found[1], [2.0, best])
    assert "matrix × 2.00" in first and "10.00% below the base rates" in first
    assert said in second and "depth 2" in second
    assert "stopped early" in tune_lr.sentences(0.3, 1, 2, found[1:], found[1], [2.0, best])[0]
