"""Batched generation: sequences join a batch when there is a place, share every forward, and leave when done."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nanochat_ray.inference.kv_cache import KVCache
from nanochat_ray.inference.sampling import SamplingParams, sample
from nanochat_ray.inference.tools import calculate

PREFILL_TOKENS = 8192  # prompts prefilled together hold at most this many tokens, padding included


@dataclass(frozen=True)
class Completion:
    """What was generated after a prompt. mask is 1 where a token was sampled, 0 where a tool's output was put in.

    finish_reason is "stop" when the model ended its turn (assistant_end or bos; that token is left out of tokens)
    and "length" when max_tokens or the end of the model's reach came first.
    """

    tokens: list[int]
    mask: list[int]
    finish_reason: str


@dataclass
class Sequence:
    """One sample of one prompt on its way."""

    prompt: list[int]
    sample: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)  # tool output that is still to be put in
    code_start: int | None = None  # where in tokens the code after python_start begins
    finish_reason: str | None = None


class Engine:
    """Generates for up to max_batch_size sequences at once.

    Without a tokenizer nothing stops a sequence before its length, and no tool is called.
    """

    def __init__(self, model, tokenizer=None, max_batch_size: int = 32):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size {max_batch_size} must be 1 or more")
        self.model, self.tokenizer, self.max_batch_size = model, tokenizer, max_batch_size
        names = ("assistant_end", "python_start", "python_end", "output_start", "output_end")
        self.special = {name: tokenizer.special(f"<|{name}|>") for name in names} if tokenizer else {}
        self.stop = {self.special["assistant_end"], tokenizer.bos_id} if tokenizer else set()

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """params.n completions of each prompt, in the order of the prompts, a prompt's samples adjacent.

        Sequences beyond max_batch_size wait for a place. max_tokens is cut where the model's reach ends.
        Raises ValueError for a prompt that is empty, too long, or holds ids outside the vocabulary.
        """
        sequences = [sequence for prompt in prompts for sequence in self._sequences(prompt, params)]
        for _ in self._steps(sequences, params):
            pass
        return [Completion(s.tokens, s.mask, s.finish_reason) for s in sequences]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """The tokens of the prompt's first completion as they come, tool output included. Raises as generate does."""
        return self._follow(self._sequences(prompt, params)[0], params)

    def _follow(self, sequence: Sequence, params: SamplingParams) -> Iterator[int]:
        for _ in self._steps([sequence], params):
            if sequence.finish_reason != "stop":
                yield sequence.tokens[-1]

    def _sequences(self, prompt: list[int], params: SamplingParams) -> list[Sequence]:
        reach, vocab_size = self.model.cos.size(0), self.model.config.vocab_size
        if not prompt:
            raise ValueError("a prompt is empty; it needs at least one token, such as bos")
        if len(prompt) >= reach:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room within the model's reach of {reach}")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"a prompt holds token ids outside 0 … {vocab_size - 1}")
        max_tokens = min(params.max_tokens, reach - len(prompt))
        return [Sequence(list(prompt), i, max_tokens) for i in range(params.n)]

    @torch.inference_mode()
    def _steps(self, sequences: list[Sequence], params: SamplingParams) -> Iterator[None]:
        """Run all sequences to their end. Each step is one forward: a prefill if there is a place, else a decode."""
        if not sequences:
            return
        max_len = max(len(s.prompt) + s.max_tokens for s in sequences)
        places = min(self.max_batch_size, len(sequences))
        cache = KVCache(self.model.config, places, max_len, self.model.cos.device, self.model.compute_dtype)
        waiting, running = deque(_groups(sequences, places)), []
        while waiting or running:
            if groups := _admit(waiting, places - len(running)):
                logits, batch = self._prefill(cache, len(running), groups)
                running += batch
            else:
                logits, batch = self._decode(cache, running), running
            keys = torch.tensor([(params.seed, s.sample, len(s.tokens)) for s in batch])
            for sequence, token in zip(batch, sample(logits, params, keys).tolist(), strict=True):
                self._append(sequence, token)
            _retire(cache, running)
            yield

    def _prefill(self, cache: KVCache, first_row: int, groups: list[list[Sequence]]):
        """Run each group's prompt once, give every sequence a row of the cache; logits (sequences, V), sequences."""
        prompts = [group[0].prompt for group in groups]
        longest = max(map(len, prompts))
        idx = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=cache.keys.device)
        cache.clear_rows(slice(first_row, None))
        chunk = cache.chunk(first_row, [len(prompt) for prompt in prompts])
        logits = self.model.logits(chunk.last_hidden(self.model.hidden(idx, chunk)))
        batch, sources = [group[0] for group in groups], list(range(len(groups)))
        for i, group in enumerate(groups):
            for sequence in group[1:]:
                cache.copy_row(first_row + i, first_row + len(batch))
                batch.append(sequence)
                sources.append(i)
        return logits[sources], batch

    def _decode(self, cache: KVCache, running: list[Sequence]) -> torch.Tensor:
        idx = torch.tensor([s.tokens[-1:] for s in running], device=cache.keys.device)
        chunk = cache.chunk(0, [1] * len(running))
        return self.model.logits(chunk.last_hidden(self.model.hidden(idx, chunk)))

    def _append(self, sequence: Sequence, sampled: int) -> None:
        """Give a sequence its next token: tool output that is due, else the sampled one."""
        forced = bool(sequence.forced)
        token = sequence.forced.popleft() if forced else sampled
        if token in self.stop:
            sequence.finish_reason = "stop"
            return
        sequence.tokens.append(token)
        sequence.mask.append(0 if forced else 1)
        if self.special:
            self._use_tool(sequence, token)
        if len(sequence.tokens) == sequence.max_tokens:
            sequence.finish_reason = "length"

    def _use_tool(self, sequence: Sequence, token: int) -> None:
        """On python_end, queue the calculator's answer; code without one is left without output."""
        if token == self.special["python_start"]:
            sequence.code_start = len(sequence.tokens)
        elif token == self.special["python_end"] and sequence.code_start is not None:
            result = calculate(self.tokenizer.decode(sequence.tokens[sequence.code_start : -1]))
            sequence.code_start = None
            if result is not None:
                output = self.tokenizer.encode(result)
                sequence.forced.extend([self.special["output_start"], *output, self.special["output_end"]])


def _groups(sequences: list[Sequence], places: int) -> Iterator[list[Sequence]]:
    """Neighbours with the same prompt, to be prefilled once; at most as many as there are places."""
    group = []
    for sequence in sequences:
        if group and (len(group) == places or sequence.prompt != group[0].prompt):
            yield group
            group = []
        group.append(sequence)
    yield group


def _admit(waiting: deque[list[Sequence]], places: int) -> list[list[Sequence]]:
    """Take groups from the head of the queue while their sequences fit the places and their prompts the budget."""
    groups, longest = [], 0
    while waiting and len(waiting[0]) <= places:
        longest = max(longest, len(waiting[0][0].prompt))
        if groups and longest * (len(groups) + 1) > PREFILL_TOKENS:
            break
        groups.append(waiting.popleft())
        places -= len(groups[-1])
    return groups


def _retire(cache: KVCache, running: list[Sequence]) -> None:
    """Drop finished sequences; the last row moves into the gap, so that the rows in use stay adjacent."""
    for row in reversed(range(len(running))):
        if running[row].finish_reason is not None:
            last = running.pop()
            if row < len(running):
                cache.copy_row(len(running), row)
                running[row] = last
