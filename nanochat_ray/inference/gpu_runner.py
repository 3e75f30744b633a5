"""Forwards on a GPU: Triton kernels between cuBLAS matmuls, pages and tables on the device, CUDA graphs of whole steps.

The host never waits for a step to launch the next one: the ids that a step draws stay on the device, where the next
step finds them, and their copy for the host arrives meanwhile. Graphs of steps that read prompts have not run on a GPU
yet; the tests run them as plain calls in Triton's interpreter.
"""

from array import array
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanochat_ray.inference import kernels
from nanochat_ray.inference.kv_cache import PAGE, BlockManager, BlockTable
from nanochat_ray.inference.sampling import GREEDY, SamplingParams, chances, hashed, uniforms
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.gpt import GPT, Block
from nanochat_ray.model.loss import softcap

EAGER_STEPS = 32  # of a size, before it gets a CUDA graph
UNKNOWN = -1  # instead of a place in `drawn`: the host gives the token's id itself
# Rows of a step's inputs, all int32; floats travel as their bits. One column a token, or a sequence.
TOKEN_FIELDS = ("idx", "source", "previous", "at", "row")
SAMPLING_FIELDS = ("temperature", "uniform", "top_k", "top_p", "min_p")
# Tokens of prompts in a step that have a graph; the largest is the engine's GPU_MAX_PREFILL_TOKENS.
READ_SIZES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
LEAST_PROMPTS, TOKENS_A_PROMPT = 4, 32  # a graph takes a prompt for each so many tokens, and this many at least


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


class Shape(NamedTuple):
    """Of a step that reads prompts: for how many tokens, prompts and blocks of queries its inputs have places."""

    tokens: int
    prompts: int
    blocks: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of the parts of the inputs: tokens; sampling, and the prompt's last token; start and count of the blocks."""
        return [(len(TOKEN_FIELDS), self.tokens), (len(SAMPLING_FIELDS) + 1, self.prompts), (2, self.blocks)]

    def split(self, flat):
        """The parts of the inputs (any,), an array or a tensor, without copying them."""
        begin = 0
        for fields, columns in self.sizes:
            end = begin + fields * _aligned(columns)
            yield flat[begin:end].reshape(fields, -1)[:, :columns]
            begin = end

    @property
    def length(self) -> int:
        return sum(fields * _aligned(columns) for fields, columns in self.sizes)


class Graph(NamedTuple):
    """A step on inputs of one size: a CUDA graph, or in Triton's interpreter a call."""

    replay: Callable[[], object]
    inputs: torch.Tensor
    ends: Any = None  # None or (3, tokens, C) of a step that reads prompts, see GPURunner._read


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
        self.head, self.embeddings, self.backout = self._ends(model)
        shape = (1 + manager.num_pages, config.n_kv_head, PAGE, config.head_dim)
        # Zeros, since attention multiplies what it masks by 0, and 0 · NaN would spread.
        self.keys = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.values = torch.zeros(shape, device=self.device, dtype=self.dtype)
        group = config.n_head // config.n_kv_head
        self.queries = kernels.queries_per_block(group, False, self.dtype) // group  # tokens of a block of queries
        # Padding is read as one sequence, a block of queries at a time: its row is at least as wide as such a block.
        self.width = _aligned(1 + max(-(-manager.capacity // PAGE), self.queries // PAGE) + 1)
        # Per group of layers (layers, rows, 1 + W), one after the other. A row begins with its sequence's first block,
        # or where that was: those that no token sees any more stay in it, so a block is sent once. The last row is for
        # padding: it has nothing but the null page.
        cells = (max_rows + 1) * self.width
        self.cells = torch.zeros(config.n_layer * cells, dtype=torch.int32, device=self.device)
        layers = [len(group) for group in self.groups]
        tables = self.cells.split([count * cells for count in layers])
        self.tables = [t.view(n, max_rows + 1, self.width) for t, n in zip(tables, layers, strict=True)]
        self.first_cells = np.split(np.arange(config.n_layer) * cells, np.cumsum(layers)[:-1])  # of each layer's table
        self.placed: list[Any] = [None] * max_rows  # the BlockTable in each row, once there was one
        self.known = [0] * max_rows  # how many blocks of the sequence a row of the device's tables has
        self.changed: set[int] = set()  # rows that may lack some
        self.drawn = torch.zeros(max_rows, dtype=torch.int32, device=self.device)
        self.logits = torch.zeros(max_rows, config.vocab_size, device=self.device)
        rows = torch.arange(max_rows, dtype=torch.int32, device=self.device)
        self.single_tokens = rows, torch.ones_like(rows)  # start and count of the blocks of a step that only decodes
        # Inputs (fields, 1) of a sequence that is nobody's: it reads token 0 on the null page.
        tokens = np.array([[0], [UNKNOWN], [0], [0], [max_rows]], dtype=np.int32)
        nobody = Sequence([0], SamplingParams(), 0, 1)
        self.padding = np.concatenate([tokens, _sampling([nobody], config.vocab_size)])
        self.rows: list[Sequence] = []  # of the last step that had some
        self.kept = np.zeros((len(self.padding), max_rows), dtype=np.int32)  # their inputs
        self.kept[TOKEN_FIELDS.index("row")] = np.arange(max_rows)
        self.prompt_lens, self.hashes = np.zeros(max_rows, dtype=np.int64), np.zeros(max_rows, dtype=np.uint64)
        self.shapes = [self._shape(size, _prompts_of(size, max_rows)) for size in READ_SIZES]
        self.read_drawn, self.read_logits = torch.zeros_like(self.drawn), torch.zeros_like(self.logits)  # of prompts
        self.ends = self.ends_memory = torch.empty(0, dtype=self.dtype, device=self.device)
        self.sizes, self.uses = graph_sizes(max_rows), Counter()
        self.graphs: dict[int | Shape, Graph] = {}  # by the number of sequences that decode, or the shape
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def refresh_weights(self, model: GPT) -> None:
        """Pack the weights again, into the tensors that the graphs read."""
        old: list = [self.head, self.embeddings, self.backout]
        new: list = [*self._ends(model)]
        for i, layer in enumerate(self.layers):
            old += layer
            new += self._layer(model, i)
        for tensor, value in zip(old, new, strict=True):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != value.data_ptr():
                tensor.copy_(value)

    def _ends(self, model: GPT) -> tuple[torch.Tensor, ...]:
        """The head and the embeddings in the compute dtype, and the factors of the backout."""
        backout = model.backout_lambda.detach().to(self.dtype).float()
        factors = torch.cat([torch.ones_like(backout), -backout])
        return model.lm_head.weight.detach().to(self.dtype), model.transformer.wte.weight.detach(), factors

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
        if self.placed[row] is not table:
            self.placed[row], self.known[row] = table, 0
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
        R, S = len(rows), len(rows) + len(prompts)
        if rows:
            self._run_rows(rows)
        if prompts:
            self._run_prompts(R, prompts)
            self.logits[R:S].copy_(self.read_logits[: len(prompts)])
            self.drawn[R:S].copy_(self.read_drawn[: len(prompts)])
        self.first_place = R
        return self.logits[:S], self.drawn[:S]

    def _run_rows(self, rows: list[Sequence]) -> None:
        S, inputs = len(rows), self._inputs_of_rows(rows)
        if graph := self._graph(next(size for size in self.sizes if size >= S)):
            padding = np.broadcast_to(self.padding, (len(inputs), graph.inputs.size(1) - S))
            graph.inputs.copy_(self._pinned(np.concatenate([inputs, padding], axis=1)), non_blocking=True)
            graph.replay()
        else:
            self._decode(self._pinned(_pad(inputs)).to(self.device, non_blocking=True), S)

    def _inputs_of_rows(self, rows: list[Sequence]) -> np.ndarray:
        """(fields, rows). What a step does not change is kept. All rows have a token in flight, or none has."""
        S, before, kept = len(rows), self.rows, self.kept
        if rows is not before:
            new = [row for row, own in enumerate(rows) if row >= len(before) or before[row] is not own]
            if new:
                sequences = [rows[row] for row in new]
                kept[len(TOKEN_FIELDS) :, new] = _sampling(sequences, self.config.vocab_size)
                self.prompt_lens[new] = [s.prompt_len for s in sequences]
                seeds, samples = np.array([(s.params.seed, s.sample) for s in sequences], dtype=np.uint64).T
                self.hashes[new] = hashed(hashed(np.zeros(len(new), dtype=np.uint64), seeds), samples)
            self.rows = rows
        ids = [s.ids for s in rows]
        lengths, last = np.array([len(own) for own in ids]), [own[-1] for own in ids]
        idx, source, previous, at, _, _, uniform, *_ = kept[:, :S]
        if rows[0].in_flight:
            idx[:], source[:], previous[:], at[:] = 0, [s.slot for s in rows], last, lengths
            for row, sequence in enumerate(rows):
                if sequence.forced:  # a token that replaces what is drawn
                    idx[row], source[row] = sequence.forced[0], UNKNOWN
        else:
            idx[:], source[:], previous[:], at[:] = last, UNKNOWN, [own[-2:][0] for own in ids], lengths - 1
        steps = (at + 1 - self.prompt_lens[:S]).astype(np.uint64)
        uniform[:] = chances(hashed(self.hashes[:S], steps)).view(np.int32)
        return kept[:, :S]

    def _run_prompts(self, row: int, prompts: list[tuple[Sequence, int]]) -> None:
        """Read prompts whose tables are in the rows from `row` on, and draw a token after each into read_drawn."""
        tokens = sum(end - sequence.table.length for sequence, end in prompts)
        shapes = (s for s in self.shapes if s.tokens >= tokens and s.prompts >= len(prompts))
        if (shape := next(shapes, None)) and (graph := self._graph(shape)):
            graph.inputs.copy_(self._pinned(self._inputs_of_prompts(shape, row, prompts)), non_blocking=True)
            graph.replay()
            self.ends = graph.ends
        else:
            shape = self._shape(tokens, len(prompts))
            inputs = self._pinned(self._inputs_of_prompts(shape, row, prompts)).to(self.device, non_blocking=True)
            self.ends = self._read(inputs, shape)

    @torch.inference_mode()
    def logits_at(self, places: list[int]) -> torch.Tensor:
        """The logits (n, V) after those of the last run's tokens, which are counted from its first row on. Of a run
        that read prompts."""
        index = torch.tensor(places, device=self.device) - self.first_place
        raw = F.linear(kernels.mix_norm(*self.ends.index_select(1, index), self.backout), self.head)
        return softcap(raw[:, : self.config.vocab_size])

    def fetch(self, drawn: torch.Tensor) -> Tokens:
        return Tokens(drawn)

    def _shape(self, tokens: int, prompts: int) -> Shape:
        """With a block of queries for every part of as many prompts, and of the padding."""
        return Shape(tokens, prompts, tokens // self.queries + prompts + 1)

    def _inputs_of_prompts(self, shape: Shape, row: int, prompts: list[tuple[Sequence, int]]) -> np.ndarray:
        """The inputs of _read. Tokens of the padding are one more sequence, on the null page; its other blocks of
        queries have no tokens."""
        flat = np.zeros(shape.length, dtype=np.int32)
        tokens, draws, blocks = shape.split(flat)
        begin, starts, counts = 0, [], []
        for i, (sequence, stop) in enumerate(prompts):
            first, ids = sequence.table.length, sequence.ids
            end, known = begin + stop - first, np.asarray(array("i", ids[max(first - 1, 0) : stop]))
            tokens[0, begin:end], tokens[2, end - len(known) + 1 : end] = known[-(stop - first) :], known[:-1]
            tokens[3, begin:end], tokens[4, begin:end] = np.arange(first, stop), row + i
            draws[-1, i] = end - 1
            starts += range(begin, end, self.queries)
            counts += [min(self.queries, end - start) for start in range(begin, end, self.queries)]
            begin = end
        tokens[1] = UNKNOWN
        tokens[:, begin:] = self.padding[: len(TOKEN_FIELDS)]
        starts += range(begin, shape.tokens, self.queries)
        counts += [min(self.queries, shape.tokens - start) for start in range(begin, shape.tokens, self.queries)]
        blocks[:, : len(starts)] = starts[::-1], counts[::-1]  # those with the most keys to see begin first
        draws[:-1, : len(prompts)] = _sampling([sequence for sequence, _ in prompts], self.config.vocab_size)
        draws[:-1, len(prompts) :] = self.padding[len(TOKEN_FIELDS) :]
        return flat

    def _decode(self, inputs: torch.Tensor, S: int) -> None:
        """A step in which S sequences read one token each. inputs (fields, at least S)."""
        tokens, sampling = inputs[:, :S].split([len(TOKEN_FIELDS), len(SAMPLING_FIELDS)])
        start, count = (blocks[:S] for blocks in self.single_tokens)
        x, y, x_mid = self._blocks(tokens, start, count, decoding=True)
        self._draw(x, y, x_mid, sampling, self.logits[:S], self.drawn)

    def _read(self, inputs: torch.Tensor, shape: Shape, ends: torch.Tensor | None = None) -> torch.Tensor:
        """A step that reads prompts. Fills read_logits and read_drawn; returns, in `ends` if it is given, what the
        logits of each token are made of (3, tokens, C)."""
        tokens, (*sampling, last), (start, count) = shape.split(inputs)
        ends = torch.stack(self._blocks(tokens, start, count, decoding=False), out=ends)
        self._draw(*ends.index_select(1, last), sampling, self.read_logits[: shape.prompts], self.read_drawn)
        return ends

    def _blocks(self, tokens, start, count, decoding: bool) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """The residual stream after the last block but for its MLP, that MLP's output, and the stream in the middle:
        each (N, C)."""
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
        return x, y, x_mid

    def _draw(self, x, y, x_mid, sampling, logits: torch.Tensor, drawn: torch.Tensor) -> None:
        """Fill logits (S, V) and the first S of drawn, after tokens of which _blocks returned (S, C) each."""
        raw = F.linear(kernels.mix_norm(x, y, x_mid, self.backout), self.head)
        temperature, uniform, top_k, top_p, min_p = sampling
        temperature, uniform, top_p, min_p = (x.view(torch.float32) for x in (temperature, uniform, top_p, min_p))
        kernels.sample(raw, self.config.vocab_size, temperature, uniform, top_k, top_p, min_p, logits, drawn)

    def _send_tables(self) -> None:
        """Bring the blocks to the device that its tables lack."""
        places, pages = [[] for _ in self.groups], [array("i") for _ in self.groups]
        for row in self.changed:
            table, known = self.placed[row], self.known[row]
            self.known[row] = table.room // PAGE
            for group, (first, blocks) in enumerate(zip(table.first, table.blocks, strict=True)):
                new = blocks[max(known - first, 0) :]
                if new:
                    end = row * self.width + 1 + first + len(blocks)
                    places[group] += range(end - len(new), end)
                    for block in new:
                        pages[group].fromlist(block.pages)
        self.changed.clear()
        if not any(places):
            return
        cells = [
            np.add.outer(np.array(own, dtype=np.int64), first).ravel()
            for own, first in zip(places, self.first_cells, strict=True)
        ]
        cells, pages = np.concatenate(cells), np.concatenate(pages, dtype=np.int32)
        sent = self._pinned(np.concatenate([cells.view(np.int32), pages])).to(self.device, non_blocking=True)
        self.cells.index_copy_(0, sent[: 2 * len(pages)].view(torch.int64), sent[2 * len(pages) :])

    def _pinned(self, array: np.ndarray) -> torch.Tensor:
        """Torch keeps a pinned tensor's memory until what was copied from it has arrived."""
        tensor = torch.empty(array.shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        tensor.numpy()[...] = array
        return tensor

    def _graph(self, size: int | Shape) -> Graph | None:
        """The graph for so many sequences that decode, or for prompts of this shape, captured when such steps have been
        many enough for it to pay, or None."""
        self.uses[size] += 1
        if size not in self.graphs and self.uses[size] > EAGER_STEPS:
            self._capture(size)
        return self.graphs.get(size)

    @torch.inference_mode()
    def compile(self) -> None:
        """Capture all graphs now, which takes seconds. Not while the engine steps."""
        for size in [*reversed(self.shapes), *reversed(self.sizes)]:
            self._capture(size)  # the largest first: the smaller ones find room in its memory
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the runs before the captures took memory of their own

    def _capture(self, size: int | Shape) -> None:
        drawn, ends = self.drawn.clone(), None  # the next step may need these
        if isinstance(size, Shape):
            needed = 3 * size.tokens * self.config.n_embd
            if self.ends_memory.numel() < needed:
                self.ends_memory = self.ends_memory.new_empty(needed)
            ends = self.ends_memory[:needed].view(3, size.tokens, -1)
            inputs = self._pinned(self._inputs_of_prompts(size, 0, [])).to(self.device)
            step = partial(self._read, inputs, size, ends)
        else:
            inputs = self._pinned(_pad(self.padding.repeat(size, axis=1))).to(self.device)
            step = partial(self._decode, inputs, size)
        self.graphs[size] = Graph(self._captured(step) if self.pool else step, inputs, ends)
        self.drawn.copy_(drawn)

    def _captured(self, step: Callable) -> Callable[[], None]:
        """A step as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(_capture_stream(self.device)):
            step()  # compiles kernels and sets up cuBLAS, which a capture must not
            torch.cuda.synchronize(self.device)
            # Not torch.cuda.graph, which gives all memory back first, and the next step takes it again. Thread-local:
            # other threads of the process may use the device meanwhile.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph.replay


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a process: cuBLAS keeps a workspace of 32 MiB for each stream, for good."""
    return torch.cuda.Stream(device)


def _prompts_of(tokens: int, max_rows: int) -> int:
    """How many prompts a graph for so many tokens takes."""
    return min(max_rows, max(LEAST_PROMPTS, tokens // TOKENS_A_PROMPT))


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


def _sampling(sequences: list[Sequence], vocab_size: int) -> np.ndarray:
    params = [s.params for s in sequences]
    columns = [(max(p.temperature, GREEDY), 0, 0, 1 if p.top_p is None else p.top_p, p.min_p) for p in params]
    fields = np.array(columns, dtype=np.float32).reshape(-1, len(SAMPLING_FIELDS)).T.copy()
    fields[1] = uniforms(np.array([s.key for s in sequences], dtype=np.uint64)).numpy()
    fields = fields.view(np.int32)
    fields[2] = [min(p.top_k or vocab_size, vocab_size) for p in params]
    return fields
