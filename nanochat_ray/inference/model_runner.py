"""Forwards over the paged cache: packed weights, attention over pages, and the arrays that describe a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from nanochat_ray.inference.kv_cache import NULL_PAGE, PAGE, Block, BlockManager, BlockTable
from nanochat_ray.inference.paged_attention import build_paged_attention, paged_attention
from nanochat_ray.inference.sampling import GREEDY, draw, uniforms
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.gpt import GPT, SMEAR_CHANNELS, Attention, Linear

LEAST_WIDTH, LEAST_ROWS = 2, 2  # of tables, and of rows beside a prompt: for 1 torch.compile would make a graph apart


class PackedLinear(nn.Module):
    """A Linear on CPUs, its weight in the compute dtype, and in oneDNN's layout: 2 to 5 times faster on few rows.

    For one row, and for gates of a few channels, compiled products and sums: twice as fast as oneDNN on one row, and
    fused with what is around them.
    """

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
    """With its three projections as one matmul."""

    def project(self, u):
        return self.c_qkv(u).split(self.sizes, dim=-1)

    def pack(self, dtype: torch.dtype) -> None:
        weights = [self.c_q.weight, self.c_k.weight, self.c_v.weight]
        self.sizes = [len(weight) for weight in weights]
        self.c_qkv = PackedLinear(torch.cat(weights), dtype)
        del self.c_q, self.c_k, self.c_v


def for_inference(model: GPT) -> GPT:
    """A copy whose matmul weights are held in the compute dtype, packed on CPUs where torch has oneDNN (not on Macs);
    embeddings and what needs no cast are shared with model: copy it again after training it."""
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict({name: weight.detach() for name, weight in model.state_dict().items()}, assign=True)
    copy.cos, copy.sin, dtype = model.cos, model.sin, model.compute_dtype
    copy.eval().requires_grad_(False)
    if model.cos.device.type != "cpu" or not torch.backends.mkldnn.is_available():
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
class Tables:
    """Where some sequences' keys and values are. By group of layers: pages (layers, sequences, N) of adjacent blocks,
    and first (sequences, 1), which block of its sequence each begins with."""

    pages: list[torch.Tensor]
    first: list[torch.Tensor]


@dataclass
class Step:
    """The `cache` of one model.hidden call over idx (1, B + T): a next token for each of B rows, then the next T tokens
    of a prompt, if there is one.

    at, previous (1, B + T): the tokens' positions, and the ids before them. groups, by layer: its group and its place
    there.
    """

    keys: torch.Tensor  # (pages, K, PAGE, D)
    values: torch.Tensor
    at: torch.Tensor
    previous: torch.Tensor
    rows: Tables
    prompt: Tables | None
    groups: list[tuple[int, int]]

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k and v (1, B + T, K, D), let q (1, B + T, H, D) attend to all its sequence has within the window:
        (1, B + T, H, D)."""
        B = self.rows.first[0].size(0)
        rows = (x[0, :B].unsqueeze(1) for x in (self.at, q, k, v))
        attend = paged_attention if torch.compiler.is_compiling() else _attend
        y = self._attend(layer, self.rows, *rows, window, attend).transpose(0, 1)
        if self.prompt is None:
            return y
        prompt = (x[:, B:] for x in (self.at, q, k, v))
        return torch.cat([y, self._attend(layer, self.prompt, *prompt, window, _attend)], dim=1)

    def _attend(self, layer: int, tables: Tables, at, q, k, v, window: int, attend: Callable) -> torch.Tensor:
        """at (B, T), q (B, T, H, D), k and v (B, T, K, D) to (B, T, H, D)."""
        group, place = self.groups[layer]
        table, first = tables.pages[group][place], tables.first[group]
        page = table.gather(1, at // PAGE - first)
        self.keys[page, :, at % PAGE] = k
        self.values[page, :, at % PAGE] = v
        attend = _attend_varlen if q.is_cuda else attend
        return attend(q, self.keys, self.values, table, at - first * PAGE, window)


def _attend_varlen(q, keys, values, table, at, window: int) -> torch.Tensor:
    """FlashAttention over pages, as torch has it on CUDA. Not yet run."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, _, _ = q.shape
    starts = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
    y = varlen_attn(
        q.flatten(0, 1),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        cu_seq_q=starts,
        cu_seq_k=None,
        max_q=T,
        max_k=table.size(1) * PAGE,
        window_size=(window, 0),
        enable_gqa=True,
        seqused_k=(at[:, -1] + 1).int(),
        block_table=table.int(),
    )
    return y.view_as(q)


def _attend(q, keys, values, table, at, window: int) -> torch.Tensor:
    """q (B, T, H, D) at places `at` (B, T) of the tokens that a row's table (B, N) has, of keys and values
    (pages, K, PAGE, D). Plain matmuls with the softmax fused between them by torch.compile are faster on CPUs than
    SDPA, and need no maximum before exp: the norms of q and k bound scores by 1.44·√D."""
    B, T, H, D = q.shape
    keys, values = (x[table].transpose(1, 2).flatten(2, 3) for x in (keys, values))
    K, seen, queries = keys.size(1), torch.arange(keys.size(2), device=q.device), at.unsqueeze(-1)
    visible = (seen <= queries) & (seen >= queries - window)
    q = (q * D**-0.5).transpose(1, 2).reshape(B, K, -1, D)  # a group of query heads as further queries of its key head
    scores = (q @ keys.mT).float().view(B, K, -1, T, keys.size(2))
    weights = torch.where(visible.view(B, 1, 1, T, -1), scores.exp(), 0)
    y = (weights.to(values.dtype).view(B, K, -1, keys.size(2)) @ values).view(B, H, T, D)
    return (y / weights.sum(-1).view(B, H, T, 1)).to(values.dtype).transpose(1, 2)


class ModelRunner:
    """Holds the weights, the pages and, for each row of the running batch, its table."""

    def __init__(self, model: GPT, manager: BlockManager, max_rows: int):
        config, self.device = model.config, model.cos.device
        self.model, self.layers = for_inference(model), manager.layers
        shape = (1 + manager.num_pages, config.n_kv_head, PAGE, config.head_dim)
        # Zeros, since attention multiplies what it masks by 0 and 0 · NaN would spread.
        self.keys = torch.zeros(shape, device=self.device, dtype=model.compute_dtype)
        self.values = torch.zeros(shape, device=self.device, dtype=model.compute_dtype)
        width = 2 * (-(-manager.capacity // PAGE) + LEAST_WIDTH)  # the next power of two, if need be
        self.tables = [np.full((len(group), max_rows, width), NULL_PAGE) for group in self.layers]
        self.first = [np.zeros((max_rows, 1), dtype=np.int64) for _ in self.layers]
        self.widths = [np.zeros(max_rows, dtype=np.int64) for _ in self.layers]
        places = {layer: (g, place) for g, group in enumerate(self.layers) for place, layer in enumerate(group)}
        self.groups = [places[layer] for layer in range(config.n_layer)]
        self.forward, self.few_sizes = self._forward, self.device.type == "cuda"

    @torch.inference_mode()
    def compile(self) -> None:
        """Graphs for one row, for several, and for several and a prompt, each for all sizes."""
        for pool in (self.keys, self.values):
            torch._dynamo.mark_static(pool)
            torch._dynamo.mark_static_address(pool)  # a CUDA graph may change it
        if self.device.type == "cuda":  # a CUDA graph for each size of batch and tables; not yet run
            options = {"triton.cudagraphs": True}
        else:
            build_paged_attention()
            # Python between the kernels and asserts took 1 ms of 4, on one row of d6
            options = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
        compiled = torch.compile(self._forward, dynamic=True, options=options | {"guard_filter_fn": _guards_of_inputs})
        # Weights are constants of the graph, which inductor needs to call oneDNN on packed ones. Dynamo asks for this
        # when it compiles, so options won't do. One patch for all steps: each leaves a context variable in its thread.
        freezing = torch._inductor.config.patch(freezing=True)

        def forward(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
            with freezing:
                return compiled(*inputs)

        # Sizes that are equal here would have to be equal always, so they are primes that nothing else is. The null
        # page takes what is stored, beside what the engine does meanwhile.
        for rows, tokens in ((1, 0), (97, 0), (97, 89)):
            pages = [np.full((len(g), rows, w), NULL_PAGE) for g, w in zip(self.layers, (101, 103), strict=False)]
            prompt = [np.full((len(g), 1, w), NULL_PAGE) for g, w in zip(self.layers, (107, 109), strict=False)]
            first = [np.zeros((rows, 1), dtype=np.int64) for _ in self.layers]
            idx = [0] * (rows + tokens)
            at = [0] * rows + list(range(tokens))
            tables = (pages, first), (prompt, [f[:1] for f in first]) if tokens else None
            forward(*self._inputs(idx, idx, at, *tables, *np.ones((2, rows + (tokens > 0), 1), dtype=np.float32)))
        self.forward = forward

    def place(self, row: int, table: BlockTable) -> None:
        """Let a row of the batch be the sequence of this table, or note that its table changed."""
        for group, blocks in enumerate(table.blocks):
            pages = self.tables[group][:, row]
            pages[:, : len(blocks)] = _pages(blocks, self.layers[group])
            pages[:, len(blocks) : self.widths[group][row]] = NULL_PAGE
            self.widths[group][row] = len(blocks)
            self.first[group][row] = table.first[group]

    @torch.inference_mode()
    def run(
        self, rows: list[Sequence], prompt: tuple[Sequence, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the last token of each of the batch's rows, and of another sequence the tokens up to a position.

        The logits (B, V) after the rows, or (B + 1, V) with the prompt's last, and a token drawn from each by its
        sequence's temperature and seed, (B,) or (B + 1,).
        """
        B = len(rows)
        idx, previous, at = [s.ids[-1] for s in rows], [s.ids[-2:][0] for s in rows], [len(s.ids) - 1 for s in rows]
        widths = [self._size(max(LEAST_WIDTH, int(widths[:B].max(initial=0)))) for widths in self.widths]
        pages = [table[:, :B, :width] for table, width in zip(self.tables, widths, strict=True)]
        first = [first[:B] for first in self.first]
        chunk, sequences = None, rows
        if prompt is not None:
            sequence, end = prompt
            sequences = [*rows, sequence]
            start, ids, chunk = sequence.table.length, sequence.ids, self._prompt_tables(sequence.table)
            idx, at = [*idx, *ids[start:end]], [*at, *range(start, end)]
            previous = [*previous, ids[start - 1] if start else 0, *ids[start : end - 1]]
            if end - start == 1:  # one more row: for a chunk of one torch.compile would make a graph apart
                pages = [_below(*parts) for parts in zip(pages, chunk[0], strict=True)]
                first = [np.concatenate(parts) for parts in zip(first, chunk[1], strict=True)]
                B, chunk = B + 1, None
        temperature = [max(s.params.temperature, GREEDY) for s in sequences]
        chances = uniforms(np.array([s.key for s in sequences], dtype=np.uint64))
        if padding := self._size(max(B, LEAST_ROWS) if chunk else B) - B:
            pages, first = [_padded(p, 1, padding) for p in pages], [_padded(f, 0, padding) for f in first]
            idx, previous, at, temperature, chances = (
                [*x[:B], *[0] * padding, *x[B:]] for x in (idx, previous, at, temperature, chances)
            )
        draws = np.array([temperature, chances], dtype=np.float32)[..., None]
        logits, drawn = self.forward(*self._inputs(idx, previous, at, (pages, first), chunk, *draws))
        if not padding:
            return logits, drawn
        return tuple(torch.cat([x[:B], x[-1:]]) if chunk else x[:B] for x in (logits, drawn))

    def _size(self, size: int) -> int:
        """How large to make a batch or a table: on CUDA, where each size has a graph of its own, a power of two."""
        return 1 << (size - 1).bit_length() if self.few_sizes and size else size

    def _prompt_tables(self, table: BlockTable) -> tuple[list[np.ndarray], list[np.ndarray]]:
        tables = []
        for layers, blocks in zip(self.layers, table.blocks, strict=True):
            pages = np.full((len(layers), 1, max(LEAST_WIDTH, len(blocks))), NULL_PAGE)
            pages[:, 0, : len(blocks)] = _pages(blocks, layers)
            tables.append(pages)
        return tables, [np.array([[block]]) for block in table.first]

    def _inputs(self, idx: list[int], previous: list[int], at: list[int], rows, prompt, *draws: np.ndarray) -> tuple:
        """Of _forward."""

        def to_device(arrays: list[np.ndarray]) -> list[torch.Tensor]:
            return [torch.from_numpy(array.copy()).to(self.device) for array in arrays]

        idx, previous, at = to_device(np.array([idx, previous, at])[:, None])
        tables = [part and Tables(*map(to_device, part)) for part in (rows, prompt)]
        return idx, Step(self.keys, self.values, at, previous, *tables, self.groups), *to_device(draws)

    def _forward(self, idx: torch.Tensor, step: Step, temperature: torch.Tensor, uniforms: torch.Tensor):
        """Logits and what is drawn from them, of the rows and the prompt's last token."""
        hidden = self.model.hidden(idx, step).squeeze(0)
        if step.prompt is not None:
            hidden = torch.cat([hidden[: step.rows.first[0].size(0)], hidden[-1:]])
        logits = self.model.logits(hidden)
        return logits, draw(logits, temperature, uniforms)


def _guards_of_inputs(guards) -> list[bool]:
    """Which guards a compiled forward needs: those of its sizes, not the thousand that the model is what it was."""
    return [not guard.is_global and not guard.name.startswith("self") for guard in guards]


def _below(pages: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Tables of further sequences below (layers, sequences, N), as wide as the wider ones."""
    width = max(pages.shape[2], more.shape[2])
    return np.concatenate([_padded(table, 2, width - table.shape[2]) for table in (pages, more)], axis=1)


def _padded(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    """With so many more on the null page along an axis."""
    shape = list(array.shape)
    shape[axis] = count
    return np.concatenate([array, np.full(shape, NULL_PAGE)], axis)


def _pages(blocks: list[Block], layers: list[int]) -> np.ndarray:
    """(layers, blocks)"""
    return np.array([block.pages for block in blocks], dtype=np.int64).reshape(len(blocks), len(layers)).T
