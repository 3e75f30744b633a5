"""Choosing the next token of every row at once. A row's choice depends on its own parameters, seed and step alone."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

GREEDY = 1e-30  # stands for temperature 0: small enough that all but the largest logit have no weight
BLOCK = 128  # tokens whose weights are summed, so that the running sum is a short one
MOST_SORTED = 1024  # likeliest tokens among which top_p is looked for before the whole vocabulary is sorted
MOST_LOGPROBS = 20
NO_TOKEN = -1  # stands for a token where logits are not numbers
ONE = np.uint64(1)


@dataclass(frozen=True)
class SamplingParams:
    """How to answer a prompt.

    Applied in this order: repetition_penalty (arXiv:1909.05858, over the prompt and the answer); OpenAI's
    presence_penalty and frequency_penalty (over the answer) and logit_bias, pairs of a token and what is added to its
    logit; grammar; temperature, top_k, top_p over what top_k left, min_p (arXiv:2407.01082). Temperature 0 and top_p 0
    are greedy; top_k 0 and -1 are off.

    grammar: what inference/grammar.py makes of a schema; the answer follows it, calls no tool, and ends where it does.
    stop: strings that end the answer, also before its grammar does.
    logprobs: how many of the likeliest tokens to tell with each, by the model's own distribution.
    prompt_logprobs: the same of the prompt's tokens; then max_tokens may be 0. for_training: tell with each token the
    log probability that it was drawn with, and leave the one that ends the turn in the answer.
    cache_salt: requests share what the cache knows of their prompts with those of the same salt alone.
    Of the n samples of a prompt, sample i is the same whatever n is. Raises ValueError for a value out of range.
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
            valid = count is None or (isinstance(count, int) and 0 <= count <= MOST_LOGPROBS)
            _check(name, count, valid, f"from 0 to {MOST_LOGPROBS}")
        _check("grammar", self.grammar, self.grammar is None or bool(self.grammar), "a grammar that is not empty")

    @cached_property
    def penalizes(self) -> bool:
        """Whether logits change by what was said, or by a bias."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)

    @cached_property
    def filters(self) -> bool:
        """Whether some tokens are left out by their probability."""
        return bool(self.top_k or self.min_p > 0) or (self.top_p is not None and self.top_p < 1)


def _check(name: str, value, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} {value!r} must be {expected}")


class Controls:
    """The parameters of a batch's rows that choose among tokens: what they ask for, and as columns (B, 1), which are
    made when they are used."""

    def __init__(self, rows: list[SamplingParams], vocab_size: int, device="cpu"):
        self.rows, self.vocab_size, self.device = rows, vocab_size, device
        self.nuclear = any((p.top_p or 1) < 1 for p in rows)
        self.filters = self.nuclear or any(p.top_k for p in rows)
        self.limits = any(p.min_p > 0 for p in rows)

    def _column(self, values, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device).unsqueeze(1)

    @cached_property
    def most(self) -> int:
        """How many of a row's likeliest tokens are looked at first."""
        top_ks = [min(p.top_k or self.vocab_size, self.vocab_size) for p in self.rows]
        return max(k if k < self.vocab_size else min(MOST_SORTED, self.vocab_size) for k in top_ks)

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
    """Change logits (B, V) by the penalties and biases of their rows. said: each row's ids, the prompt's and the
    answer's, and how many are the prompt's."""
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
    """Logits (B, V) to token ids (B,), NO_TOKEN where they are not numbers, or all -inf. Row b's randomness is a
    function of the integers keys[b] alone.

    keys is (B, any) uint64; the engine uses (seed, sample, step). Ties go to the lowest id.
    """
    return sample_and_tell(logits, controls, keys, tell=False)[0]


def sample_and_tell(
    logits: torch.Tensor, controls: Controls, keys: np.ndarray, tell: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `sample` draws, and what drawn_logprobs says of it if that is to be told, which filters them but once."""
    weights = _chosen_weights(logits, controls)
    tokens = _draw(weights, controls.temperature, uniforms(keys).to(logits.device).unsqueeze(-1))
    return tokens, _logprobs_of(tokens, weights) if tell else None


def drawn_logprobs(logits: torch.Tensor, tokens: torch.Tensor, controls: Controls) -> torch.Tensor:
    """The log probability (B,), in nats, with which `sample` draws each row's token (B,) from logits (B, V): after
    temperature, top_k, top_p and min_p. -inf for a token that these leave out."""
    return _logprobs_of(tokens, _chosen_weights(logits, controls))


def _logprobs_of(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    own = weights.gather(-1, tokens.long().clamp(min=0).unsqueeze(-1))
    return (own / weights.sum(dim=-1, keepdim=True)).log().squeeze(-1)


def _chosen_weights(logits: torch.Tensor, controls: Controls) -> torch.Tensor:
    """What tokens are drawn in proportion to (B, V)."""
    weights = _weights(logits, controls.temperature)
    if controls.filters:
        weights = _filter(weights / weights.sum(dim=-1, keepdim=True), controls)
    if controls.limits:
        weights = weights * (weights >= controls.min_p * weights.amax(dim=-1, keepdim=True))
    return weights


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """What sample does for rows that have a temperature and no more: logits (B, V), temperature and uniforms (B, 1)
    to token ids (B,). Compiled with the forward it costs a fifth."""
    return _draw(_weights(logits, temperature), temperature, uniforms)


def _weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """A softmax but for its sum."""
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()


def _draw(weights: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in the order of the vocabulary, where rounding that swaps two almost equal logits changes nothing:
    first the block of tokens, then the one in it. Greedy rows get the first token that has a weight."""
    weights = F.pad(weights, (0, -weights.size(-1) % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = weights.sum(dim=-1).cumsum(dim=-1)
    target = torch.where(temperature > GREEDY, uniforms, 0) * sums[:, -1:]
    block = _first_above(sums, target)
    target = target - torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0)
    inside = weights.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    token = block * BLOCK + _first_above(inside, target)
    return torch.where(sums[:, -1:] > 0, token, NO_TOKEN).squeeze(-1)


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where each row of running sums (B, N) first exceeds its target (B, 1), or else reaches its total: (B, 1)."""
    above, total = (cdf <= target).sum(dim=-1, keepdim=True), (cdf < cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(above, total)


def _filter(weights: torch.Tensor, controls: Controls) -> torch.Tensor:
    """The probabilities (B, V) of a row's top_k likeliest, of those the fewest that reach top_p together; else 0."""
    largest = weights.topk(controls.most, dim=-1).values
    if controls.nuclear:
        largest, count = _nucleus(weights, largest, controls)
    else:
        count = controls.top_k.clamp(max=controls.most)
    least = torch.finfo(weights.dtype).tiny  # tokens that cannot come are not chosen
    threshold = largest.gather(-1, count - 1).clamp(min=least).masked_fill(controls.unfiltered, 0)
    chosen = weights >= threshold
    tied = chosen.sum(dim=-1, keepdim=True) > count.masked_fill(controls.unfiltered, weights.size(-1))
    if tied.any():
        rows = tied.squeeze(-1)
        chosen[rows] = _first_of_tied(weights[rows], threshold[rows], count[rows])
    return torch.where(chosen, weights, 0)


def _first_of_tied(weights: torch.Tensor, threshold: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which tokens (B, V) are the `count` likeliest; of those at the threshold the first ones."""
    above, tied = weights > threshold, weights == threshold
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= count - above.sum(dim=-1, keepdim=True)))


def _nucleus(weights: torch.Tensor, largest: torch.Tensor, controls: Controls):
    """Each row's largest probabilities (B, most), sorted, and how many of them top_k and top_p leave (B, 1)."""
    most = largest.size(-1)
    # Rows without top_k share their probability among all tokens, also those beyond the sorted ones.
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
    """Of logits (B, V): per row, the chosen token's log probability in nats, and the likeliest tokens with theirs."""
    logs = logits.log_softmax(dim=-1)
    values, ids = logs.topk(most, dim=-1) if most else (logs[:, :0], logs[:, :0])
    own = logs.gather(-1, torch.tensor(chosen, device=logs.device).unsqueeze(-1)).squeeze(-1)
    rows = zip(own.tolist(), ids.tolist(), values.tolist(), strict=True)
    return [(logprob, list(zip(row_ids, row_values, strict=True))) for logprob, row_ids, row_values in rows]


def uniforms(keys: np.ndarray) -> torch.Tensor:
    """(B, any) uint64 to (B,) fp32 in [0, 1): SplitMix64 (doi:10.1145/2660193.2660195) over each row's integers.

    A hash instead of a generator: there is no state to keep, copy or rewind with a sequence.
    """
    z = np.zeros(len(keys), dtype=np.uint64)
    for key in keys.T:
        z = hashed(z, key)
    return torch.from_numpy(chances(z))


def hashed(z: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The hash (B,) uint64 of the integers whose hash is z, and one more."""
    z = z + (key + ONE) * np.uint64(0x9E3779B97F4A7C15)  # the golden ratio in 64 bits; sums and products wrap
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def chances(z: np.ndarray) -> np.ndarray:
    """Hashes to fp32 in [0, 1). 23 bits: their product with a sum stays below the sum."""
    return (z >> np.uint64(41)).astype(np.float32) / np.float32(2**23)
