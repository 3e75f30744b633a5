"""Runs the model over the paged KV cache on CPUs: packed weights, attention over pages, and a batch's inputs."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from nanochat_ray.inference.kv_cache import NULL_PAGE, PAGE, BlockManager, BlockTable, pages_of
from nanochat_ray.inference.paged_attention import build_paged_attention, paged_attention
from nanochat_ray.inference.sampling import GREEDY, draw, uniforms
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.attention import attend_visible, sliding_window_mask
from nanochat_ray.model.gpt import GPT, SMEAR_CHANNELS, Attention, Linear

# Smallest width of a page table, and fewest sequences in a step of several tokens. torch.compile would make a graph of
# its own for a size of 1.
MIN_WIDTH, MIN_ROWS = 2, 2


class PackedLinear(nn.Module):
    """A Linear for CPUs with its weight in the compute dtype and in oneDNN's layout: 2 to 5 times faster on few rows.

    For one row, and for gates of a few channels, compiled code multiplies and sums instead. That is twice as fast as
    oneDNN on one row, and inductor fuses it with its neighbours.
    """

    weight: torch.Tensor
    packed: torch.Tensor

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight.detach().to(dtype).contiguous(), persistent=False)
        packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x.numel() == x.size(-1) or x.size(-1) <= SMEAR_CHANNELS
        if few and torch.compiler.is_compiling():
            return (x.unsqueeze(-2) * self.weight).sum(-1, dtype=torch.float32).to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class PackedAttention(Attention):
    """Attention with q, k and v projected by one matmul."""

    def project(self, u):
        return self.c_qkv(u).split(self.sizes, dim=-1)

    def pack(self, dtype: torch.dtype) -> None:
        weights = [self.c_q.weight, self.c_k.weight, self.c_v.weight]
        self.sizes = [len(weight) for weight in weights]
        self.c_qkv = PackedLinear(torch.cat(weights), dtype)
        del self.c_q, self.c_k, self.c_v


def for_inference(model: GPT) -> GPT:
    """A copy of the model with matmul weights in the compute dtype, packed if torch has oneDNN (Macs have none).

    The copy shares embeddings, and all weights that need no cast, with the model. Copy it again after training.
    """
    with torch.device("meta"):
        copy: Any = GPT(model.config)
    copy.load_state_dict({name: weight.detach() for name, weight in model.state_dict().items()}, assign=True)
    copy.cos, copy.sin, dtype = model.cos, model.sin, model.compute_dtype
    copy.eval().requires_grad_(False)
    if not torch.backends.mkldnn.is_available():
        for module in copy.modules():
            if isinstance(module, Linear):
                module.to(dtype)
        return copy
    for block in copy.transformer.h:
        block.attn.__class__ = PackedAttention
        block.attn.pack(dtype)
        block.attn.c_proj = PackedLinear(block.attn.c_proj.weight, dtype)
        if block.attn.ve_gate is not None:
            block.attn.ve_gate = PackedLinear(block.attn.ve_gate.weight, dtype)
        block.mlp.c_fc = PackedLinear(block.mlp.c_fc.weight, dtype)
        block.mlp.c_proj = PackedLinear(block.mlp.c_proj.weight, dtype)
    copy.lm_head = PackedLinear(copy.lm_head.weight, dtype)
    copy.smear_gate = PackedLinear(copy.smear_gate.weight, dtype)
    return copy


@dataclass
class Step:
    """The `cache` of one model.hidden call over idx (1, N): the next tokens of S sequences, one after the other.

    at (1, N): the position of each token in its sequence. previous (1, N): the id before it. sequence (N,): the index
    of its sequence. last (S,): the index of each sequence's last token. pages, for each group of layers: (layers, S, W)
    pages of adjacent blocks. first, for each group: (S,) index of the first of these blocks in its sequence. groups,
    for each layer: its group and its index in the group.
    """

    keys: torch.Tensor  # (pages, K, PAGE, D)
    values: torch.Tensor
    at: torch.Tensor
    previous: torch.Tensor
    sequence: torch.Tensor
    last: torch.Tensor
    pages: list[torch.Tensor]
    first: list[torch.Tensor]
    groups: list[tuple[int, int]]
    compiled_attention: bool

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k and v (1, N, K, D); then q (1, N, H, D) attends within the window of its sequence. (1, N, H, D)."""
        group, place = self.groups[layer]
        table, at = self.pages[group][place], self.at[0] - self.first[group][self.sequence] * PAGE
        page, slot = table[self.sequence, at // PAGE], at % PAGE
        self.keys[page, :, slot] = k[0]
        self.values[page, :, slot] = v[0]
        attend = paged_attention if self.compiled_attention else _attend
        return attend(q[0], self.keys, self.values, table, self.last, at, window).unsqueeze(0)


def _attend(q, keys, values, table, last, at, window: int) -> torch.Tensor:
    """paged_attention in plain torch. Neighbours with equally many tokens are computed at once."""
    y, sequence, token = torch.empty_like(q), 0, 0
    for T, alike in groupby(last.diff(prepend=last.new_tensor([-1])).tolist()):
        B = len(list(alike))
        rows, own = table[sequence : sequence + B], slice(token, token + B * T)
        queries, places = q[own].unflatten(0, (B, T)), at[own].view(B, T)
        y[own] = _attend_alike(queries, keys, values, rows, places, window).flatten(0, 1)
        sequence, token = sequence + B, token + B * T
    return y


def _attend_alike(q, keys, values, table, at, window: int) -> torch.Tensor:
    """q (B, T, H, D) at positions `at` (B, T) of the tokens in each row's table (B, W)."""
    keys, values = (x[table].transpose(1, 2).flatten(2, 3) for x in (keys, values))
    visible = sliding_window_mask(at, torch.arange(keys.size(2), device=q.device), window)
    return attend_visible(q.transpose(1, 2), keys, values, visible).transpose(1, 2)


class ModelRunner:
    """Holds the weights, the pages, and the page table of each row. For CPUs; see gpu_runner.py for GPUs."""

    runs_ahead = False  # run() needs the last token of every sequence
    filters = False  # run() samples by temperature alone

    def __init__(self, model: GPT, manager: BlockManager, max_rows: int):
        config, self.device = model.config, model.cos.device
        self.model, self.layers = for_inference(model), manager.layers
        shape = (1 + manager.num_pages, config.n_kv_head, PAGE, config.head_dim)
        # Zeros, because attention multiplies masked values by 0, and 0 · NaN would spread.
        self.keys = torch.zeros(shape, device=self.device, dtype=model.compute_dtype)
        self.values = torch.zeros(shape, device=self.device, dtype=model.compute_dtype)
        most, width = max(max_rows, MIN_ROWS), -(-manager.capacity // PAGE) + MIN_WIDTH
        self.tables = [np.full((len(group), most, width), NULL_PAGE) for group in self.layers]
        self.first = [np.zeros(most, dtype=np.int64) for _ in self.layers]
        self.widths = [np.zeros(most, dtype=np.int64) for _ in self.layers]
        self.padding = BlockTable([[] for _ in self.layers], [0 for _ in self.layers])  # on the null page
        places = {layer: (g, place) for g, group in enumerate(self.layers) for place, layer in enumerate(group)}
        self.groups = [places[layer] for layer in range(config.n_layer)]
        self.compiled_attention = False
        self.forward = self._forward

    def refresh_weights(self, model: GPT) -> None:
        self.model, self.forward = for_inference(model), self._forward

    def compile_attention(self) -> None:
        build_paged_attention()
        self.compiled_attention = True

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile one graph for a single token and one for several tokens; both are for all sizes."""
        for pool in (self.keys, self.values):
            torch._dynamo.mark_static(pool)
        self.compile_attention()
        # Python between the kernels and asserts took 1 of 4 ms, for one row of d6.
        options = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
        compiled = torch.compile(self._forward, dynamic=True, options=options | {"guard_filter_fn": _guards_of_inputs})
        # Inductor calls oneDNN on packed weights only if they are constants of the graph. Dynamo reads this setting
        # while it compiles, so it cannot be one of `options`. All steps share one patch, because each patch leaves a
        # context variable in its thread.
        freezing = torch._inductor.config.patch(freezing=True)

        def forward(*inputs) -> tuple[torch.Tensor, ...]:
            with freezing:
                return compiled(*inputs)

        # Dynamo assumes that sizes which are equal here are always equal, so use primes that nothing else equals. The
        # stored keys and values go to the null page, so the engine may step meanwhile.
        for S, tokens in ((1, 1), (97, 85)):
            pages = [np.full((len(g), S, W), NULL_PAGE) for g, W in zip(self.layers, (101, 103), strict=False)]
            first = [np.zeros(S, dtype=np.int64) for _ in self.layers]
            at = [0] * (S - 1) + list(range(tokens))
            draws = np.ones((2, S, 1), dtype=np.float32)
            forward(*self._inputs(at, at, at, [1] * (S - 1) + [tokens], pages, first, *draws))
        self.forward = forward

    def place(self, row: int, table: BlockTable) -> None:
        """Copy the table of a sequence into a row of the page tables."""
        for group, blocks in enumerate(table.blocks):
            pages = self.tables[group][:, row]
            pages[:, : len(blocks)] = pages_of(blocks, self.layers[group])
            pages[:, len(blocks) : self.widths[group][row]] = NULL_PAGE
            self.widths[group][row] = len(blocks)
            self.first[group][row] = table.first[group]

    @torch.inference_mode()
    def run(self, rows: list[Sequence], prompts: list[tuple[Sequence, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the last token of each row's sequence, and prefill others up to a position.

        Returns logits (S, V) after the rows and the prompts, and a token (S,) sampled from each by its sequence's
        temperature and seed: NO_TOKEN for logits with NaN.
        """
        sequences = [*rows, *(sequence for sequence, _ in prompts)]
        idx, previous, at = [s.ids[-1] for s in rows], [s.ids[-2:][0] for s in rows], [len(s.ids) - 1 for s in rows]
        counts = [1] * len(rows)
        for row, (sequence, end) in enumerate(prompts, start=len(rows)):
            self.place(row, sequence.table)
            start, ids = sequence.table.length, sequence.ids
            idx += ids[start:end]
            at += range(start, end)
            previous += [ids[start - 1] if start else 0, *ids[start : end - 1]]
            counts.append(end - start)
        temperature = [max(s.params.temperature, GREEDY) for s in sequences]
        chances = uniforms(np.array([s.key for s in sequences], dtype=np.uint64)).tolist()
        S = max(len(sequences), MIN_ROWS) if len(idx) > 1 else 1
        for row in range(len(sequences), S):
            self.place(row, self.padding)
            for each, value in zip((idx, previous, at, counts, temperature, chances), (0, 0, 0, 1, 1, 0), strict=True):
                each.append(value)
        widths = [max(MIN_WIDTH, int(widths[:S].max())) for widths in self.widths]
        pages = [table[:, :S, :width] for table, width in zip(self.tables, widths, strict=True)]
        first = [first[:S] for first in self.first]
        draws = np.array([temperature, chances], dtype=np.float32)[..., None]
        logits, drawn, self.hidden = self.forward(*self._inputs(idx, previous, at, counts, pages, first, *draws))
        return logits[: len(sequences)], drawn[: len(sequences)]

    @torch.inference_mode()
    def logits_at(self, places: list[int]) -> torch.Tensor:
        """Logits (n, V) after tokens of the last run, by their index: first those of the rows, then of the prompts."""
        return self.model.logits(self.hidden[places])

    def fetch(self, drawn: torch.Tensor) -> torch.Tensor:
        """Tokens on which the engine may call tolist() later."""
        return drawn

    def _inputs(self, idx, previous, at, counts: list[int], pages, first, *draws):
        """The arguments of _forward. idx, previous, at: a list[int] of all tokens. counts: tokens of each sequence."""

        def to_device(*arrays: np.ndarray) -> list[torch.Tensor]:
            return [torch.from_numpy(array.copy()).to(self.device) for array in arrays]

        tokens = np.array([idx, previous, at])[:, None]
        sequence, last = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts) - 1
        idx, previous, at, sequence, last = to_device(*tokens, sequence, last)
        tables = to_device(*pages), to_device(*first)
        step = Step(self.keys, self.values, at, previous, sequence, last, *tables, self.groups, self.compiled_attention)
        return idx, step, *to_device(*draws)

    def _forward(self, idx: torch.Tensor, step: Step, temperature: torch.Tensor, uniforms: torch.Tensor):
        """Logits after each sequence's last token, tokens sampled from them, and hidden states of all tokens."""
        hidden = self.model.hidden(idx, step)[0]
        logits = self.model.logits(hidden[step.last])
        return logits, draw(logits, temperature, uniforms), hidden


def _guards_of_inputs(guards) -> list[bool]:
    """Keep the guards on the inputs, and drop the thousand guards on the model: it never changes."""
    return [not guard.is_global and not guard.name.startswith("self") for guard in guards]
