"""Continuous batching: sequences join and leave between steps; a step decodes a batch and reads parts of prompts.

Results do not depend on who else is in the batch, but for rounding.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch

from nanochat_ray.inference.kv_cache import BlockManager, cache_bytes, page_bytes
from nanochat_ray.inference.model_runner import ModelRunner
from nanochat_ray.inference.sampling import Controls, SamplingParams, logprobs, sample
from nanochat_ray.inference.scheduler import Scheduler
from nanochat_ray.inference.sequence import Completion, Sequence
from nanochat_ray.inference.text import AnswerStream
from nanochat_ray.inference.tools import calculate
from nanochat_ray.model.gpt import ROTARY_REACH

CHUNK = 512  # most tokens of prompts in a step
LEAST_CHUNK = 12  # beside running sequences: so that a prompt is read at all, however slow the machine
STALL = 0.5  # of a decoding step's time: how much longer a step may become by a part of a prompt
ENDING = 3  # times that if prompts end in it


class Engine:
    """Generates for up to max_batch_size sequences at once.

    Without a tokenizer nothing stops a sequence before its length, and no tool is called. kv_bytes: memory for keys and
    values; the default holds max_batch_size sequences of the model's sequence_len, or one as long as its reach. chunk:
    tokens of prompts that are read in a step; by default as many as keep those that are being answered from waiting.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        max_batch_size: int = 32,
        kv_bytes: int | None = None,
        chunk: int | None = None,
    ):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size {max_batch_size} must be 1 or more")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk {chunk} must be 1 or more")
        config, itemsize = model.config, model.compute_dtype.itemsize
        if kv_bytes is None:
            kv_bytes = cache_bytes(config, max(max_batch_size, ROTARY_REACH), config.sequence_len, itemsize)
        self.manager = BlockManager(config, kv_bytes // page_bytes(config, itemsize))
        self.scheduler = Scheduler(self.manager, max_batch_size)
        self.runner = ModelRunner(model, self.manager, max_batch_size)
        self.config, self.tokenizer, self.chunk = config, tokenizer, chunk
        names = ("assistant_end", "python_start", "python_end", "output_start", "output_end")
        self.special = {name: tokenizer.special(f"<|{name}|>") for name in names} if tokenizer else {}
        self.stop = {self.special["assistant_end"], tokenizer.bos_id} if tokenizer else set()
        self.rows: list[Sequence] = []  # whose tables the runner has, row by row
        self.controls, self.seen = None, None
        self.decode_seconds: dict[int, float] = {}  # of a decoding step, by its rows
        self.token_seconds = 0.0  # that each token of a prompt makes a step longer
        self.arrivals = 0
        self.counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def compile(self) -> None:
        """torch.compile: a minute or two, for steps several times as fast. May run in a thread beside the one that
        steps, which goes on uncompiled until it is done."""
        self.runner.compile()
        self.decode_seconds = {}  # what uncompiled steps took; the thread that steps may hold the old ones for one more

    def submit(self, prompt: list[int], params: SamplingParams) -> list[Sequence]:
        """Queue params.n sequences that go on from the prompt; step() moves them on.

        max_tokens is cut where the model's reach or the room for keys and values ends. Raises ValueError for a prompt
        that is empty, too long, or holds ids outside the vocabulary, and for stop strings without a tokenizer.
        """
        capacity, vocab_size = self.manager.capacity, self.config.vocab_size
        if not prompt:
            raise ValueError("a prompt is empty; it needs at least one token, such as bos")
        if len(prompt) >= capacity:
            limit = "the model's reach" if capacity == ROTARY_REACH * self.config.sequence_len else "the cache's room"
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room within {limit} of {capacity}")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"a prompt holds token ids outside 0 … {vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        sequences = []
        for i in range(params.n):
            answer = AnswerStream(self.tokenizer, params.stop) if params.stop else None
            most = min(params.max_tokens, capacity - len(prompt))
            sequences.append(Sequence(list(prompt), params, i, most, answer, arrival=self.arrivals + i))
        self.arrivals += params.n
        self.scheduler.waiting.extend(sequences)
        self.counts["requests"] += 1
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """Let a sequence end where it is, between steps; its memory is free at once."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self.scheduler.drop(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One forward: the next token of every running sequence, and beside them as much of the next prompts as the
        budget allows; those whose prompts end join. Returns those that moved on."""
        scheduler, began = self.scheduler, time.perf_counter()
        self._place_rows(scheduler.make_room())
        rows, chunks = self.rows, scheduler.next_chunks(*self._chunk_budget())
        if not rows and not chunks:
            return []
        logits, drawn = self.runner.run(rows, chunks)
        for row, sequence in enumerate(rows):
            if self.manager.advance(sequence.table, sequence.ids, len(sequence.ids)):
                self.runner.place(row, sequence.table)
        tokens = 0
        for sequence, end in chunks:
            tokens += end - sequence.table.length
            self.manager.advance(sequence.table, sequence.ids, end)
        B, joining = len(rows), [sequence for sequence, end in chunks if end == len(sequence.ids)]
        moved = [*rows, *joining]
        if rows:
            self._choose(logits[:B], drawn[:B], rows, self.controls, self.seen)
            self._adapt(time.perf_counter() - began, tokens)
        if joining:
            self._join(joining, logits[B : len(moved)], drawn[B : len(moved)])
        return moved

    def _join(self, sequences: list[Sequence], logits: torch.Tensor, drawn: torch.Tensor) -> None:
        for sequence in sequences:
            self.scheduler.start(sequence)
            if not sequence.generated:
                self.counts["prompt_tokens"] += sequence.prompt_len
                self.counts["cached_tokens"] += sequence.cached_tokens
        controls = Controls([s.params for s in sequences], self.config.vocab_size, self.runner.device)
        self._choose(logits, drawn, sequences, controls, self._seen(sequences) if controls.penalizes else None)

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """params.n completions of each prompt, in the order of the prompts, a prompt's samples adjacent.

        Sequences beyond max_batch_size wait for a place. Raises ValueError as submit does.
        """
        sequences = []
        try:
            for prompt in prompts:
                sequences += self.submit(prompt, params)
            while self.busy:
                self.step()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """The tokens of the prompt's first completion as they come, tool output included. Raises as submit does."""
        sequence, *others = self.submit(prompt, params)
        for other in others:
            self.cancel(other)
        return self._follow(sequence)

    def _follow(self, sequence: Sequence) -> Iterator[int]:
        told = 0
        try:
            while told < sequence.generated or sequence.finish_reason is None:
                if told == sequence.generated:
                    self.step()
                else:
                    yield sequence.ids[sequence.prompt_len + told]
                    told += 1
        finally:
            self.cancel(sequence)

    def _chunk_budget(self) -> tuple[int, int]:
        """Tokens of a long prompt to read in the next step, as many as make it longer by STALL, and the most if prompts
        are read to their ends: what is left would make other steps longer, each by more than its tokens cost."""
        if self.chunk is not None:
            return self.chunk, self.chunk
        if not self.rows:
            return CHUNK, CHUNK
        budget, known = 4 * LEAST_CHUNK, self.decode_seconds
        if known and self.token_seconds:
            rows, scheduler = len(self.rows), self.scheduler
            joining = min(len(scheduler.waiting), scheduler.max_batch_size - rows)
            crowd = max(1, joining / rows)  # few that run do not hold up many that could
            wanted = crowd * STALL * _between(known, rows) / self.token_seconds
            budget = int(min(CHUNK, max(LEAST_CHUNK, wanted)))
        return budget, min(CHUNK, ENDING * budget)

    def _adapt(self, seconds: float, tokens: int) -> None:
        """Note how long a step took in which all rows decoded and tokens of a prompt were read."""
        rows, known = len(self.rows), self.decode_seconds
        if not tokens:
            known[rows] = 0.7 * known.get(rows, seconds) + 0.3 * seconds
        elif known and tokens >= LEAST_CHUNK:  # a prompt's short rest costs more a token
            alone = _between(known, rows)
            each = max(seconds - alone, 0.1 * alone) / tokens
            self.token_seconds = 0.7 * (self.token_seconds or each) + 0.3 * each

    def _place_rows(self, changed: list[Sequence]) -> None:
        """Tell the runner who is in which row, and hold the rows' parameters as tensors while they stay the same."""
        running, placed = self.scheduler.running, self.rows
        changed = set(changed)
        same = len(running) == len(placed) and all(a is b for a, b in zip(running, placed, strict=True))
        for row, sequence in enumerate(running):
            if sequence in changed or row >= len(placed) or placed[row] is not sequence:
                self.runner.place(row, sequence.table)
        if not same:
            self.rows = list(running)
            self.controls = Controls([s.params for s in running], self.config.vocab_size, self.runner.device)
            self.seen = self._seen(running) if self.controls.penalizes else None

    def _seen(self, sequences: list[Sequence]) -> torch.Tensor:
        seen = torch.zeros(len(sequences), self.config.vocab_size, dtype=torch.bool)
        for row, sequence in zip(seen, sequences, strict=True):
            row[sequence.ids] = True
        return seen.to(self.runner.device)

    def _choose(self, logits: torch.Tensor, drawn: torch.Tensor, sequences: list[Sequence], controls, seen) -> None:
        """Give each sequence its next token: tool output that is due, else one sampled from its row of logits, which is
        the drawn one unless parameters ask for more."""
        if not controls.plain:
            keys = np.array([s.key for s in sequences], dtype=np.uint64)
            drawn = sample(logits, controls, keys, seen)
        tokens = drawn.tolist()
        for row, sequence in enumerate(sequences):
            if sequence.forced:
                tokens[row] = sequence.forced[0]
        self._note_logprobs(logits, sequences, tokens)
        if seen is not None:
            seen[torch.arange(len(tokens)), tokens] = True
        for sequence, token in zip(sequences, tokens, strict=True):
            self._append(sequence, token)
        self.counts["generated_tokens"] += len(tokens)

    def _note_logprobs(self, logits: torch.Tensor, sequences: list[Sequence], tokens: list[int]) -> None:
        asked = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
        if asked:
            most = min(max(sequences[row].params.logprobs for row in asked), logits.size(-1))
            for row, (own, likeliest) in zip(
                asked, logprobs(logits[asked], [tokens[row] for row in asked], most), strict=True
            ):
                if tokens[row] not in self.stop:
                    sequences[row].logprobs.append((own, likeliest[: sequences[row].params.logprobs]))

    def _append(self, sequence: Sequence, token: int) -> None:
        if token in self.stop and not sequence.forced:
            return self._end(sequence, "stop")
        sequence.ids.append(token)
        sequence.mask.append(0 if sequence.forced else 1)
        if sequence.forced:
            sequence.forced.popleft()
        if self.special:
            self._use_tool(sequence, token)
        if sequence.answer:
            sequence.answer.push(token)
            if sequence.answer.stopped:
                return self._end(sequence, "stop")
        if sequence.generated == sequence.max_tokens:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.scheduler.drop(sequence)

    def _use_tool(self, sequence: Sequence, token: int) -> None:
        """On python_end, queue the calculator's answer; code without one is left without output."""
        if token == self.special["python_start"]:
            sequence.code_start = len(sequence.ids)
        elif token == self.special["python_end"] and sequence.code_start is not None:
            result = calculate(self.tokenizer.decode(sequence.ids[sequence.code_start : -1]))
            sequence.code_start = None
            if result is not None:
                output = self.tokenizer.encode(result)
                sequence.forced.extend([self.special["output_start"], *output, self.special["output_end"]])


def _between(known: dict[int, float], at: int) -> float:
    """Linearly between what is known, and the nearest beyond it."""
    places = sorted(known)
    return float(np.interp(at, places, [known[place] for place in places]))
