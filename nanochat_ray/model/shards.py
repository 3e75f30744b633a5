"""Decides which rank updates which parameters, and sends gradients and weights between the ranks.

Each rank owns a piece of every shard: rows of a table, or whole matrices of a bucket of neighboring layers. All pieces
of a shard have the same length, so that one reduce-scatter and one all-gather move it.
"""

import heapq
import math
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

MIN_SHARDED = 1024  # elements; smaller tensors are all-reduced, because splitting them would cost more than it saves
MIN_BUCKET_BYTES = 2**25  # bytes of gradients; many small messages would wait for each other
# Relative cost of sending that the backward does not hide, for a bucket with all gradients. The bucket of the first
# layers is sent last and costs twice as much.
UNHIDDEN_COST = 0.05


def make_shards(groups: list[dict], rank: int, world_size: int, read_dtype: torch.dtype) -> list["Matrices | Table"]:
    """Return the shards of an optimizer's groups, in the order in which a backward computes their gradients.

    read_dtype: in which the forward multiplies fp32 weights. The copies for other ranks are sent in it.
    """
    shards, matrices, muon = [], {}, {}
    for group in groups:
        named = dict(zip(group["param_names"], group["params"], strict=True))
        if group["kind"] == "muon":  # there is one group per shape
            matrices |= named
            muon[group["params"][0].shape] = group
        else:
            shards += [Table(group, name, p, rank, world_size, read_dtype) for name, p in named.items()]
    shards += [Matrices(muon, pieces, rank, read_dtype) for pieces in split_matrices(matrices, world_size)]
    return sorted(shards, key=lambda shard: (-shard.layer, not isinstance(shard, Matrices), shard.replicated))


def layer_of(name: str) -> float:
    """Return the layer of the forward that reads a parameter first. It is inf for the head and 0 for all others."""
    if match := re.search(r"(?:^|\.)(?:h|value_embeds)\.(\d+)\.", name):
        return int(match[1])
    return math.inf if name.startswith("lm_head.") else 0


def split_matrices(named: dict[str, torch.Tensor], world_size: int) -> list[list[dict[str, torch.Tensor]]]:
    """Split matrices into buckets of neighboring layers. Returns for each bucket the matrices of each rank.

    A single rank has one bucket per shape, because it updates matrices of one shape together.

    More of a small bucket's sending is hidden behind the backward. But matrices are owned whole: in a small bucket some
    ranks may own less than others, and all ranks send as much as the one that owns most. The cost weighs both. Dynamic
    programming over the ends of the buckets finds the split with the lowest cost.
    """
    if world_size == 1:
        shapes = sorted({p.shape for p in named.values()})
        return [[{name: p for name, p in named.items() if p.shape == shape}] for shape in shapes]
    names = sorted(named, key=layer_of)
    sizes = [named[name].numel() for name in names]
    total, least = sum(sizes), MIN_BUCKET_BYTES // next(iter(named.values())).itemsize

    def cost(start: int, stop: int) -> float:
        size = sum(sizes[start:stop])
        if size < least and (start, stop) != (0, len(names)):
            return math.inf
        unhidden = UNHIDDEN_COST * size / total * (1 if start else 2)  # the first layers' gradients come last
        return world_size * _assign(tuple(sizes[start:stop]), world_size)[1] * (1 + unhidden)

    best: list[tuple[float, list[int]]] = [(0.0, [0])]  # for the first n matrices: lowest cost, ends of buckets
    for stop in range(1, len(names) + 1):
        choices = [(best[start][0] + cost(start, stop), [*best[start][1], stop]) for start in range(stop)]
        best.append(min(choices))
    buckets = []
    for start, stop in pairwise(best[-1][1]):
        pieces, _ = _assign(tuple(sizes[start:stop]), world_size)
        buckets.append([{names[start + i]: named[names[start + i]] for i in piece} for piece in pieces])
    return buckets


@lru_cache(maxsize=4096)
def _assign(sizes: tuple[int, ...], world_size: int) -> tuple[list[list[int]], int]:
    """Assign matrices to ranks: from the largest on, each goes to the rank with the fewest elements so far.

    Returns the indices of each rank's matrices, and the elements of the rank that owns most.
    """
    pieces, ranks = [[] for _ in range(world_size)], [(0, rank) for rank in range(world_size)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size, rank = ranks[0]
        pieces[rank].append(i)
        heapq.heapreplace(ranks, (size + sizes[i], rank))
    return pieces, max(ranks)[0]


class Shard:
    """Parameters that are sent together. Each rank updates the piece that it owns, in place."""

    replicated = False  # True: every rank owns all of it and makes the same update

    def __init__(self, params: dict[str, torch.Tensor], rank: int, world_size: int, read_dtype: torch.dtype):
        self.params, self.rank, self.world_size = params, rank, world_size
        self.layer = min(map(layer_of, params))
        self.dtype = next(iter(params.values())).dtype
        self.read_dtype = read_dtype if self.dtype == torch.float32 else self.dtype
        self.shapes = [[view.shape for view in self.views(list(params.values()), r)] for r in range(world_size)]
        self.length = max(sum(map(math.prod, shapes)) for shapes in self.shapes)  # elements of a piece
        self.waiting_for: set[torch.Tensor] = set()  # parameters whose gradients the backward has not computed yet
        # The collective that runs now, the tensors that it sends, and the one that it fills. Else None.
        self.work: Any = None
        self.sent: Any = None
        self.received: Any = None

    def views(self, tensors: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """Return a rank's piece of tensors that are shaped like the parameters."""
        raise NotImplementedError

    def owned(self) -> list[torch.Tensor]:
        return self.views([p.detach() for p in self.params.values()], self.rank)

    def bytes_sent(self) -> tuple[int, int]:
        """Return the bytes that each rank sends to the next one in a ring: of gradients, and of weights."""
        others = self.length * (self.world_size - 1)
        if self.replicated:
            return 2 * others // self.world_size * self.dtype.itemsize, 0
        return others * self.dtype.itemsize, others * self.read_dtype.itemsize

    def start_reduce(self) -> None:
        """Start to send each owner its part of the gradients, and set them to None.

        Raises RuntimeError if a gradient is missing.
        """
        if missing := [name for name, p in self.params.items() if p.grad is None]:
            raise RuntimeError(f"no gradient for {missing[0]}: call backward before step")
        gradients: list = [p.grad for p in self.params.values()]
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
        else:  # gloo's reduce-scatter sends twice as much: it reduces everything on every rank
            self.received = torch.empty_like(self.sent)
            self.work = dist.all_to_all_single(self.received, self.sent, async_op=True)

    def finish_reduce(self) -> list[torch.Tensor]:
        """Wait for the gradients. Returns the mean gradient of each view that this rank owns."""
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
        """Start to send what this rank owns to all others, by default in the dtype in which the forward reads it."""
        if self.world_size == 1 or self.replicated:
            return
        piece = torch.cat(self._piece([p.detach() for p in self.params.values()], self.rank))
        self.sent = piece.to(dtype or self.read_dtype)
        self.received = self.sent.new_empty(self.world_size * self.length)
        self.work = dist.all_gather_into_tensor(self.received, self.sent, async_op=True)

    def finish_gather(self) -> None:
        """Wait for what others own and store it. What this rank owns is kept, unrounded."""
        if self.work is None:
            return
        self.work.wait()
        params, pieces = [p.detach() for p in self.params.values()], self.received.view(self.world_size, -1)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        arrived = [part for rank in others for part in self._parts(pieces[rank], rank)]
        torch._foreach_copy_([view for rank in others for view in self.views(params, rank)], arrived)
        self.work = self.sent = self.received = None

    def _piece(self, tensors: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """Return a rank's piece as flat tensors, the last of which is zeros that pad it to the common length."""
        views = [view.reshape(-1) for view in self.views(tensors, rank)]
        return [*views, tensors[0].new_zeros(self.length - sum(map(len, views)))]

    def _parts(self, piece: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """Return the views in a flat piece, without the padding."""
        sizes = [math.prod(shape) for shape in self.shapes[rank]]
        parts = piece[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes[rank], strict=True)]


class Table(Shard):
    """A tensor that AdamW updates, split by rows. A small tensor is whole on every rank."""

    def __init__(self, group: dict, name: str, p: torch.Tensor, rank: int, world_size: int, read_dtype):
        self.group, self.name, self.replicated = group, name, p.numel() < MIN_SHARDED
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
        """Return this rank's part for MuonAdamW.shard_state(). Only rank 0 returns what is the same on all ranks."""
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
    """A bucket of Muon's matrices. Each has one owner, which updates its matrices of one shape together."""

    def __init__(self, groups: dict[torch.Size, dict], pieces: list[dict[str, torch.Tensor]], rank: int, read_dtype):
        params = {name: p for piece in pieces for name, p in piece.items()}
        positions = {name: i for i, name in enumerate(params)}
        self.positions = [[positions[name] for name in piece] for piece in pieces]
        super().__init__(params, rank, len(pieces), read_dtype)
        self.names, shapes = list(pieces[rank]), self.shapes[rank]
        # For each shape: the indices of this rank's matrices, the group with their learning rate, and their state.
        self.stacks = [[i for i, other in enumerate(shapes) if other == shape] for shape in sorted(set(shapes))]
        self.groups = [groups[shapes[stack[0]]] for stack in self.stacks]
        self.state = [self._state(len(stack), *shapes[stack[0]]) for stack in self.stacks]

    def _state(self, n: int, r: int, c: int) -> dict[str, torch.Tensor]:
        zeros = next(iter(self.params.values())).detach().new_zeros
        return {"momentum_buffer": zeros(n, r, c), "second_moment": zeros((n, r, 1) if r >= c else (n, 1, c))}

    def views(self, tensors, rank):
        return [tensors[i] for i in self.positions[rank]]

    def export(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Return this rank's part for MuonAdamW.shard_state()."""
        return {
            f"{self.names[i]}|{key}": (0, part)
            for stack, state in zip(self.stacks, self.state, strict=True)
            for key, value in state.items()
            for i, part in zip(stack, value, strict=True)
        }

    def load(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        for key, (_, value) in self.export().items():
            value.copy_(read(key, 0, len(value)))
