"""Continuous batching: sequences join and leave between steps; a step decodes a batch and reads parts of prompts.

Results do not depend on who else is in the batch, but for rounding.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

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
    sample_and_tell,
)
from nanochat_ray.inference.scheduler import Scheduler
from nanochat_ray.inference.sequence import Completion, Sequence
from nanochat_ray.inference.text import AnswerStream
from nanochat_ray.inference.tools import calculate
from nanochat_ray.model.gpt import ROTARY_REACH

CHUNK = 512  # most tokens of prompts in a step
# The same on a GPU: alone, and beside sequences that decode, which wait for it. Fewer would leave the GPU idle between
# kernels.
GPU_CHUNK, GPU_CHUNK_BESIDE_ROWS = 8192, 2048
LEAST_CHUNK = 12  # beside running sequences: so that a prompt is read at all, however slow the machine
STALL = 0.5  # of a decoding step's time: how much longer a step may become by a part of a prompt
ENDING = 3  # times that if prompts end in it
SCORED = 128  # tokens of prompts whose logits are there at a time


@dataclass(frozen=True)
class Launched:
    """A step on its way. Its first `rows` sequences decode, the others had their prompts read to the end."""

    sequences: list[Sequence]
    rows: int
    logits: torch.Tensor  # (sequences or more, V), valid until the next step is launched
    tokens: object  # tolist() waits for them
    began: float
    prompt_tokens: int
    needs_logits: bool  # whether any of the sequences does
    logprobs: object | None = None  # of what was drawn, if a sequence is for training; tolist() waits for them


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
        self.runner = runner_of(model)(model, self.manager, max_batch_size)
        self.config, self.tokenizer, self.chunk = config, tokenizer, chunk
        names = ("assistant_end", "python_start", "python_end", "output_start", "output_end")
        self.special = {name: tokenizer.special(f"<|{name}|>") for name in names} if tokenizer else {}
        self.stop = {self.special["assistant_end"], tokenizer.bos_id} if tokenizer else set()
        self.watched = {NO_TOKEN, *self.stop, *self.special.values()}  # tokens that are more than a part of the answer
        self.grammars = Grammars(tokenizer, config.vocab_size) if tokenizer else None
        self.rows: list[Sequence] = []  # whose tables the runner has, row by row
        self.controls = Controls([], config.vocab_size, self.runner.device)
        self.changed: set[Sequence] = set()  # their tables changed since the runner was told
        self.in_flight: Launched | None = None  # on a GPU, the step before the one that is launched next
        self.decode_seconds: dict[int, float] = {}  # of a decoding step, by its rows
        self.token_seconds = 0.0  # that each token of a prompt makes a step longer
        self.arrivals = 0
        self.counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def compile(self) -> None:
        """Make steps several times as fast.

        On a CPU by torch.compile, a minute or two; it may run in a thread beside the one that steps, which goes on
        uncompiled until it is done. On a GPU by CUDA graphs, seconds, and not while another thread steps.
        """
        self.runner.compile()
        self.decode_seconds = {}  # what uncompiled steps took; the thread that steps may hold the old ones for one more

    def refresh_weights(self, model) -> None:
        """Take the weights of the engine's model as they are now, and forget what the cache knows by the old ones.

        Raises RuntimeError while there are sequences. A compiled engine on CPUs, whose code holds the weights, goes on
        uncompiled.
        """
        if self.busy:
            raise RuntimeError("an engine takes new weights when all its sequences have ended")
        self.runner.refresh_weights(model)
        self.manager.forget()

    def submit(self, prompt: list[int], params: SamplingParams) -> list[Sequence]:
        """Queue params.n sequences that go on from the prompt; step() moves them on.

        max_tokens is cut where the model's reach or the room for keys and values ends. Raises ValueError for a prompt
        that is empty, too long, or holds ids outside the vocabulary, for a bias of such ids, for stop strings or a
        grammar without a tokenizer, and for a grammar that is wrong.
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
            scores = [None] if scored and i == 0 else None
            arrival = self.arrivals + i
            sequences.append(Sequence(list(prompt), params, i, most, answer, matcher, scores, arrival=arrival))
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
        return bool(self.scheduler.waiting or self.scheduler.running or self.in_flight)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One forward: the next token of every running sequence, and beside them as much of the next prompts as the
        budget allows; those whose prompts end join. Returns those that moved on.

        On a GPU the forward is only launched, and its tokens are taken in at the next step, while the GPU runs that
        one. A sequence that ends has then been read once more, for nothing. Sequences whose logits the host needs are
        not launched ahead.
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
        rows, chunks = self.rows, scheduler.next_chunks(*self._chunk_budget())
        if not rows and not chunks:
            return None
        joining = [sequence for sequence, end in chunks if end == len(sequence.ids)]
        sequences = [*rows, *joining]
        needs_logits = any(sequence.needs_logits for sequence in sequences)
        matchers = [sequence.matcher for sequence in sequences] if needs_logits else []
        allowed = self.grammars.allowed(matchers) if any(matchers) else None  # found while the forward runs
        logits, drawn = self.runner.run(rows, chunks)
        self._score_prompts(chunks)
        prompt_tokens = 0
        for sequence, end in chunks:
            prompt_tokens += end - sequence.table.length
            self.manager.advance(sequence.table, sequence.ids, end)
        told, logs = any(sequence.params.for_training for sequence in sequences), None
        if needs_logits or not self.runner.filters:
            drawn, logs = self._sample(logits, drawn, sequences, allowed, told)
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
        if told and logs is None:
            controls = self._controls([sequence.params for sequence in sequences])
            logs = drawn_logprobs(logits[: len(sequences)], drawn, controls)
        logs = self.runner.fetch(logs) if told else None
        return Launched(sequences, len(rows), logits, tokens, began, prompt_tokens, needs_logits, logs)

    def _collect(self, step: Launched) -> list[Sequence]:
        """Give each sequence of a step its next token: tool output that is due, else the one that was drawn."""
        tokens, moved, rows = step.tokens.tolist(), [], step.rows
        for slot, sequence in enumerate(step.sequences):
            sequence.in_flight -= 1
            if sequence.finish_reason is not None:  # it ended, or was cancelled, after the step was launched
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
            self._adapt(time.perf_counter() - step.began, step.prompt_tokens, step.rows)
        return [sequence for sequence, _ in moved]

    def generate(self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
        """params.n completions of each prompt, in the order of the prompts, a prompt's samples adjacent.

        params: of all prompts, or a list with those of each. Sequences beyond max_batch_size wait for a place. Raises
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
        if self.runner.runs_ahead:
            chunk = GPU_CHUNK_BESIDE_ROWS if self.rows else GPU_CHUNK
            return chunk, chunk
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

    def _adapt(self, seconds: float, tokens: int, rows: int) -> None:
        """Note how long a step took in which so many rows decoded and tokens of a prompt were read."""
        known = self.decode_seconds
        if not tokens:
            known[rows] = 0.7 * known.get(rows, seconds) + 0.3 * seconds
        elif known and tokens >= LEAST_CHUNK:  # a prompt's short rest costs more a token
            alone = _between(known, rows)
            each = max(seconds - alone, 0.1 * alone) / tokens
            self.token_seconds = 0.7 * (self.token_seconds or each) + 0.3 * each

    def _place_rows(self, changed: set[Sequence]) -> None:
        """Tell the runner who is in which row."""
        running, placed = self.scheduler.running, self.rows
        self.changed.clear()
        if changed or running != placed:
            for row, sequence in enumerate(running):
                if sequence in changed or row >= len(placed) or placed[row] is not sequence:
                    self.runner.place(row, sequence.table)
            self.rows = list(running)

    def _sample(
        self, logits: torch.Tensor, drawn: torch.Tensor, sequences: list[Sequence], allowed, told: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens that the runner drew, with those replaced that parameters or grammars are to change. If all were,
        and it is to be told, also the log probabilities that they were drawn with.

        Where a grammar allows the runner's token it is taken, else one is drawn of those that it allows: together that
        is as likely as drawing once among those, and costs less.
        """
        filters, mask, chosen, keys = self.runner.filters, None, [], []
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
        told = told and len(chosen) == len(sequences)
        tokens, logs = sample_and_tell(picked, controls, np.array(keys, dtype=np.uint64), told)
        drawn[chosen] = tokens.to(drawn.dtype)
        return drawn, logs

    def _controls(self, params: list[SamplingParams]) -> Controls:
        """Of a step's rows; those of the last step are taken again when nothing has changed."""
        if self.controls.rows != params:
            self.controls = Controls(params, self.config.vocab_size, self.runner.device)
        return self.controls

    def _score_prompts(self, chunks: list[tuple[Sequence, int]]) -> None:
        """Note the log probabilities of prompts' tokens, after those that this step has read."""
        wanted, place = [], len(self.rows)
        for sequence, end in chunks:
            start = sequence.table.length
            if sequence.prompt_logprobs is not None:
                first = max(start, len(sequence.prompt_logprobs) - 1)
                last = min(end, sequence.prompt_len - 1)
                wanted += [(sequence, place + at - start, sequence.ids[at + 1]) for at in range(first, last)]
            place += end - start
        for i in range(0, len(wanted), SCORED):
            sequences, places, tokens = zip(*wanted[i : i + SCORED], strict=True)
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
            most = min(max(sequences[row].params.logprobs for row in asked), logits.size(-1))
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
            wrong = sequence.matcher and sequence.matcher.get_error()
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
            if sequence.matcher.is_stopped():  # it is complete, and nothing may follow
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
        """On python_end, queue the calculator's answer; code without one is left without output."""
        if token == self.special["python_start"]:
            sequence.code_start = len(sequence.ids)
        elif token == self.special["python_end"] and sequence.code_start is not None:
            result = calculate(self.tokenizer.decode(sequence.ids[sequence.code_start : -1]))
            sequence.code_start = None
            if result is not None:
                output = self.tokenizer.encode(result)
                sequence.forced.extend([self.special["output_start"], *output, self.special["output_end"]])


def runner_of(model):
    """The class that runs the model on its device."""
    if model.cos.device.type != "cuda":
        return ModelRunner
    from nanochat_ray.inference.gpu_runner import GPURunner  # needs Triton, which only a GPU's torch brings

    return GPURunner


def _between(known: dict[int, float], at: int) -> float:
    """Linearly between what is known, and the nearest beyond it."""
    places = sorted(known)
    return float(np.interp(at, places, [known[place] for place in places]))
