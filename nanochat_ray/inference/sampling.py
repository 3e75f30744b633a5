"""Samples the next token of all rows at once. Each row depends on its own parameters, seed and step alone."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

GREEDY = 1e-30  # temperature that stands for 0: all but the largest logit get weight 0
BLOCK = 128  # tokens per block of the two-level cumulative sum
MAX_SORTED = 1024  # top_p sorts this many of the likeliest tokens first, and the vocabulary only if they are too few
MAX_LOGPROBS = 20
NO_TOKEN = -1  # the result for a row whose logits are NaN
ONE = np.uint64(1)


@dataclass(frozen=True)
class SamplingParams:
    """How to sample the answers to a prompt. Raises ValueError for a value out of range.

    Applied in this order: repetition_penalty (arXiv:1909.05858, over the prompt and the answer); OpenAI's
    presence_penalty and frequency_penalty (over the answer) and logit_bias, pairs of a token and what is added to its
    logit; grammar; temperature, top_k, top_p among the top_k, min_p (arXiv:2407.01082). Temperature 0 and top_p 0 are
    greedy; top_k 0 and -1 are off.

    n: samples of the prompt. Sample i is the same whatever n is.
    grammar: from inference/grammar.py. The answer follows it, calls no tool, and ends when the grammar is complete.
    stop: strings that end the answer, also before its grammar is complete.
    logprobs: how many of the likeliest tokens to return for each token, by the model's own distribution.
    prompt_logprobs: the same for the prompt's tokens; max_tokens may then be 0.
    for_training: return the log probability with which each token was sampled, and keep the token that ends the turn.
    cache_salt: only requests of the same salt share cached prefixes.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 42
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: int | None = None
    for_training: bool = False
    grammar: str | None = None
    cache_salt: str = ""

    def __post_init__(self):
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        if self.top_p == 0:
            object.__setattr__(self, "top_p", None)
            object.__setattr__(self, "temperature", 0.0)
        least = 1 if self.prompt_logprobs is None else 0
        for name, low in (("max_tokens", least), ("n", 1), ("top_k", 1)):
            value = getattr(self, name)
            valid = (isinstance(value, int) and value >= low) or (value is None and name == "top_k")
            _check(name, value, valid, f"a whole number from {low} up")
        _check("seed", self.seed, isinstance(self.seed, int) and 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "from 0 (greedy) to 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0; 1 has no effect")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "from -2 to 2; 0 has no effect")
        for token, bias in self.logit_bias:
            _check("logit_bias", (token, bias), isinstance(token, int) and -100 <= bias <= 100, "(token, -100 to 100)")
        valid = not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop)
        _check("stop", self.stop, valid, "a tuple of texts that are not empty")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            valid = count is None or (isinstance(count, int) and 0 <= count <= MAX_LOGPROBS)
            _check(name, count, valid, f"from 0 to {MAX_LOGPROBS}")
        _check("grammar", self.grammar, self.grammar is None or bool(self.grammar), "a grammar that is not empty")

    @cached_property
    def penalizes(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)

    @cached_property
    def filters(self) -> bool:
        """Whether tokens are excluded by their probability."""
        return bool(self.top_k or self.min_p > 0) or (self.top_p is not None and self.top_p < 1)


def _check(name: str, value, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} {value!r} must be {expected}")


class Controls:
    """The sampling parameters of a batch as columns (B, 1), which are made at first use."""

    def __init__(self, rows: list[SamplingParams], vocab_size: int, device="cpu"):
        self.rows, self.vocab_size, self.device = rows, vocab_size, device
        self.nuclear = any((p.top_p or 1) < 1 for p in rows)
        self.filters = self.nuclear or any(p.top_k for p in rows)
        self.limits = any(p.min_p > 0 for p in rows)

    def _column(self, values, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device).unsqueeze(1)

    @cached_property
    def most(self) -> int:
        """How many of the likeliest tokens of a row to take first."""
        top_ks = [min(p.top_k or self.vocab_size, self.vocab_size) for p in self.rows]
        return max(k if k < self.vocab_size else min(MAX_SORTED, self.vocab_size) for k in top_ks)

    @cached_property
    def temperature(self) -> torch.Tensor:
        return self._column(max(p.temperature, GREEDY) for p in self.rows)

    @cached_property
    def top_k(self) -> torch.Tensor:
        return self._column((min(p.top_k or self.vocab_size, self.vocab_size) for p in self.rows), torch.long)

    @cached_property
    def top_p(self) -> torch.Tensor:
        return self._column(1.0 if p.top_p is None else p.top_p for p in self.rows)

    @cached_property
    def unfiltered(self) -> torch.Tensor:
        return (self.top_k == self.vocab_size) & (self.top_p == 1)

    @cached_property
    def min_p(self) -> torch.Tensor:
        return self._column(p.min_p for p in self.rows)


def penalize(logits: torch.Tensor, rows: list[SamplingParams], said: list[tuple[list[int], int]]) -> None:
    """Apply the penalties and biases of each row to logits (B, V), in place. said: for each row the ids of the prompt
    and the answer, and how many belong to the prompt."""
    repeated, added = [], []
    for row, (params, (ids, prompt_len)) in enumerate(zip(rows, said, strict=True)):
        if params.repetition_penalty != 1:
            repeated += [(row, token, params.repetition_penalty) for token in set(ids)]
        changes = dict(params.logit_bias)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(ids[prompt_len:]).items():
                penalty = params.presence_penalty + count * params.frequency_penalty
                changes[token] = changes.get(token, 0) - penalty
        added += [(row, token, change) for token, change in changes.items()]
    if repeated:
        place, penalty = _columns(repeated, logits.device)
        logits[place] = torch.where(logits[place] > 0, logits[place] / penalty, logits[place] * penalty)
    if added:
        place, change = _columns(added, logits.device)
        logits[place] += change


def _columns(entries: list[tuple[int, int, float]], device) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """((rows, tokens), values) of entries (row, token, value)."""
    rows, tokens, values = zip(*entries, strict=True)
    place = torch.tensor([rows, tokens], device=device).unbind()
    return place, torch.tensor(values, dtype=torch.float32, device=device)


def sample(logits: torch.Tensor, controls: Controls, keys: np.ndarray) -> torch.Tensor:
    """Logits (B, V) to token ids (B,), NO_TOKEN for rows with NaN or only -inf. Ties go to the lowest id.

    The randomness of row b is a function of the integers keys[b] alone. keys is (B, any) uint64; the engine uses
    (seed, sample, step).
    """
    return sample_with_logprobs(logits, controls, keys, with_logprobs=False)[0]


def sample_with_logprobs(
    logits: torch.Tensor, controls: Controls, keys: np.ndarray, with_logprobs: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens of `sample`, and with_logprobs their drawn_logprobs, too. It filters the logits once for both."""
    weights = _chosen_weights(logits, controls)
    tokens = _draw(weights, controls.temperature, uniforms(keys).to(logits.device).unsqueeze(-1))
    return tokens, _logprobs_of(tokens, weights) if with_logprobs else None


def drawn_logprobs(logits: torch.Tensor, tokens: torch.Tensor, controls: Controls) -> torch.Tensor:
    """The log probability (B,) in nats with which `sample` draws each row's token (B,) from logits (B, V).

    It includes temperature, top_k, top_p and min_p: -inf for a token that they exclude.
    """
    return _logprobs_of(tokens, _chosen_weights(logits, controls))


def _logprobs_of(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    own = weights.gather(-1, tokens.long().clamp(min=0).unsqueeze(-1))
    return (own / weights.sum(dim=-1, keepdim=True)).log().squeeze(-1)


def _chosen_weights(logits: torch.Tensor, controls: Controls) -> torch.Tensor:
    """Weights (B, V) after temperature and filters. Tokens are sampled in proportion to them."""
    weights = _weights(logits, controls.temperature)
    if controls.filters:
        weights = _filter(weights / weights.sum(dim=-1, keepdim=True), controls)
    if controls.limits:
        weights = weights * (weights >= controls.min_p * weights.amax(dim=-1, keepdim=True))
    return weights


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """`sample` for rows without filters: logits (B, V), temperature and uniforms (B, 1) to token ids (B,).

    Compiled with the forward it takes a fifth of the time.
    """
    return _draw(_weights(logits, temperature), temperature, uniforms)


def _weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """A softmax without the division by its sum."""
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()


def _draw(weights: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in the order of the vocabulary: first the block of tokens, then the token in it.

    In this order, rounding that swaps two almost equal logits does not change the result. Greedy rows get the first
    token with a weight.
    """
    weights = F.pad(weights, (0, -weights.size(-1) % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = weights.sum(dim=-1).cumsum(dim=-1)
    target = torch.where(temperature > GREEDY, uniforms, 0) * sums[:, -1:]
    block = _first_above(sums, target)
    target = target - torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0)
    inside = weights.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    token = block * BLOCK + _first_above(inside, target)
    return torch.where(sums[:, -1:] > 0, token, NO_TOKEN).squeeze(-1)


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, 1): where the cumulative sums (B, N) of a row first exceed its target (B, 1), or else reach their total."""
    above, total = (cdf <= target).sum(dim=-1, keepdim=True), (cdf < cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(above, total)


def _filter(weights: torch.Tensor, controls: Controls) -> torch.Tensor:
    """Probabilities (B, V) with all set to 0 but the top_k likeliest, and of those the fewest that sum to top_p."""
    largest = weights.topk(controls.most, dim=-1).values
    if controls.nuclear:
        largest, count = _nucleus(weights, largest, controls)
    else:
        count = controls.top_k.clamp(max=controls.most)
    least = torch.finfo(weights.dtype).tiny  # never choose tokens of probability 0
    threshold = largest.gather(-1, count - 1).clamp(min=least).masked_fill(controls.unfiltered, 0)
    chosen = weights >= threshold
    tied = chosen.sum(dim=-1, keepdim=True) > count.masked_fill(controls.unfiltered, weights.size(-1))
    if tied.any():
        rows = tied.squeeze(-1)
        chosen[rows] = _first_of_tied(weights[rows], threshold[rows], count[rows])
    return torch.where(chosen, weights, 0)


def _first_of_tied(weights: torch.Tensor, threshold: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Bool (B, V) of the `count` likeliest tokens. Among tokens at the threshold the lowest ids win."""
    above, tied = weights > threshold, weights == threshold
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= count - above.sum(dim=-1, keepdim=True)))


def _nucleus(weights: torch.Tensor, largest: torch.Tensor, controls: Controls):
    """The largest probabilities of each row, sorted (B, most), and how many of them top_k and top_p keep (B, 1)."""
    most = largest.size(-1)
    # Without top_k the probabilities of a row sum to 1 over all tokens, not over the sorted ones.
    short = (controls.top_k > most) & (largest.sum(dim=-1, keepdim=True) < controls.top_p)
    if (short & (controls.top_p < 1)).any():
        largest, most = weights.sort(dim=-1, descending=True).values, weights.size(-1)
    ranked = largest * (torch.arange(most, device=weights.device) < controls.top_k)
    shared = torch.where(controls.top_k > most, 1, ranked.sum(dim=-1, keepdim=True))
    probabilities = ranked / shared
    before = probabilities.cumsum(dim=-1) - probabilities
    count = ((before < controls.top_p) & (ranked > 0)).sum(dim=-1, keepdim=True).clamp(min=1)
    return largest, count


def logprobs(logits: torch.Tensor, chosen: list[int], most: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row of logits (B, V): the chosen token's log probability in nats, and the `most` likeliest tokens."""
    logs = logits.log_softmax(dim=-1)
    values, ids = logs.topk(most, dim=-1) if most else (logs[:, :0], logs[:, :0])
    own = logs.gather(-1, torch.tensor(chosen, device=logs.device).unsqueeze(-1)).squeeze(-1)
    rows = zip(own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [(logprob, list(zip(row_ids, row_values, strict=True))) for logprob, row_ids, row_values in rows]


def uniforms(keys: np.ndarray) -> torch.Tensor:
    """(B, any) uint64 to (B,) fp32 in [0, 1): SplitMix64 (doi:10.1145/2660193.2660195) over each row's integers.

    A hash, unlike a generator, has no state that a sequence would have to keep, copy or rewind.
    """
    z = np.zeros(len(keys), dtype=np.uint64)
    for key in keys.T:
        z = hashed(z, key)
    return torch.from_numpy(chances(z))


def hashed(z: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Extend the hash z (B,) uint64 of a row's integers by one more integer."""
    z = z + (key + ONE) * np.uint64(0x9E3779B97F4A7C15)  # the golden ratio in 64 bits; sums and products wrap
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def chances(z: np.ndarray) -> np.ndarray:
    """Hashes to fp32 in [0, 1). 23 bits, so that their product with a sum stays below the sum."""
    return (z >> np.uint64(41)).astype(np.float32) / np.float32(2**23)
