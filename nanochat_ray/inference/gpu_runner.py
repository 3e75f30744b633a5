"""Forwards on a GPU: Triton kernels between cuBLAS matmuls, pages and tables on the device, CUDA graphs for decoding.

The host never waits for a step to launch the next one: the ids that a step draws stay on the device, where the next
step finds them, and their copy for the host arrives meanwhile. Not yet run on a GPU; the tests run it in Triton's
interpreter.
"""

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanochat_ray.inference import kernels
from nanochat_ray.inference.kv_cache import PAGE, BlockManager, BlockTable, pages_of
from nanochat_ray.inference.sampling import GREEDY, SamplingParams, uniforms
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.gpt import GPT, Block
from nanochat_ray.model.loss import softcap

EAGER_STEPS = 32  # of a size, before it gets a CUDA graph
UNKNOWN = -1  # instead of a place in `drawn`: the host gives the token's id itself
# Rows of a step's inputs, all int32; floats travel as their bits. One column a token, or a sequence.
TOKEN_FIELDS = ("idx", "source", "previous", "at", "row")
SAMPLING_FIELDS = ("temperature", "uniform", "top_k", "top_p", "min_p")


class Layer(NamedTuple):
    """A block's weights in the compute dtype."""

    qkv: torch.Tensor  # (H·D + 2·K·D, C); then a row for each gate of the value embedding, up to a multiple of 8
    attn_out: torch.Tensor
    mlp_in: torch.Tensor
    mlp_out: torch.Tensor
    mix: torch.Tensor  # fp32: resid_lambda, x0_lambda
    value_embedding: torch.Tensor | None
    window: int
    group: int  # of layers with the same window
    place: int  # in its group


class Graph(NamedTuple):
    """A CUDA graph of one decoding step, and the inputs (fields, columns) that it reads."""

    cuda_graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor


class Tokens:
    """Ids on their way to the host."""

    def __init__(self, drawn: torch.Tensor):
        self.host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=drawn.is_cuda)
        self.host.copy_(drawn, non_blocking=True)
        self.arrived = torch.cuda.Event() if drawn.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def tolist(self) -> list[int]:
        if self.arrived:
            self.arrived.synchronize()
        return self.host.tolist()


class GPURunner:
    """Holds the weights, the pages and, for each row of the running batch, its table. The interface of ModelRunner."""

    runs_ahead = True  # run() takes sequences whose last token only the device knows
    filters = True  # run() applies top_k, top_p and min_p

    def __init__(self, model: GPT, manager: BlockManager, max_rows: int):
        config = self.config = model.config
        self.device, self.dtype, self.max_rows = model.cos.device, model.compute_dtype, max_rows
        self.groups, self.model = manager.layers, model
        self.layers = [self._layer(model, i) for i in range(config.n_layer)]
        self.head = model.lm_head.weight.detach().to(self.dtype)
        self.embeddings = model.transformer.wte.weight.detach()
        backout = model.backout_lambda.detach().to(self.dtype).float()
        self.backout = torch.cat([torch.ones_like(backout), -backout])
        shape = (1 + manager.num_pages, config.n_kv_head, PAGE, config.head_dim)
        # Zeros, since attention multiplies what it masks by 0, and 0 · NaN would spread.
        self.keys = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.values = torch.zeros(shape, device=self.device, dtype=self.dtype)
        # Per group of layers (layers, rows, 1 + W). The last row is for padding: it has nothing but the null page.
        width = _aligned(1 + -(-manager.capacity // PAGE) + 1)
        self.host_tables = [np.zeros((len(group), max_rows + 1, width), dtype=np.int32) for group in self.groups]
        self.widths = np.zeros((len(self.groups), max_rows + 1), dtype=np.int64)
        self.tables = [torch.zeros(table.shape, dtype=torch.int32, device=self.device) for table in self.host_tables]
        self.changed: set[int] = set()  # rows of host_tables that the device does not have yet
        self.drawn = torch.zeros(max_rows, dtype=torch.int32, device=self.device)
        self.logits = torch.zeros(max_rows, config.vocab_size, device=self.device)
        rows = torch.arange(max_rows, dtype=torch.int32, device=self.device)
        self.single_tokens = rows, torch.ones_like(rows)  # start and count of the blocks of a step that only decodes
        # Inputs (fields, 1) of a sequence that is nobody's: it reads token 0 on the null page.
        tokens = np.array([[0], [UNKNOWN], [0], [0], [max_rows]], dtype=np.int32)
        nobody = Sequence([0], SamplingParams(), 0, 1)
        self.padding = np.concatenate([tokens, _sampling([nobody], config.vocab_size)])
        self.sizes, self.uses = graph_sizes(max_rows), Counter()
        self.graphs: dict[int, Graph] = {}
        if self.device.type == "cuda":
            self.pool, self.capture_stream = torch.cuda.graph_pool_handle(), _capture_stream(self.device)

    def _layer(self, model: GPT, i: int) -> Layer:
        block: Block = model.transformer.h[i]
        attn, dtype = block.attn, self.dtype
        weights = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
        if attn.ve_gate is not None:  # the gate reads the first channels alone: zeros for the others
            gates, channels = attn.ve_gate.weight.shape
            rows = gates + -gates % 8
            weights.append(F.pad(attn.ve_gate.weight, (0, model.config.n_embd - channels, 0, rows - gates)))
        lambdas = torch.stack([model.resid_lambdas[i], model.x0_lambdas[i]])
        group = next(g for g, layers in enumerate(self.groups) if i in layers)
        return Layer(
            qkv=torch.cat(weights).detach().to(dtype),
            attn_out=attn.c_proj.weight.detach().to(dtype),
            mlp_in=block.mlp.c_fc.weight.detach().to(dtype),
            mlp_out=block.mlp.c_proj.weight.detach().to(dtype),
            mix=lambdas.detach().to(dtype).float(),
            value_embedding=model.value_embeds[str(i)].weight.detach() if attn.ve_gate is not None else None,
            window=attn.window,
            group=group,
            place=self.groups[group].index(i),
        )

    def place(self, row: int, table: BlockTable) -> None:
        """Let a row of the tables be those of this sequence, or note that they changed."""
        for group, blocks in enumerate(table.blocks):
            line = self.host_tables[group][:, row]
            line[:, 0] = table.first[group]
            line[:, 1 : 1 + len(blocks)] = pages_of(blocks, self.groups[group])
            self.widths[group, row] = 1 + len(blocks)
        self.changed.add(row)

    @torch.inference_mode()
    def run(self, rows: list[Sequence], prompts: list[tuple[Sequence, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the last token of each sequence that has its row, and of others the tokens up to a position.

        The logits (S, V) after the rows and the prompts, and a token (S,) drawn from each by its sequence's parameters
        but for penalties, biases and grammars; NO_TOKEN where the logits are not numbers. Valid until the next run.
        """
        for row, (sequence, _) in enumerate(prompts, start=len(rows)):
            self.place(row, sequence.table)
        self._send_tables()
        sequences = [*rows, *(sequence for sequence, _ in prompts)]
        S, tokens = len(sequences), _tokens_of_rows(rows)
        sampling = _sampling(sequences, self.config.vocab_size)
        if prompts:
            self._run_with_prompts(tokens, sampling, prompts)
        elif graph := self._graph(S):
            columns = [np.concatenate([tokens, sampling]), self.padding.repeat(graph.inputs.size(1) - S, axis=1)]
            graph.inputs.copy_(self._pinned(np.concatenate(columns, axis=1)), non_blocking=True)
            graph.cuda_graph.replay()
        else:
            columns = self._pinned(_pad(np.concatenate([tokens, sampling])))
            self._decode(columns.to(self.device, non_blocking=True), S)
        return self.logits[:S], self.drawn[:S]

    @torch.inference_mode()
    def logits_at(self, places: list[int]) -> torch.Tensor:
        """The logits (n, V) after those of the last run's tokens, which are counted from its first row on. Of a run
        that read prompts."""
        index = torch.tensor(places, device=self.device)
        x, y, x_mid = (each.index_select(0, index) for each in self.ends)
        raw = F.linear(kernels.mix_norm(x, y, x_mid, self.backout), self.head)
        return softcap(raw[:, : self.config.vocab_size])

    def fetch(self, drawn: torch.Tensor) -> Tokens:
        return Tokens(drawn)

    def _run_with_prompts(self, tokens: np.ndarray, sampling: np.ndarray, prompts: list[tuple[Sequence, int]]) -> None:
        B = tokens.shape[1]
        parts, counts = [tokens], [1] * B
        for row, (sequence, end) in enumerate(prompts, start=B):
            begin, ids = sequence.table.length, sequence.ids
            part = np.full((len(TOKEN_FIELDS), end - begin), row, dtype=np.int32)
            part[0], part[1] = ids[begin:end], UNKNOWN
            part[2], part[3] = [ids[begin - 1] if begin else 0, *ids[begin : end - 1]], np.arange(begin, end)
            parts.append(part)
            counts.append(end - begin)
        ends = np.cumsum(counts)
        group = self.config.n_head // self.config.n_kv_head
        most = kernels.queries_per_block(group, False, self.dtype) // group
        blocks = [
            (start, min(most, end - start))
            for end, count in zip(ends.tolist(), counts, strict=True)
            for start in range(end - count, end, most)
        ]
        arrays = [np.concatenate(parts, axis=1), sampling, ends[None] - 1, np.array(blocks).T]
        flat = np.concatenate([_pad(array).ravel() for array in arrays])
        sizes = [len(array) * _aligned(array.shape[1]) for array in arrays]
        sent = self._pinned(flat).to(self.device, non_blocking=True).split(sizes)
        tokens, sampling, last, blocks = (
            part.view(len(array), -1)[:, : array.shape[1]] for part, array in zip(sent, arrays, strict=True)
        )
        self._forward(tokens, sampling, *blocks, last=last[0], decoding=False)

    def _decode(self, inputs: torch.Tensor, S: int) -> None:
        """A step in which S sequences read one token each. inputs (fields, at least S)."""
        tokens, sampling = inputs[:, :S].split([len(TOKEN_FIELDS), len(SAMPLING_FIELDS)])
        start, count = (blocks[:S] for blocks in self.single_tokens)
        self._forward(tokens, sampling, start, count, last=None, decoding=True)

    def _forward(self, tokens, sampling, start, count, last, decoding: bool) -> None:
        """Fills logits and drawn. last (S,): each sequence's last token, None if every token is one."""
        idx, source, previous, at, row = tokens
        model, config = self.model, self.config
        x0 = kernels.embed(
            idx, source, self.drawn, previous, at, self.embeddings, model.smear_gate.weight, model.smear_lambda
        )
        x, y = x0.clone(), None
        for i, layer in enumerate(self.layers):
            table = self.tables[layer.group][layer.place]
            qkv = F.linear(kernels.mix_norm(x, y, x0, layer.mix), layer.qkv)
            q = kernels.store(
                qkv, idx, at, row, model.cos, model.sin, layer.value_embedding, table, self.keys, self.values,
                config.n_head,
            )  # fmt: skip
            y = kernels.attention(q, self.keys, self.values, table, at, row, start, count, layer.window, decoding)
            u = kernels.mix_norm(x, F.linear(y.flatten(1), layer.attn_out))
            y = F.linear(kernels.relu_square(F.linear(u, layer.mlp_in)), layer.mlp_out)
            if i == config.n_layer // 2:
                x_mid = x + y
        if last is not None:
            self.ends = x, y, x_mid
            x, y, x_mid = (each.index_select(0, last) for each in (x, y, x_mid))
        raw = F.linear(kernels.mix_norm(x, y, x_mid, self.backout), self.head)
        temperature, uniform, top_k, top_p, min_p = sampling
        temperature, uniform, top_p, min_p = (x.view(torch.float32) for x in (temperature, uniform, top_p, min_p))
        kernels.sample(
            raw, config.vocab_size, temperature, uniform, top_k, top_p, min_p, self.logits[: len(raw)], self.drawn
        )

    def _send_tables(self) -> None:
        if not self.changed:
            return
        rows = np.array(sorted(self.changed), dtype=np.int32)
        self.changed.clear()
        parts = [
            table[:, rows, : widths[rows].max()] for table, widths in zip(self.host_tables, self.widths, strict=True)
        ]
        flat = self._pinned(np.concatenate([rows, *(part.ravel() for part in parts)]))
        rows, *flat = flat.to(self.device, non_blocking=True).split([len(rows), *(part.size for part in parts)])
        rows = rows.long()
        for table, part, new in zip(self.tables, parts, flat, strict=True):
            table[:, :, : part.shape[2]].index_copy_(1, rows, new.view(part.shape))

    def _pinned(self, array: np.ndarray) -> torch.Tensor:
        """Torch keeps a pinned tensor's memory until what was copied from it has arrived."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _graph(self, S: int) -> "Graph | None":
        """The graph for S sequences, captured when such steps have been many enough for it to pay, or None."""
        size = next(size for size in self.sizes if size >= S)
        self.uses[size] += 1
        if size not in self.graphs and self.uses[size] > EAGER_STEPS and self.device.type == "cuda":
            self._capture(size)
        return self.graphs.get(size)

    @torch.inference_mode()
    def compile(self) -> None:
        """Capture all graphs now, which takes seconds. Not while the engine steps."""
        if self.device.type == "cuda":
            for size in reversed(self.sizes):  # the largest first: the smaller ones find room in its memory
                self._capture(size)

    def _capture(self, size: int) -> None:
        inputs = self._pinned(_pad(self.padding.repeat(size, axis=1))).to(self.device)
        drawn = self.drawn.clone()  # the next step may need these
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.capture_stream):
            self._decode(inputs, size)  # compiles kernels and sets up cuBLAS, which a capture must not
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: other threads of the process may use the device meanwhile.
        options = {"pool": self.pool, "stream": self.capture_stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **options):
            self._decode(inputs, size)
        self.drawn.copy_(drawn)
        self.graphs[size] = Graph(graph, inputs)


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a process: cuBLAS keeps a workspace of 32 MiB for each stream, for good."""
    return torch.cuda.Stream(device)


def graph_sizes(most: int) -> list[int]:
    """Numbers of sequences with a graph of their own; a step takes the next larger one, less than twice as large."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(320, most, 64)]
    return [size for size in sizes if size < most] + [most]


def _aligned(columns: int) -> int:
    """A multiple of 16 bytes: Triton compiles a kernel again for each mix of aligned and other pointers."""
    return -(-columns // 4) * 4


def _pad(array: np.ndarray) -> np.ndarray:
    """int32, every row of it at a multiple of 16 bytes."""
    padding = _aligned(array.shape[1]) - array.shape[1]
    return np.pad(array.astype(np.int32, copy=False), ((0, 0), (0, padding)))


def _tokens_of_rows(rows: list[Sequence]) -> np.ndarray:
    columns = []
    for row, s in enumerate(rows):
        token, before = s.last_token, s.ids[-1] if s.in_flight else s.ids[-2:][0]
        known = (token, UNKNOWN) if token is not None else (0, s.slot)
        columns.append((*known, before, s.length - 1, row))
    return np.array(columns, dtype=np.int32).reshape(-1, len(TOKEN_FIELDS)).T


def _sampling(sequences: list[Sequence], vocab_size: int) -> np.ndarray:
    params = [s.params for s in sequences]
    chances = uniforms(np.array([s.key for s in sequences], dtype=np.uint64)).numpy()
    floats = np.array(
        [
            [max(p.temperature, GREEDY) for p in params],
            chances,
            [1.0 if p.top_p is None else p.top_p for p in params],
            [p.min_p for p in params],
        ],
        dtype=np.float32,
    ).view(np.int32)
    top_k = np.array([min(p.top_k or vocab_size, vocab_size) for p in params], dtype=np.int32)
    return np.stack([floats[0], floats[1], top_k, floats[2], floats[3]])
