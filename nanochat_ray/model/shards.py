"""Which rank updates what, and how gradients and weights travel between the ranks.

Each rank owns a piece of every shard. All pieces of a shard have one length, so that it travels in one reduce-scatter
and one all-gather: rows of a table, or whole matrices of a bucket of neighboring layers.
"""

import heapq
import math
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist

SMALL = 1024  # tensors with fewer elements are all-reduced: splitting them would cost more than it saves
BUCKET_BYTES = 2**25  # of gradients at least: many small messages would wait for each other
UNHIDDEN = 0.05  # a bucket of everything costs so much more than small ones, as the backward is over when it is sent


def make_shards(groups: list[dict], rank: int, world_size: int, read_dtype: torch.dtype) -> list["Shard"]:
    """The shards of an optimizer's groups, in the order in which a backward has their gradients.

    read_dtype: what the forward multiplies fp32 weights in; the copies that go to other ranks need not be finer.
    """
    shards, matrices, muon = [], {}, {}
    for group in groups:
        named = dict(zip(group["param_names"], group["params"], strict=True))
        if group["kind"] == "muon":  # one for each shape
            matrices |= named
            muon[group["params"][0].shape] = group
        else:
            shards += [Table(group, name, p, rank, world_size, read_dtype) for name, p in named.items()]
    shards += [Matrices(muon, pieces, rank, read_dtype) for pieces in split_matrices(matrices, world_size)]
    return sorted(shards, key=lambda shard: (-shard.layer, not isinstance(shard, Matrices), shard.replicated))


def layer_of(name: str) -> float:
    """The layer of the forward that reads a parameter first; inf for the head, 0 for what comes before the layers."""
    if match := re.search(r"(?:^|\.)(?:h|value_embeds)\.(\d+)\.", name):
        return int(match[1])
    return math.inf if name.startswith("lm_head.") else 0


def split_matrices(named: dict[str, torch.Tensor], world_size: int) -> list[list[dict[str, torch.Tensor]]]:
    """Buckets of neighboring layers, each with the matrices of every rank. One rank has a bucket for each shape, as it
    updates matrices of one shape together.

    Small buckets hide more of what they send, but matrices are owned whole: in many a bucket some ranks would have
    less than others, and all send as much as the one that has most. The cost weighs both, and the best split is found
    by going through all ends of the last bucket, of the one before, and so on.
    """
    if world_size == 1:
        shapes = sorted({p.shape for p in named.values()})
        return [[{name: p for name, p in named.items() if p.shape == shape}] for shape in shapes]
    names = sorted(named, key=layer_of)
    sizes = [named[name].numel() for name in names]
    total, least = sum(sizes), BUCKET_BYTES // next(iter(named.values())).itemsize

    def cost(start: int, stop: int) -> float:
        size = sum(sizes[start:stop])
        if size < least and (start, stop) != (0, len(names)):
            return math.inf
        unhidden = UNHIDDEN * size / total * (1 if start else 2)  # the first layers' gradients come last of all
        return world_size * _share_out(tuple(sizes[start:stop]), world_size)[1] * (1 + unhidden)

    best: list[tuple[float, list[int]]] = [(0.0, [0])]  # for the first n matrices: the cost, and where buckets end
    for stop in range(1, len(names) + 1):
        choices = [(best[start][0] + cost(start, stop), [*best[start][1], stop]) for start in range(stop)]
        best.append(min(choices))
    buckets = []
    for start, stop in pairwise(best[-1][1]):
        pieces, _ = _share_out(tuple(sizes[start:stop]), world_size)
        buckets.append([{names[start + i]: named[names[start + i]] for i in piece} for piece in pieces])
    return buckets


@lru_cache(maxsize=4096)
def _share_out(sizes: tuple[int, ...], world_size: int) -> tuple[list[list[int]], int]:
    """Which of the matrices each rank owns, and the most elements that one has. The largest that is left goes to the
    rank that has least, again and again."""
    pieces, ranks = [[] for _ in range(world_size)], [(0, rank) for rank in range(world_size)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size, rank = ranks[0]
        pieces[rank].append(i)
        heapq.heapreplace(ranks, (size + sizes[i], rank))
    return pieces, max(ranks)[0]


class Shard:
    """Parameters that travel together. Owners update their pieces in place."""

    replicated = False  # True: every rank owns all of it, and updates it alike

    def __init__(self, params: dict[str, torch.Tensor], rank: int, world_size: int, read_dtype: torch.dtype):
        self.params, self.rank, self.world_size = params, rank, world_size
        self.layer = min(map(layer_of, params))
        self.dtype = next(iter(params.values())).dtype
        self.read_dtype = read_dtype if self.dtype == torch.float32 else self.dtype
        self.shapes = [[view.shape for view in self.views(list(params.values()), r)] for r in range(world_size)]
        self.length = max(sum(map(math.prod, shapes)) for shapes in self.shapes)  # elements of a piece
        self.waiting_for: set[torch.Tensor] = set()  # parameters that the running backward has no gradient of yet
        self.work = self.sent = self.received = None

    def views(self, tensors: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """A rank's piece of tensors shaped as the parameters."""
        raise NotImplementedError

    def owned(self) -> list[torch.Tensor]:
        return self.views([p.detach() for p in self.params.values()], self.rank)

    def bytes_sent(self) -> tuple[int, int]:
        """By each rank to the next of a ring: gradients, and weights."""
        others = self.length * (self.world_size - 1)
        if self.replicated:
            return 2 * others // self.world_size * self.dtype.itemsize, 0
        return others * self.dtype.itemsize, others * self.read_dtype.itemsize

    def start_reduce(self) -> None:
        """Send each owner its part of the gradients, which are None afterwards.

        Raises RuntimeError when one is missing.
        """
        if missing := [name for name, p in self.params.items() if p.grad is None]:
            raise RuntimeError(f"no gradient for {missing[0]}: call backward before step")
        gradients = [p.grad for p in self.params.values()]
        for p in self.params.values():
            p.grad = None
        self.sent = gradients
        if self.world_size == 1:
            return
        nccl = dist.get_backend() == "nccl"  # gloo has no mean
        if self.replicated:
            [self.received] = gradients
            self.work = dist.all_reduce(self.received, dist.ReduceOp.AVG if nccl else dist.ReduceOp.SUM, async_op=True)
            return
        self.sent = torch.cat([part for rank in range(self.world_size) for part in self._piece(gradients, rank)])
        if nccl:
            self.received = self.sent.new_empty(self.length)
            self.work = dist.reduce_scatter_tensor(self.received, self.sent, dist.ReduceOp.AVG, async_op=True)
        else:  # gloo's reduce-scatter sends twice as much: it reduces everything everywhere
            self.received = torch.empty_like(self.sent)
            self.work = dist.all_to_all_single(self.received, self.sent, async_op=True)

    def finish_reduce(self) -> list[torch.Tensor]:
        """The mean gradient of each view that this rank owns."""
        sent, mean, self.sent, self.received = self.sent, self.received, None, None
        if self.work is None:
            return self.views(sent, self.rank)
        self.work.wait()
        self.work = None
        if dist.get_backend() != "nccl":
            mean = mean if self.replicated else mean.view(self.world_size, -1).sum(0, dtype=torch.float32)
            mean = mean / self.world_size
        return self.views([mean], self.rank) if self.replicated else self._parts(mean, self.rank)

    def start_gather(self, dtype: torch.dtype | None = None) -> None:
        """Send what this rank owns to all others, by default in the dtype that the forward reads it in."""
        if self.world_size == 1 or self.replicated:
            return
        piece = torch.cat(self._piece([p.detach() for p in self.params.values()], self.rank))
        self.sent = piece.to(dtype or self.read_dtype)
        self.received = self.sent.new_empty(self.world_size * self.length)
        self.work = dist.all_gather_into_tensor(self.received, self.sent, async_op=True)

    def finish_gather(self) -> None:
        """Take what others own. What this rank owns stays, and may be finer than what it has sent."""
        if self.work is None:
            return
        self.work.wait()
        params, pieces = [p.detach() for p in self.params.values()], self.received.view(self.world_size, -1)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        arrived = [part for rank in others for part in self._parts(pieces[rank], rank)]
        torch._foreach_copy_([view for rank in others for view in self.views(params, rank)], arrived)
        self.work = self.sent = self.received = None

    def _piece(self, tensors: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """A rank's piece, flat, with the zeros that make all pieces equally long."""
        views = [view.reshape(-1) for view in self.views(tensors, rank)]
        return [*views, tensors[0].new_zeros(self.length - sum(map(len, views)))]

    def _parts(self, piece: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Its views again, without the zeros."""
        sizes = [math.prod(shape) for shape in self.shapes[rank]]
        parts = piece[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes[rank], strict=True)]


class Table(Shard):
    """One tensor of AdamW, shared out by rows; a small one is whole on every rank."""

    def __init__(self, group: dict, name: str, p: torch.Tensor, rank: int, world_size: int, read_dtype):
        self.group, self.name, self.replicated = group, name, p.numel() < SMALL
        self.rows = p.size(0) if self.replicated else math.ceil(p.size(0) / world_size)
        super().__init__({name: p}, rank, world_size, read_dtype)
        self.start = 0 if self.replicated else min(rank * self.rows, p.size(0))
        self.state = {
            "exp_avg": torch.zeros_like(self.owned()[0], dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(self.owned()[0], dtype=torch.float32),
            "step": torch.zeros(1),
        }

    def views(self, tensors, rank):
        start = 0 if self.replicated else rank * self.rows
        return [tensors[0][start : start + self.rows]]

    def export(self) -> dict[str, tuple[int, torch.Tensor]]:
        """For MuonAdamW.shard_state. What all ranks hold alike is rank 0's."""
        alike = self.state if self.replicated else ("step",)
        return {
            f"{self.name}|{key}": (0 if key in alike else self.start, value)
            for key, value in self.state.items()
            if self.rank == 0 or key not in alike
        }

    def load(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        for key, value in self.state.items():
            start = 0 if key == "step" else self.start
            if len(value):
                value.copy_(read(f"{self.name}|{key}", start, start + len(value)))


class Matrices(Shard):
    """A bucket of Muon's matrices, each whole with its owner, who updates those of one shape together."""

    def __init__(self, groups: dict[torch.Size, dict], pieces: list[dict[str, torch.Tensor]], rank: int, read_dtype):
        params = {name: p for piece in pieces for name, p in piece.items()}
        positions = {name: i for i, name in enumerate(params)}
        self.positions = [[positions[name] for name in piece] for piece in pieces]
        super().__init__(params, rank, len(pieces), read_dtype)
        self.names, shapes = list(pieces[rank]), self.shapes[rank]
        # By shape, which of this rank's matrices have it, and the group with their rates.
        self.stacks = [[i for i, other in enumerate(shapes) if other == shape] for shape in sorted(set(shapes))]
        self.groups = [groups[shapes[stack[0]]] for stack in self.stacks]
        self.state = [self._state(len(stack), *shapes[stack[0]]) for stack in self.stacks]

    def _state(self, n: int, r: int, c: int) -> dict[str, torch.Tensor]:
        zeros = next(iter(self.params.values())).detach().new_zeros
        return {"momentum_buffer": zeros(n, r, c), "second_moment": zeros((n, r, 1) if r >= c else (n, 1, c))}

    def views(self, tensors, rank):
        return [tensors[i] for i in self.positions[rank]]

    def export(self) -> dict[str, tuple[int, torch.Tensor]]:
        """For MuonAdamW.shard_state."""
        return {
            f"{self.names[i]}|{key}": (0, part)
            for stack, state in zip(self.stacks, self.state, strict=True)
            for key, value in state.items()
            for i, part in zip(stack, value, strict=True)
        }

    def load(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        for key, (_, value) in self.export().items():
            value.copy_(read(key, 0, len(value)))
