import math

import numpy as np
import pytest
import torch

from nanochat_ray.inference import sampling
from nanochat_ray.inference.sampling import Controls, SamplingParams, logprobs, penalize, sample, uniforms

LOGITS = torch.tensor([1.0, 0.0, 2.0, 0.5, 2.0, -1.0])  # probabilities .131 .048 .356 .079 .356 .018
ROWS = 8_000
FILTERS = [
    (SamplingParams(temperature=1.0), [0, 1, 2, 3, 4, 5]),
    (SamplingParams(temperature=0.5), [0, 1, 2, 3, 4, 5]),
    (SamplingParams(temperature=3.0, top_k=4), [0, 2, 3, 4]),
    (SamplingParams(top_k=1), [2]),  # tokens 2 and 4 tie: the lower id is kept
    (SamplingParams(top_k=50), [0, 1, 2, 3, 4, 5]),
    (SamplingParams(top_p=0.35), [2]),
    (SamplingParams(top_p=0.8), [0, 2, 4]),
    (SamplingParams(top_p=1e-9), [2]),
    (SamplingParams(top_k=3, top_p=0.86), [0, 2, 4]),  # top_p counts what top_k left: .422 + .422 < .86
    (SamplingParams(min_p=0.3), [0, 2, 4]),  # of the likeliest token's probability
    (SamplingParams(min_p=1.0), [2, 4]),
    (SamplingParams(min_p=0.2, temperature=2.0, top_k=5), [0, 1, 2, 3, 4]),
    (SamplingParams(temperature=0.0), [2]),
    (SamplingParams(temperature=0.0, top_k=3, min_p=0.5), [2]),
]


def keys(rows: int, seed: int = 7) -> np.ndarray:
    return np.array([(seed, 0, step) for step in range(rows)], dtype=np.uint64)


def draw(logits: torch.Tensor, rows: list[SamplingParams], seed: int = 7) -> torch.Tensor:
    return sample(logits, Controls(rows, logits.size(-1)), keys(len(logits), seed))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_each_row_of_a_mixed_batch_is_drawn_from_its_own_filtered_softmax():
    rows = [params for params, _ in FILTERS] * ROWS
    tokens = draw(LOGITS.expand(len(rows), -1), rows).view(ROWS, -1)
    for (params, kept), drawn in zip(FILTERS, tokens.T, strict=True):
        counts = drawn.bincount(minlength=6).double()
        assert counts.nonzero().squeeze(1).tolist() == kept, params
        if len(kept) > 1:
            expected = (LOGITS[kept].double() / params.temperature).softmax(0) * ROWS
            assert chi_square(counts[kept], expected) < 20.5  # the 0.1 % quantile with 5 degrees of freedom


def test_a_row_depends_on_its_own_parameters_and_key_alone():
    logits = torch.randn(len(FILTERS) * 5, 1000, generator=torch.Generator().manual_seed(0)) * 3
    rows = [params for params, _ in FILTERS] * 5
    together = draw(logits, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    shuffled = sample(logits[order], Controls([rows[i] for i in order], 1000), keys(len(rows))[order])
    assert torch.equal(shuffled, together[order])
    for i, params in enumerate(rows):
        assert sample(logits[i : i + 1], Controls([params], 1000), keys(len(rows))[i : i + 1]) == together[i]
    assert not torch.equal(draw(logits, rows, seed=8), together)


def test_drawing_by_blocks_takes_the_first_token_whose_running_sum_exceeds_the_draw():
    """Of a vocabulary that ends within a block, by temperatures of the rows."""
    V, temperatures = 5 * sampling.BLOCK + 17, torch.tensor([0.2, 1.0, 3.0]).repeat(300).unsqueeze(1)
    logits = torch.randn(900, V, generator=torch.Generator().manual_seed(0)) * 3
    chances = uniforms(keys(900)).unsqueeze(1)
    cdf = (logits.double() / temperatures).softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cdf, chances.double()).squeeze(1)
    drawn = sampling.draw(logits, temperatures, chances)
    assert (drawn != expected).sum() <= 2  # by rounding at a token's edge
    assert len(set(drawn.tolist())) > 300
    greedy = sampling.draw(logits.round(), torch.full((900, 1), sampling.GREEDY), chances)
    assert torch.equal(greedy, logits.round().argmax(-1))  # of tied ones the first


def test_top_p_reaches_beyond_the_sorted_tokens():
    """Among more than MAX_SORTED tokens, alone and beside a row that keeps few."""
    V = 4 * sampling.MAX_SORTED
    logits = torch.linspace(0, 1, V)  # almost uniform: 90 % of the probability is in about 85 % of the tokens
    probability, order = logits.softmax(0).sort(descending=True)
    count = int((probability.cumsum(0) - probability < 0.9).sum())
    assert sampling.MAX_SORTED < count < V
    wide, narrow = SamplingParams(top_p=0.9), SamplingParams(top_k=5)
    for others in ([], [narrow, SamplingParams()]):
        rows = [wide, *others] * 500
        tokens = draw(logits.expand(len(rows), -1), rows)[:: len(others) + 1]
        assert set(tokens.tolist()) <= set(order[:count].tolist())
        assert tokens.min() < V - 3 * sampling.MAX_SORTED  # also from those that were not sorted at first
    head = draw(logits.expand(600, -1) * 20, [SamplingParams(top_p=0.5), narrow, SamplingParams()] * 200)
    probability = (logits * 20).softmax(0).flip(0)
    assert head[0::3].min() >= V - int((probability.cumsum(0) < 0.5).sum()) - 1
    assert set(head[1::3].tolist()) == set(range(V - 5, V))


def test_of_tied_tokens_the_first_are_kept():
    """In rows that have more of them than places, which costs the others beside them nothing."""
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0]).expand(4 * 500, -1)
    kinds = [SamplingParams(top_k=3), SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5)]
    for rows, kept in (
        (kinds, [{1, 2, 3}, set(range(6)), {1, 2}, {1, 2}]),
        (kinds[:3], [{1, 2, 3}, set(range(6)), {1, 2}]),
    ):
        tokens = draw(logits[: len(rows) * 500], rows * 500).view(500, -1)
        assert [set(drawn.tolist()) for drawn in tokens.T] == kept


def test_a_repetition_penalty_makes_seen_tokens_less_likely():
    seen = [2, 0, 5, 2]
    penalized = torch.tensor([1.0 / 1.5, 0.0, 2.0 / 1.5, 0.5, 2.0, -1.0 * 1.5])
    kinds = [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(),
        SamplingParams(temperature=0.0, repetition_penalty=9),
    ]
    rows = kinds * ROWS
    logits = LOGITS.repeat(len(rows), 1)
    penalize(logits, rows, [(seen, len(seen))] * len(rows))
    tokens = draw(logits, rows).view(ROWS, 3)
    for drawn, logits in zip(tokens.T[:2], (penalized, LOGITS), strict=True):
        expected = logits.double().softmax(0) * ROWS
        assert chi_square(drawn.bincount(minlength=6).double(), expected) < 20.5
    assert set(tokens[:, 2].tolist()) == {4}  # greedy: token 2 was as likely, and is penalized


def test_uniforms_are_uniform_and_independent_along_each_part_of_the_key():
    bins = 20
    for column in range(3):
        for start in (0, 2**63 - 40_001):
            sequence = np.zeros((40_001, 3), dtype=np.uint64)
            sequence[:, column] = np.arange(start, start + 40_001, dtype=np.uint64)
            u = uniforms(sequence)
            assert (u.dtype, u.shape) == (torch.float32, (40_001,))
            assert 0 <= u.min() < 1e-3
            assert 1 - 1e-3 < u.max() < 1
            cells = (u * bins).long()
            pairs = (cells[:-1] * bins + cells[1:]).bincount(minlength=bins * bins).double()
            assert chi_square(pairs, torch.full_like(pairs, 40_000 / bins**2)) < 490  # 0.1 % quantile at 399: 490


def test_the_parts_of_a_key_are_not_exchanged():
    a, b, c = uniforms(np.array([(1, 2, 3), (3, 2, 1), (2, 1, 3)], dtype=np.uint64)).tolist()
    assert len({a, b, c}) == 3


def test_the_smallest_and_the_largest_draw_keep_to_the_filter(monkeypatch):
    for u, token in ((0.0, 1), (1 - 2**-23, 3)):
        monkeypatch.setattr(sampling, "uniforms", lambda keys, u=u: torch.full((len(keys),), u))
        for scale in (1.0, 1.7, 3.3):
            logits = torch.tensor([[-9.0, scale, 2.0, scale + 0.1, -9.0]])
            for params in (SamplingParams(top_k=3), SamplingParams(min_p=0.1)):
                assert draw(logits, [params]).item() == token


def test_extreme_logits_and_draws_stay_inside_the_vocabulary():
    hopeless = torch.full((1000, 5), -math.inf)
    hopeless[:, 3] = 0.0
    spread = torch.tensor([[30000.0, -30000.0, 29999.0]]).expand(1000, -1)
    for logits, temperature, expected in (
        (hopeless, 1.5, {3}),
        (spread, 2e-5, {0}),
        (spread, 1e300, {0, 1, 2}),
    ):
        assert set(draw(logits, [SamplingParams(temperature=temperature)] * 1000).tolist()) == expected


def test_logprobs_are_of_the_plain_softmax():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    expected = logits.log_softmax(-1)
    (own, likeliest), (other, _) = logprobs(logits, [5, 0], 3)
    assert (own, other) == pytest.approx((expected[0, 5].item(), expected[1, 0].item()))
    assert sorted(token for token, _ in likeliest[:2]) == [2, 4]
    assert likeliest[2][0] == 0
    assert [value for _, value in likeliest] == pytest.approx(expected[0, [2, 4, 0]].tolist())
    assert logprobs(logits, [1, 1], 0)[0][1] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("n", 0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("stop", ("",)),
        ("stop", "END"),  # not three stop strings of a letter each
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("logit_bias", ((3, 101),)),
        ("logit_bias", ((3, math.nan),)),
        ("logit_bias", (("a", 1),)),
        ("grammar", ""),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} .*must be"):
        SamplingParams(**{name: value})
