"""Decides which sequences to prefill, decode or preempt."""

from collections import deque
from itertools import islice

from nanochat_ray.inference.kv_cache import PAGE, BlockManager, CacheFull
from nanochat_ray.inference.sequence import Sequence

# Prefilling several prompts together is cheaper than one after another. When at least RUNNING_PER_WAITING sequences run
# per waiting prompt, the prompts wait up to MAX_DELAY steps for others to join them.
RUNNING_PER_WAITING, MAX_DELAY = 12, 2


class Scheduler:
    """Serves sequences in the order of arrival. The prompts at the head of `waiting` are prefilled first.

    A preempted sequence frees its pages and goes back to the head of `waiting`. Its prefill then starts over, but
    finds most of its blocks in the cache.
    """

    def __init__(self, manager: BlockManager, max_batch_size: int):
        self.manager, self.max_batch_size = manager, max_batch_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # sequences that decode, one per row of the batch
        self.retired: set[Sequence] = set()  # their last token is in flight; they hold their pages until it arrives
        self.preemptions = self.delayed_steps = 0

    def next_chunks(self, budget: int, most: int) -> list[tuple[Sequence, int]]:
        """(sequence, end) of each prompt to prefill in this step, from table.length to end. Reserves the pages.

        Takes prompts while they end within `most` tokens. The last one may be longer: it gets what is left of `budget`.
        """
        chunks = []
        if self._delays_prefill():
            return chunks
        for sequence in islice(self.waiting, self.max_batch_size - len(self.running)):
            if sequence.in_flight:  # preempted while a step was in flight: its last token is not known yet
                break
            end = self._next_chunk(sequence, budget, most, chunks)
            if end is None:
                break
            chunks.append((sequence, end))
            tokens = end - sequence.table.length
            budget, most = max(0, budget - tokens), most - tokens
            if end < len(sequence.ids) or most <= 0:
                break
        return chunks

    def _delays_prefill(self) -> bool:
        """Whether this step has no prefill, because few prompts wait and none of them has been started."""
        few = self.waiting and len(self.running) >= RUNNING_PER_WAITING * len(self.waiting)
        delays = few and self.waiting[0].table is None and self.delayed_steps < MAX_DELAY
        self.delayed_steps = self.delayed_steps + 1 if delays else 0
        return self.delayed_steps > 0

    def _next_chunk(self, sequence: Sequence, budget: int, most: int, others: list[tuple[Sequence, int]]) -> int | None:
        """The position up to which to prefill a sequence in this step. None if it has to wait."""
        alone = not self.running and not self.retired and not others
        if sequence.table is None:
            sequence.table = self.manager.open(sequence.ids, sequence.findable, sequence.params.cache_salt)
            too_long = not budget and len(sequence.ids) - sequence.table.length > most
            if too_long or not (alone or self._fits(sequence, len(others))) or _repeats(sequence, others):
                self._free(sequence)
                return None
            if not sequence.generated:
                sequence.cached_tokens = sequence.table.length
        start = sequence.table.length
        end = len(sequence.ids) if len(sequence.ids) - start <= most else start + budget
        try:
            self.manager.reserve(sequence.table, end)
        except CacheFull:
            if not alone:
                return None  # running sequences will free pages
            end = min(end, (start // PAGE + 1) * PAGE)
            self.manager.reserve(sequence.table, end)  # always fits: submit() limits the length of a single sequence
        return end

    def _fits(self, sequence: Sequence, others: int) -> bool:
        """Whether the free pages hold all of a sequence, and one more block for each sequence that runs or joins."""
        manager, missing = self.manager, 0
        blocks = len(sequence.ids) // PAGE + 1
        for window, layers, held in zip(manager.windows, manager.layers, sequence.table.blocks, strict=True):
            missing += (min(blocks, window // PAGE + 2) - len(held)) * len(layers)
        growth = (len(self.running) + others + 1) * sum(map(len, manager.layers))
        return missing + min(growth, manager.num_pages // 8) <= len(manager.free) + manager.unused_pages

    def start(self, sequence: Sequence) -> None:
        """Move the head of the queue into the batch, once all its tokens are prefilled."""
        head = self.waiting.popleft()
        assert head is sequence
        self.running.append(sequence)

    def make_room(self) -> list[Sequence]:
        """Reserve a place for the next token of every row. Returns the running sequences whose tables have changed.

        Preempts the youngest sequences when pages run out. A single sequence always fits: submit() limits its length.
        """
        changed = []
        growing = [s for s in self.running if len(s.ids) + s.in_flight > s.table.room]
        for sequence in sorted(growing, key=lambda s: s.arrival):
            while sequence.table is not None:
                try:
                    self.manager.reserve(sequence.table, sequence.length)
                    changed.append(sequence)
                    break
                except CacheFull:
                    self.preempt()
        return [sequence for sequence in changed if sequence.table is not None]

    def preempt(self) -> None:
        """Free the pages of the youngest sequence that holds some."""
        held = [s for s in self.running if s.table is not None] + [s for s in self.waiting if s.table is not None]
        youngest = max(held, key=lambda s: s.arrival)
        self._free(youngest)
        self.preemptions += 1
        if youngest in self.running:
            self._leave(youngest)
            self.waiting.appendleft(youngest)

    def retire(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch while its last token is in flight. drop() frees its pages later."""
        self._leave(sequence)
        self.retired.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended or was cancelled, and free its pages."""
        if sequence.table is not None:
            self._free(sequence)
        if sequence in self.retired:
            self.retired.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Remove a row of the batch. The last row moves to its place."""
        row, last = self.running.index(sequence), self.running.pop()
        if last is not sequence:
            self.running[row] = last

    def _free(self, sequence: Sequence) -> None:
        self.manager.close(sequence.table)
        sequence.table = None


def _repeats(sequence: Sequence, others: list[tuple[Sequence, int]]) -> bool:
    """Whether this step prefills the next block of a sequence for another one. After the step the cache has it."""
    end, salt = sequence.table.length + PAGE, sequence.params.cache_salt
    alike = (s for s, read in others if read >= end and s.params.cache_salt == salt)
    return end <= sequence.findable and any(s.ids[:end] == sequence.ids[:end] for s in alike)
