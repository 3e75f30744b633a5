"""Choosing the next token of every row at once. A row's choice depends on its own seed and step alone."""

import math
from dataclasses import dataclass

import torch

GREEDY_BELOW = 1e-5  # temperatures this small are argmax; dividing by them would overflow


@dataclass(frozen=True)
class SamplingParams:
    """How to answer a prompt. Temperature is applied first, then top_k, then top_p over what top_k left.

    Temperature 0 is greedy. Of the n samples of a prompt, sample i is the same whatever n is.
    Raises ValueError for a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 42
    n: int = 1

    def __post_init__(self):
        for name in ("max_tokens", "n", "top_k"):
            value = getattr(self, name)
            if value is not None or name != "top_k":
                _check(name, value, isinstance(value, int) and value >= 1, "a whole number from 1 up")
        _check("seed", self.seed, isinstance(self.seed, int) and 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")


def _check(name: str, value, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} {value!r} must be {expected}")


def sample(logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) to token ids (B,). Row b's randomness is a function of the integers keys[b] alone.

    keys is (B, any) int64 on the CPU; the engine uses (seed, sample, step). Ties go to the lowest id.
    """
    if params.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    weights = logits.exp()
    if params.top_k is not None or (params.top_p is not None and params.top_p < 1):
        weights = weights * _filter(logits, params)
    # Inverse CDF in the order of the vocabulary: rounding that swaps two almost equal logits changes nothing.
    cdf = weights.cumsum(dim=-1)
    target = uniforms(keys).to(cdf.device).unsqueeze(-1) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def _filter(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(B, V) booleans: the top_k largest, and of those the fewest whose probability reaches top_p."""
    k = min(params.top_k or logits.size(-1), logits.size(-1))
    largest = logits.topk(k, dim=-1).values
    count = torch.full_like(largest[:, :1], k, dtype=torch.long)
    if params.top_p is not None:
        probabilities = largest.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        count = (before < params.top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = largest.gather(-1, count - 1)
    above, tied = logits > threshold, logits == threshold
    return above | (tied & (tied.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))


def uniforms(keys: torch.Tensor) -> torch.Tensor:
    """(B, any) int64 to (B,) fp32 in [0, 1): SplitMix64 (doi:10.1145/2660193.2660195) over each row's integers.

    A hash instead of a generator: there is no state to keep, copy or rewind with a sequence.
    """
    z = torch.zeros_like(keys[:, 0])
    for key in keys.unbind(dim=1):
        z = z + (key + 1) * -0x61C8864680B583EB  # the golden ratio in 64 bits, as a signed number
        z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47
        z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15
        z = z ^ _shift_right(z, 31)
    return _shift_right(z, 41).float() / 2**23  # 23 bits: in fp32 their product with a sum stays below the sum


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically; the hash needs zeros on the left
