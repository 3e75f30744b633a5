"""Which sequences run, which wait, and which make way when the cache is full."""

from collections import deque
from itertools import islice

from nanochat_ray.inference.kv_cache import PAGE, BlockManager, CacheFull
from nanochat_ray.inference.sequence import Sequence

# Reading prompts together costs less than one after another. So where MANY run for each that waits, and little is lost
# by it, prompts wait for others to come, at most LINGER steps.
MANY, LINGER = 12, 2


class Scheduler:
    """Sequences are served in the order of arrival: the prompts at the head of `waiting` are being read.

    Preempting is giving up what a sequence has in the cache; it waits at the head and is computed again, mostly from
    blocks that can still be found.
    """

    def __init__(self, manager: BlockManager, max_batch_size: int):
        self.manager, self.max_batch_size = manager, max_batch_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the batch's rows
        self.retired: set[Sequence] = set()  # their last token is in flight; they hold pages until it is known
        self.preemptions = self.lingered = 0

    def next_chunks(self, budget: int, most: int) -> list[tuple[Sequence, int]]:
        """The sequences to read on, with room made for the tokens from table.length to the returned position: as many
        as end within `most` tokens, and of a longer one so many as those leave of budget."""
        chunks = []
        if self._linger():
            return chunks
        for sequence in islice(self.waiting, self.max_batch_size - len(self.running)):
            if sequence.in_flight:  # preempted while a step was on its way: its last token is not known yet
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

    def _linger(self) -> bool:
        """Let this step pass without a prompt, if few wait and none is half read. Returns whether it does."""
        few = bool(self.waiting) and len(self.running) >= MANY * len(self.waiting) and self.waiting[0].table is None
        self.lingered = self.lingered + 1 if few and self.lingered < LINGER else 0
        return self.lingered > 0

    def _next_chunk(self, sequence: Sequence, budget: int, most: int, others: list[tuple[Sequence, int]]) -> int | None:
        """Up to which position to read a sequence in this step, beside others, or None."""
        alone = not self.running and not self.retired and not others
        if sequence.table is None:
            sequence.table = self.manager.open(sequence.ids, sequence.findable, sequence.params.cache_salt)
            too_long = not budget and len(sequence.ids) - sequence.table.length > most
            if too_long or not (alone or self._fits(sequence, len(others))) or _repeats(sequence, others):
                self._give_up(sequence)
                return None
            if not sequence.generated:
                sequence.cached_tokens = sequence.table.length
        start = sequence.table.length
        end = len(sequence.ids) if len(sequence.ids) - start <= most else start + budget
        try:
            self.manager.reserve(sequence.table, end)
        except CacheFull:
            if not alone:
                return None  # those that run will free some
            end = min(end, (start // PAGE + 1) * PAGE)
            self.manager.reserve(sequence.table, end)  # alone it has room: its length was limited to that
        return end

    def _fits(self, sequence: Sequence, others: int) -> bool:
        """Whether all of a sequence has room now, with a block more to grow in for each that runs or joins."""
        manager, missing = self.manager, 0
        blocks = len(sequence.ids) // PAGE + 1
        for window, layers, held in zip(manager.windows, manager.layers, sequence.table.blocks, strict=True):
            missing += (min(blocks, window // PAGE + 2) - len(held)) * len(layers)
        growth = (len(self.running) + others + 1) * sum(map(len, manager.layers))
        return missing + min(growth, manager.num_pages // 8) <= len(manager.free) + manager.unused_pages

    def start(self, sequence: Sequence) -> None:
        """Let the head of the queue, whose ids are all read, join the batch."""
        head = self.waiting.popleft()
        assert head is sequence
        self.running.append(sequence)

    def make_room(self) -> list[Sequence]:
        """A place for the next token of every row; those that run and whose tables have changed.

        When there is none left the youngest makes way. A sequence alone always has room: its length was limited to it.
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
        """The youngest sequence that holds pages gives them up."""
        held = [s for s in self.running if s.table is not None] + [s for s in self.waiting if s.table is not None]
        youngest = max(held, key=lambda s: s.arrival)
        self._give_up(youngest)
        self.preemptions += 1
        if youngest in self.running:
            self._leave(youngest)
            self.waiting.appendleft(youngest)

    def retire(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch whose last token is on its way. drop() gives up what it holds."""
        self._leave(sequence)
        self.retired.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended or was cancelled."""
        if sequence.table is not None:
            self._give_up(sequence)
        if sequence in self.retired:
            self.retired.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Drop a row of the batch; the last one takes its place."""
        row, last = self.running.index(sequence), self.running.pop()
        if last is not sequence:
            self.running[row] = last

    def _give_up(self, sequence: Sequence) -> None:
        self.manager.close(sequence.table)
        sequence.table = None


def _repeats(sequence: Sequence, others: list[tuple[Sequence, int]]) -> bool:
    """Whether the next block that a sequence lacks is being read for another: after this step it can be found."""
    end, salt = sequence.table.length + PAGE, sequence.params.cache_salt
    alike = (s for s, read in others if read >= end and s.params.cache_salt == salt)
    return end <= sequence.findable and any(s.ids[:end] == sequence.ids[:end] for s in alike)
