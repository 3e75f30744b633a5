import math

import pytest
import torch

from nanochat_ray.inference import sampling
from nanochat_ray.inference.sampling import SamplingParams, sample, uniforms

LOGITS = torch.tensor([1.0, 0.0, 2.0, 0.5, 2.0, -1.0])
ROWS = 20_000


def keys(rows: int, seed: int = 7) -> torch.Tensor:
    return torch.tensor([(seed, 0, step) for step in range(rows)])


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=0.5), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=3.0, top_k=4), [0, 2, 3, 4]),
        (SamplingParams(top_k=1), [2]),  # tokens 2 and 4 tie: the lower id is kept
        (SamplingParams(top_k=50), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(top_p=0.35), [2]),  # probabilities .131 .048 .356 .079 .356 .018 (rounded)
        (SamplingParams(top_p=0.8), [0, 2, 4]),
        (SamplingParams(top_p=1e-9), [2]),
        (SamplingParams(top_k=3, top_p=0.86), [0, 2, 4]),  # top_p counts what top_k left: .422 + .422 < .86
        (SamplingParams(temperature=0.0), [2]),
    ],
)
def test_frequencies_are_those_of_the_filtered_softmax(params, kept):
    tokens = sample(LOGITS.expand(ROWS, -1), params, keys(ROWS))
    counts = tokens.bincount(minlength=6).double()
    assert counts.nonzero().squeeze(1).tolist() == kept
    if len(kept) > 1:
        expected = (LOGITS[kept].double() / params.temperature).softmax(0) * ROWS
        assert chi_square(counts[kept], expected) < 20.5  # the 0.1 % quantile with 5 degrees of freedom


def test_a_row_depends_on_its_key_alone():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    for params in (SamplingParams(), SamplingParams(top_k=20, top_p=0.9, temperature=0.7)):
        together = sample(logits, params, keys(64))
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        assert torch.equal(sample(logits[order], params, keys(64)[order]), together[order])
        alone = [sample(logits[i : i + 1], params, keys(64)[i : i + 1]).item() for i in range(64)]
        assert alone == together.tolist()
        assert not torch.equal(sample(logits, params, keys(64, seed=8)), together)


def test_uniforms_are_uniform_and_independent_along_each_part_of_the_key():
    bins = 20
    for column in range(3):
        sequence = torch.zeros(40_001, 3, dtype=torch.long)
        sequence[:, column] = torch.arange(40_001)
        u = uniforms(sequence)
        assert 0 <= u.min() < 1e-3
        assert 1 - 1e-3 < u.max() < 1
        cells = (u * bins).long()
        pairs = (cells[:-1] * bins + cells[1:]).bincount(minlength=bins * bins).double()
        assert chi_square(pairs, torch.full_like(pairs, 40_000 / bins**2)) < 490  # 0.1 % quantile at 399: 490


def test_the_smallest_and_the_largest_draw_keep_to_the_filter(monkeypatch):
    for draw, token in ((0.0, 1), (1 - 2**-23, 3)):
        monkeypatch.setattr(sampling, "uniforms", lambda keys, draw=draw: torch.full((len(keys),), draw))
        for scale in (1.0, 1.7, 3.3):
            logits = torch.tensor([[-9.0, scale, 2.0, scale + 0.1, -9.0]])
            assert sample(logits, SamplingParams(top_k=3), keys(1)).item() == token


def test_extreme_logits_and_draws_stay_inside_the_vocabulary():
    hopeless = torch.full((1000, 5), -math.inf)
    hopeless[:, 3] = 0.0
    assert set(sample(hopeless, SamplingParams(temperature=1.5), keys(1000)).tolist()) == {3}
    spread = torch.tensor([[30000.0, -30000.0, 29999.0]]).expand(1000, -1)
    assert set(sample(spread, SamplingParams(temperature=2e-5), keys(1000)).tolist()) == {0}
    assert set(sample(spread, SamplingParams(temperature=1e300), keys(1000)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("seed", -1),
        ("seed", 2**63),
        ("n", 0),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} {value}"):
        SamplingParams(**{name: value})
