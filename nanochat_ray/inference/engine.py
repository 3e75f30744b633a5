"""Continuous batching with chunked prefill. Sequences join and leave between steps.

A step decodes one token of each running sequence and prefills parts of waiting prompts. Up to rounding, the result of a
sequence does not depend on the others in its batch.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat_ray.inference.grammar import Grammars
from nanochat_ray.inference.kv_cache import PAGE, BlockManager, cache_bytes, page_bytes
from nanochat_ray.inference.model_runner import ModelRunner
from nanochat_ray.inference.sampling import (
    NO_TOKEN,
    Controls,
    SamplingParams,
    drawn_logprobs,
    logprobs,
    penalize,
    sample_with_logprobs,
)
from nanochat_ray.inference.scheduler import Scheduler
from nanochat_ray.inference.sequence import Completion, Sequence
from nanochat_ray.inference.text import AnswerStream
from nanochat_ray.inference.tools import calculate
from nanochat_ray.model.gpt import ROTARY_REACH

MAX_PREFILL_TOKENS = 512  # per step on a CPU
# Per step on a GPU: without and with running sequences, which wait for the prefill. Smaller values leave the GPU idle
# between kernels.
GPU_MAX_PREFILL_TOKENS, GPU_MAX_PREFILL_TOKENS_BESIDE_DECODE = 8192, 2048
MIN_PREFILL_TOKENS = 12  # per step beside running sequences, so that slow machines prefill at all
PREFILL_SLOWDOWN = 0.5  # a prefill chunk may lengthen a decode step by half
FINISHING_FACTOR = 3  # it may lengthen the step by three times that if prompts finish in it
SCORING_BATCH = 128  # prompt tokens whose logits are in memory at once


@dataclass(frozen=True)
class Launched:
    """A step in flight. Its first `rows` sequences decode; the prompts of the others end in this step."""

    sequences: list[Sequence]
    rows: int
    logits: torch.Tensor  # (sequences or more, V), valid until the next step is launched
    tokens: Any  # the sampled tokens; tolist() waits for the device
    began: float
    prompt_tokens: int
    needs_logits: bool  # whether the host needs the logits of a sequence
    logprobs: Any = None  # of the sampled tokens, if a sequence is for training; tolist() waits


class Engine:
    """Generates up to max_batch_size sequences at once.

    Without a tokenizer, sequences end by their length alone and no tool is called. kv_bytes: memory of the KV cache.
    The default holds max_batch_size sequences of the model's sequence_len, or one of the longest that rotary positions
    reach. chunk: prompt tokens to prefill per step. By default it adapts, so that prefill slows decoding by at most
    half.
    """

    def __init__(
        self,
        model,
        tokenizer: Any = None,
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
        self.runner = runner_of(model)(model, self.manager, max_batch_size)
        self.config, self.tokenizer, self.chunk = config, tokenizer, chunk
        names = ("assistant_end", "python_start", "python_end", "output_start", "output_end")
        self.special = {name: tokenizer.special(f"<|{name}|>") for name in names} if tokenizer else {}
        self.stop = {self.special["assistant_end"], tokenizer.bos_id} if tokenizer else set()
        self.watched = {NO_TOKEN, *self.stop, *self.special.values()}  # tokens that _append has to look at
        self.grammars: Any = Grammars(tokenizer, config.vocab_size) if tokenizer else None
        self.rows: list[Sequence] = []  # the sequence in each row of the runner
        self.controls = Controls([], config.vocab_size, self.runner.device)
        self.changed: set[Sequence] = set()  # their tables changed after the runner got them
        self.in_flight: Launched | None = None  # on a GPU, the step that was launched last
        self.decode_seconds: dict[int, float] = {}  # time of a decode step, by its number of rows
        self.prefill_seconds_per_token = 0.0
        self.arrivals = 0
        self.counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def compile(self) -> None:
        """Make steps several times as fast.

        On a CPU this runs torch.compile for one or two minutes. It may run in a second thread: the thread that steps
        goes on uncompiled meanwhile. On a GPU it captures CUDA graphs in seconds, and no thread may step meanwhile.
        """
        self.runner.compile()
        self.decode_seconds = {}  # reset: timings of uncompiled steps no longer apply

    def compile_attention(self) -> None:
        """Compile the attention alone, on CPUs. It takes 10 s at most, and outlives refresh_weights."""
        self.runner.compile_attention()

    def refresh_weights(self, model) -> None:
        """Copy the weights of `model` into the engine, and clear the prefix cache of the old weights.

        Raises RuntimeError while there are sequences. On CPUs compiled code contains the weights, so a compiled engine
        goes on uncompiled.
        """
        if self.busy:
            raise RuntimeError("the engine has sequences: it takes new weights only when all of them have ended")
        self.runner.refresh_weights(model)
        self.manager.forget()

    def submit(self, prompt: list[int], params: SamplingParams) -> list[Sequence]:
        """Queue params.n sequences that continue the prompt. Each step() advances them.

        max_tokens is clamped to what the rotary positions and the KV cache allow. Raises ValueError for a prompt that
        is empty, too long, or has ids outside the vocabulary, for a logit_bias of such ids, for stop strings or a
        grammar without a tokenizer, and for an invalid grammar.
        """
        capacity, vocab_size = self.manager.capacity, self.config.vocab_size
        if not prompt:
            raise ValueError("a prompt is empty; it needs at least one token, such as bos")
        if len(prompt) >= capacity:
            limit = "the model's reach" if capacity == ROTARY_REACH * self.config.sequence_len else "the cache's room"
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room within {limit} of {capacity}")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"a prompt holds token ids outside 0 … {vocab_size - 1}")
        if any(not 0 <= token < vocab_size for token, _ in params.logit_bias):
            raise ValueError(f"logit_bias holds token ids outside 0 … {vocab_size - 1}")
        if (params.stop or params.grammar) and self.tokenizer is None:
            raise ValueError("stop strings and grammars need a tokenizer")
        sequences, scored = [], params.prompt_logprobs is not None
        most = min(params.max_tokens, capacity - len(prompt))
        for i in range(params.n):
            answer = AnswerStream(self.tokenizer, params.stop) if params.stop else None
            matcher = self.grammars.matcher(params.grammar) if params.grammar else None
            scores: list | None = [None] if scored and i == 0 else None
            arrival = self.arrivals + i
            sequences.append(Sequence(list(prompt), params, i, most, answer, matcher, scores, arrival=arrival))
        self.arrivals += params.n
        self.scheduler.waiting.extend(sequences)
        self.counts["requests"] += 1
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence where it is. Call it between steps; the memory is free at once."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self.scheduler.drop(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self.in_flight)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Run one forward. Returns the sequences that got a token.

        It decodes the next token of every running sequence and prefills as much of the waiting prompts as the budget
        allows. Prompts that end in this step join the batch.
        On a GPU this only launches the forward. The next step collects its tokens while the GPU runs that step. So a
        sequence that ends is computed once too often. Steps whose logits the host needs are collected at once.
        """
        launched = self._launch()
        moved = self._collect(self.in_flight) if self.in_flight else []
        self.in_flight = launched
        if launched and (not self.runner.runs_ahead or launched.needs_logits):
            moved += self._collect(launched)
            self.in_flight = None
        return moved

    def _launch(self) -> Launched | None:
        scheduler, began = self.scheduler, time.perf_counter()
        self._place_rows(self.changed.union(scheduler.make_room()))
        rows, chunks = self.rows, scheduler.next_chunks(*self._prefill_budget())
        if not rows and not chunks:
            return None
        joining = [sequence for sequence, end in chunks if end == len(sequence.ids)]
        sequences = [*rows, *joining]
        needs_logits = any(sequence.needs_logits for sequence in sequences)
        matchers = [sequence.matcher for sequence in sequences] if needs_logits else []
        allowed = self.grammars.allowed(matchers) if any(matchers) else None  # computed while the forward runs
        logits, drawn = self.runner.run(rows, chunks)
        self._score_prompts(chunks)
        prompt_tokens = 0
        for sequence, end in chunks:
            prompt_tokens += end - sequence.table.length
            self.manager.advance(sequence.table, sequence.ids, end)
        for_training, logs = any(sequence.params.for_training for sequence in sequences), None
        if needs_logits or not self.runner.filters:
            drawn, logs = self._sample(logits, drawn, sequences, allowed, for_training)
        for sequence in joining:
            scheduler.start(sequence)
            if not sequence.generated:
                self.counts["prompt_tokens"] += sequence.prompt_len
                self.counts["cached_tokens"] += sequence.cached_tokens
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
            sequence.in_flight += 1
            if len(sequence.ids) + sequence.in_flight >= sequence.longest:
                scheduler.retire(sequence)
        drawn = drawn[: len(sequences)]
        tokens = self.runner.fetch(drawn)
        if for_training and logs is None:
            controls = self._controls([sequence.params for sequence in sequences])
            logs = drawn_logprobs(logits[: len(sequences)], drawn, controls)
        logs = self.runner.fetch(logs) if for_training else None
        return Launched(sequences, len(rows), logits, tokens, began, prompt_tokens, needs_logits, logs)

    def _collect(self, step: Launched) -> list[Sequence]:
        """Append to each sequence of a step its next token: pending tool output, else the sampled one."""
        tokens, moved, rows = step.tokens.tolist(), [], step.rows
        for slot, sequence in enumerate(step.sequences):
            sequence.in_flight -= 1
            if sequence.finish_reason is not None:  # ended or cancelled after the launch
                continue
            if sequence.forced:
                tokens[slot] = sequence.forced[0]
            if slot < rows and (table := sequence.table):
                table.length = len(sequence.ids)
                if table.length % PAGE == 0 and self.manager.advance(table, sequence.ids, table.length):
                    self.changed.add(sequence)
            moved.append((sequence, tokens[slot]))
        if step.needs_logits:
            self._note_logprobs(step.logits, step.sequences, tokens)
        if step.logprobs is not None:
            self._note_drawn(step)
        for sequence, token in moved:
            if sequence.plain and token not in self.watched and not sequence.forced:
                sequence.ids.append(token)
                sequence.mask.append(1)
                if len(sequence.ids) == sequence.longest:
                    self._end(sequence, "length")
            else:
                self._append(sequence, token)
        self.counts["generated_tokens"] += sum([sequence.max_tokens > 0 for sequence, _ in moved])
        if rows and not self.runner.runs_ahead:
            self._record_time(time.perf_counter() - step.began, step.prompt_tokens, step.rows)
        return [sequence for sequence, _ in moved]

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
        """params.n completions of each prompt, in the order of the prompts. The samples of a prompt are adjacent.

        params: one for all prompts, or a list with one for each. Sequences beyond max_batch_size wait for a row. Raises
        ValueError as submit does.
        """
        sequences = []
        try:
            of_each = params if isinstance(params, list) else [params] * len(prompts)
            for prompt, own in zip(prompts, of_each, strict=True):
                sequences += self.submit(prompt, own)
            while self.busy:
                self.step()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        """Yield the tokens of one completion as they come, tool output included. Raises as submit does."""
        sequence, *others = self.submit(prompt, params)
        for other in others:
            self.cancel(other)
        return self._follow(sequence)

    def _follow(self, sequence: Sequence) -> Iterator[int]:
        yielded = 0
        try:
            while yielded < sequence.generated or sequence.finish_reason is None:
                if yielded == sequence.generated:
                    self.step()
                else:
                    yield sequence.ids[sequence.prompt_len + yielded]
                    yielded += 1
        finally:
            self.cancel(sequence)

    def _prefill_budget(self) -> tuple[int, int]:
        """(prompt tokens to prefill in the next step, the limit if prompts finish in it).

        The budget lets prefill lengthen a decode step by PREFILL_SLOWDOWN. Prompts that finish may take
        FINISHING_FACTOR times as much, because a short rest would lengthen another step by more than it is worth.
        """
        if self.chunk is not None:
            return self.chunk, self.chunk
        if self.runner.runs_ahead:
            chunk = GPU_MAX_PREFILL_TOKENS_BESIDE_DECODE if self.rows else GPU_MAX_PREFILL_TOKENS
            return chunk, chunk
        if not self.rows:
            return MAX_PREFILL_TOKENS, MAX_PREFILL_TOKENS
        budget, known = 4 * MIN_PREFILL_TOKENS, self.decode_seconds
        if known and self.prefill_seconds_per_token:
            rows, scheduler = len(self.rows), self.scheduler
            joining = min(len(scheduler.waiting), scheduler.max_batch_size - rows)
            joining_per_row = max(1, joining / rows)  # a few running sequences must not hold up many waiting ones
            slowdown = joining_per_row * PREFILL_SLOWDOWN * _interpolate(known, rows)  # seconds
            wanted = slowdown / self.prefill_seconds_per_token
            budget = int(min(MAX_PREFILL_TOKENS, max(MIN_PREFILL_TOKENS, wanted)))
        return budget, min(MAX_PREFILL_TOKENS, FINISHING_FACTOR * budget)

    def _record_time(self, seconds: float, tokens: int, rows: int) -> None:
        """Update the moving averages with a step that decoded `rows` rows and prefilled `tokens` prompt tokens."""
        known = self.decode_seconds
        if not tokens:
            known[rows] = 0.7 * known.get(rows, seconds) + 0.3 * seconds
        elif known and tokens >= MIN_PREFILL_TOKENS:  # a shorter chunk costs more per token
            alone = _interpolate(known, rows)
            each = max(seconds - alone, 0.1 * alone) / tokens
            self.prefill_seconds_per_token = 0.7 * (self.prefill_seconds_per_token or each) + 0.3 * each

    def _place_rows(self, changed: set[Sequence]) -> None:
        """Tell the runner which sequence is in which row."""
        running, placed = self.scheduler.running, self.rows
        self.changed.clear()
        if changed or running != placed:
            for row, sequence in enumerate(running):
                if sequence in changed or row >= len(placed) or placed[row] is not sequence:
                    self.runner.place(row, sequence.table)
            self.rows = list(running)

    def _sample(
        self, logits: torch.Tensor, drawn: torch.Tensor, sequences: list[Sequence], allowed, for_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sampled tokens, with those sampled again that need parameters or a grammar that the runner lacks.

        If all are sampled again and for_training is set, it also returns their log probabilities.
        If a grammar allows the runner's token, it is kept; else one is sampled among the allowed tokens. Both ways
        together give the same distribution as sampling once among the allowed tokens, and cost less.
        """
        filters, chosen, keys = self.runner.filters, [], []
        mask: Any = None
        if allowed is not None:
            mask, tokens = allowed.result(), drawn.tolist()
        for i, sequence in enumerate(sequences):
            if sequence.params.penalizes or (sequence.params.filters and (not filters or sequence.matcher)):
                chosen.append(i)
                keys.append(sequence.key)
            elif sequence.matcher and tokens[i] != NO_TOKEN and not mask[i, tokens[i]]:
                chosen.append(i)
                keys.append(sequence.second_key)
        if not chosen:
            return drawn, None
        picked, params = logits[chosen], [sequences[i].params for i in chosen]
        if any(p.penalizes for p in params):
            penalize(picked, params, [(sequences[i].ids, sequences[i].prompt_len) for i in chosen])
        if mask is not None:
            picked.masked_fill_(~torch.from_numpy(mask[chosen]).to(picked.device), -math.inf)
        drawn = drawn.clone()
        controls = self._controls(params)
        with_logprobs = for_training and len(chosen) == len(sequences)
        tokens, logs = sample_with_logprobs(picked, controls, np.array(keys, dtype=np.uint64), with_logprobs)
        drawn[chosen] = tokens.to(drawn.dtype)
        return drawn, logs

    def _controls(self, params: list[SamplingParams]) -> Controls:
        """The sampling parameters of a step as tensors. The last ones are reused if nothing has changed."""
        if self.controls.rows != params:
            self.controls = Controls(params, self.config.vocab_size, self.runner.device)
        return self.controls

    def _score_prompts(self, chunks: list[tuple[Sequence, int]]) -> None:
        """Record the log probabilities of prompt tokens, for the positions that this step has prefilled."""
        wanted, place = [], len(self.rows)
        for sequence, end in chunks:
            start = sequence.table.length
            if sequence.prompt_logprobs is not None:
                first = max(start, len(sequence.prompt_logprobs) - 1)
                last = min(end, sequence.prompt_len - 1)
                wanted += [(sequence, place + at - start, sequence.ids[at + 1]) for at in range(first, last)]
            place += end - start
        for i in range(0, len(wanted), SCORING_BATCH):
            sequences, places, tokens = zip(*wanted[i : i + SCORING_BATCH], strict=True)
            most = max(s.params.prompt_logprobs for s in sequences)
            scores = logprobs(self.runner.logits_at(list(places)), list(tokens), min(most, self.config.vocab_size))
            for sequence, (own, likeliest) in zip(sequences, scores, strict=True):
                sequence.prompt_logprobs.append((own, likeliest[: sequence.params.prompt_logprobs]))

    def _note_drawn(self, step: Launched) -> None:
        for sequence, logprob in zip(step.sequences, step.logprobs.tolist(), strict=True):
            if sequence.drawn_logprobs is not None and sequence.finish_reason is None:
                sequence.drawn_logprobs.append(0.0 if sequence.forced else logprob)

    def _note_logprobs(self, logits: torch.Tensor, sequences: list[Sequence], tokens: list[int]) -> None:
        asked = [
            row
            for row, s in enumerate(sequences)
            if s.params.logprobs is not None and s.max_tokens and tokens[row] != NO_TOKEN
        ]
        if asked:
            most = min(max(sequences[row].params.logprobs for row in asked), logits.size(-1))  # ty: ignore[invalid-argument-type]
            for row, (own, likeliest) in zip(
                asked, logprobs(logits[asked], [tokens[row] for row in asked], most), strict=True
            ):
                sequence, token = sequences[row], tokens[row]
                noted = own, likeliest[: sequence.params.logprobs]
                if token in self.stop and not sequence.forced:
                    sequence.ending = token, noted
                else:
                    sequence.logprobs.append(noted)

    def _append(self, sequence: Sequence, token: int) -> None:
        if token == NO_TOKEN:
            wrong = sequence.matcher.get_error() if sequence.matcher else None
            return self._fail(sequence, wrong or "the model's output is not a number (NaN)")
        if sequence.max_tokens == 0:
            return self._end(sequence, "length")
        ends = token in self.stop and not sequence.forced
        if ends and not sequence.params.for_training:
            return self._end(sequence, "stop")
        sequence.ids.append(token)
        sequence.mask.append(0 if sequence.forced else 1)
        if sequence.forced:
            sequence.forced.popleft()
        if ends:
            return self._end(sequence, "stop")
        if self.special:
            self._use_tool(sequence, token)
        if sequence.answer:
            sequence.answer.push(token)
            if sequence.answer.stopped:
                return self._end(sequence, "stop")
        if sequence.matcher:
            if not sequence.matcher.consume_token(token):
                return self._fail(sequence, sequence.matcher.get_error())
            if sequence.matcher.is_stopped():  # the grammar is complete and allows no more tokens
                return self._end(sequence, "stop")
        if len(sequence.ids) == sequence.longest:
            self._end(sequence, "length")

    def _fail(self, sequence: Sequence, error: str) -> None:
        sequence.error = error.splitlines()[0]
        self._end(sequence, "error")

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.scheduler.drop(sequence)

    def _use_tool(self, sequence: Sequence, token: int) -> None:
        """On python_end, queue the output of the calculator. Code that it cannot evaluate gets no output."""
        if token == self.special["python_start"]:
            sequence.code_start = len(sequence.ids)
        elif token == self.special["python_end"] and sequence.code_start is not None:
            result = calculate(self.tokenizer.decode(sequence.ids[sequence.code_start : -1]))
            sequence.code_start = None
            if result is not None:
                output = self.tokenizer.encode(result)
                sequence.forced.extend([self.special["output_start"], *output, self.special["output_end"]])


def runner_of(model):
    """The runner class for the device of the model."""
    if model.cos.device.type != "cuda":
        return ModelRunner
    from nanochat_ray.inference.gpu_runner import GPURunner  # needs Triton, which only CUDA builds of torch bring

    return GPURunner


def _interpolate(known: dict[int, float], at: int) -> float:
    """Linear interpolation of known {x: y}; outside of them the nearest value."""
    places = sorted(known)
    return float(np.interp(at, places, [known[place] for place in places]))
