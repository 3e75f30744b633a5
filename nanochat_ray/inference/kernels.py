"""Triton kernels of the GPU engine: everything in a forward that is not a matmul.

Matmuls stay with cuBLAS. All kernels compute in fp32 and round where the model in gpt.py rounds, so that both give the
same numbers up to the order of sums. No kernel takes an integer that changes between steps: such an integer would be
a new program for each of its values, and a CUDA graph would freeze it. Index tensors are int32.

A step has N tokens of S sequences, the tokens of one sequence adjacent. Its index tensors:

    idx, previous, at, row (N,)   token id, id before it, position, and its sequence's row in the page tables
    source (N,)                   where in `drawn` the id stands if the host does not know it yet, else −1
    start, count (blocks,)        the first token and the number of tokens of each block of queries

The page table of a layer is (rows, 1 + W): first the number of the sequence's block that the table begins with, then
the page of each block from there on. Keys and values are (pages, K, PAGE, D).
"""

import torch
import triton
import triton.language as tl

from nanochat_ray.inference.kv_cache import PAGE
from nanochat_ray.model.gpt import SMEAR_CHANNELS
from nanochat_ray.model.loss import LOGIT_SOFTCAP

EPS = torch.finfo(torch.float32).eps  # of F.rms_norm
LOG2E = 1.4426950408889634
PROGRAMS_WANTED = 2 * 132  # for decode attention: two for each multiprocessor of a Hopper GPU
MAX_SPLITS = 16


@triton.jit
def _norm(x, C: tl.constexpr, EPS: tl.constexpr):
    """RMS norm of one vector of C channels, padded with zeros."""
    return x * tl.rsqrt(tl.sum(x * x) / C + EPS)


@triton.jit
def embed_kernel(
    idx, source, drawn, previous, at, table, gate, smear_lambda, x_out,
    C: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """x = norm(table[idx]) with the smear of the token before. Writes the resolved idx back."""
    n = tl.program_id(0)
    where = tl.load(source + n)
    token = tl.where(where >= 0, tl.load(drawn + tl.maximum(where, 0)), tl.load(idx + n))
    token = tl.maximum(token, 0)  # of a sequence that ends, since no token could be drawn
    tl.store(idx + n, token)
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(table + token.to(tl.int64) * C + c, mask=inside, other=0.0)
    dtype = x.dtype
    x = _norm(x.to(tl.float32), C, EPS).to(dtype).to(tl.float32)
    before = tl.load(table + tl.load(previous + n).to(tl.int64) * C + c, mask=inside, other=0.0)
    before = _norm(before.to(tl.float32), C, EPS).to(dtype).to(tl.float32)
    weight = tl.load(gate + c, mask=c < GATED, other=0.0).to(dtype).to(tl.float32)
    opened = tl.sigmoid(tl.sum(weight * x)) * tl.load(smear_lambda).to(dtype).to(tl.float32)
    x += tl.where(tl.load(at + n) > 0, opened, 0.0) * before
    tl.store(x_out + n * C + c, x.to(dtype), mask=inside)


@triton.jit
def mix_norm_kernel(
    x, y, x0, weights, u,
    C: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, MIX: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """x += y if ADD, then x = weights[0]·x + weights[1]·x0 if MIX, in place; u = norm(x)."""
    n = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < C
    value = tl.load(x + n * C + c, mask=inside, other=0.0)
    dtype = value.dtype
    value = value.to(tl.float32)
    if ADD:
        value = (value + tl.load(y + n * C + c, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if MIX:
        first = tl.load(x0 + n * C + c, mask=inside, other=0.0).to(tl.float32)
        value = (tl.load(weights) * value + tl.load(weights + 1) * first).to(dtype).to(tl.float32)
    tl.store(x + n * C + c, value.to(dtype), mask=inside)
    tl.store(u + n * C + c, _norm(value, C, EPS).to(dtype), mask=inside)


@triton.jit
def _rotate(base, head, D: tl.constexpr, j, inside, cos, sin, EPS: tl.constexpr):
    """The two halves (heads, D/2) of rotated, normed heads, times 1.2."""
    a = tl.load(base + head * D + j, mask=inside, other=0.0)
    dtype = a.dtype
    b = tl.load(base + head * D + D // 2 + j, mask=inside, other=0.0).to(tl.float32)
    a = a.to(tl.float32)
    ra = (a * cos + b * sin).to(dtype).to(tl.float32)
    rb = (b * cos - a * sin).to(dtype).to(tl.float32)
    scale = 1.2 * tl.rsqrt((tl.sum(ra * ra, axis=1) + tl.sum(rb * rb, axis=1)) / D + EPS)
    return (ra * scale[:, None]).to(dtype), (rb * scale[:, None]).to(dtype)


@triton.jit
def store_kernel(
    qkv, idx, at, row, cos, sin, embedding, table, q_out, keys, values,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    H_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, GATED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Between the QKV matmul and attention, one program a token: rotary, QK norm, value embedding; keys and values go
    into their page.

    A row of qkv (N, STRIDE) holds H + 2·K heads, then K gates of the value embedding if GATED.
    """
    n = tl.program_id(0)
    position = tl.load(at + n)
    half = tl.arange(0, HALF_BLOCK)[None, :]
    base = qkv + n.to(tl.int64) * STRIDE
    dtype = q_out.dtype.element_ty
    angle = position * (D // 2) + half
    c = tl.load(cos + angle, mask=half < D // 2, other=0.0).to(dtype).to(tl.float32)
    s = tl.load(sin + angle, mask=half < D // 2, other=0.0).to(dtype).to(tl.float32)

    head = tl.arange(0, H_BLOCK)[:, None]
    inside = (head < H) & (half < D // 2)
    a, b = _rotate(base, head, D, half, inside, c, s, EPS)
    out = q_out + n.to(tl.int64) * H * D + head * D + half
    tl.store(out, a, mask=inside)
    tl.store(out + D // 2, b, mask=inside)

    line = table + tl.load(row + n).to(tl.int64) * WIDTH
    page = tl.load(line + 1 + position // PAGE - tl.load(line)).to(tl.int64)
    head = tl.arange(0, K_BLOCK)[:, None]
    inside = (head < K) & (half < D // 2)
    place = ((page * K + head) * PAGE + position % PAGE) * D + half
    a, b = _rotate(base + H * D, head, D, half, inside, c, s, EPS)
    tl.store(keys + place, a, mask=inside)
    tl.store(keys + place + D // 2, b, mask=inside)

    value = base + (H + K) * D + head * D + half
    a = tl.load(value, mask=inside, other=0.0)
    b = tl.load(value + D // 2, mask=inside, other=0.0)
    if GATED:
        gate = tl.load(base + (H + 2 * K) * D + head, mask=head < K, other=0.0).to(tl.float32)
        gate = (3 * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        own = embedding + tl.load(idx + n).to(tl.int64) * K * D + head * D + half
        a = (a.to(tl.float32) + gate * tl.load(own, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        b = (b.to(tl.float32) + gate * tl.load(own + D // 2, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    tl.store(values + place, a, mask=inside)
    tl.store(values + place + D // 2, b, mask=inside)


@triton.jit
def attention_kernel(
    q, keys, values, table, at, row, start, count, out, sums, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A block of adjacent queries of one sequence, all query heads of one key head, over a share of the visible keys.

    Grid (blocks, K, SPLITS). With SPLITS > 1, out (SPLITS, N, H, D) and sums (SPLITS, N, H) are fp32 parts that
    combine_kernel adds. No maximum is subtracted before exp: the norms of q and k bound scores by 1.44·√D. So parts
    just add up.
    """
    block, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    token, tokens = tl.load(start + block), tl.load(count + block)
    if tokens == 0:  # a block of the padding
        return
    GROUP: tl.constexpr = H // K
    lane = tl.arange(0, QUERIES)  # query heads of one token are adjacent lanes
    query, head = token + lane // GROUP, kv_head * GROUP + lane % GROUP
    valid = lane < tokens * GROUP
    position = tl.load(at + token) + lane // GROUP
    d = tl.arange(0, D_BLOCK)
    own = (query.to(tl.int64) * H + head) * D
    queries = tl.load(q + own[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)

    line = table + tl.load(row + token).to(tl.int64) * WIDTH
    first = tl.load(line)
    begin = tl.maximum(tl.load(at + token) - WINDOW, 0) // PAGE * PAGE
    end = tl.load(at + token) + tokens
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    begin += split * share
    end = tl.minimum(end, begin + share)

    total = tl.zeros([QUERIES], dtype=tl.float32)
    y = tl.zeros([QUERIES, D_BLOCK], dtype=tl.float32)
    for offset in range(begin, end, KEYS):
        place = offset + tl.arange(0, KEYS)
        stored = place < end
        page = tl.load(line + 1 + place // PAGE - first, mask=stored, other=0).to(tl.int64)
        key = ((page * K + kv_head) * PAGE + place % PAGE) * D
        mask = stored[:, None] & (d < D)[None, :]
        k = tl.load(keys + key[:, None] + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + key[:, None] + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        seen = (place[None, :] <= position[:, None]) & (place[None, :] >= position[:, None] - WINDOW) & stored[None, :]
        weights = tl.where(seen, tl.exp2(scores), 0.0)
        total += tl.sum(weights, axis=1)
        y += tl.dot(weights.to(v.dtype), v, input_precision="ieee")

    mask = valid[:, None] & (d < D)[None, :]
    if SPLITS == 1:
        y = y / tl.where(valid, total, 1.0)[:, None]
        tl.store(out + own[:, None] + d[None, :], y.to(out.dtype.element_ty), mask=mask)
    else:  # decoding: one block a token, so there are as many tokens as blocks
        part = split * tl.num_programs(0).to(tl.int64) * H
        tl.store(out + (part * D + own)[:, None] + d[None, :], y, mask=mask)
        tl.store(sums + part + query * H + head, total, mask=valid)


@triton.jit
def combine_kernel(
    parts, sums, out, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr
):
    """Add the parts of one head of one token: grid (N·H,)."""
    n, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    split, d = tl.arange(0, SPLIT_BLOCK), tl.arange(0, D_BLOCK)
    mask = (split < SPLITS)[:, None] & (d < D)[None, :]
    y = tl.load(parts + ((split * heads + n) * D)[:, None] + d[None, :], mask=mask, other=0.0)
    total = tl.sum(tl.load(sums + split * heads + n, mask=split < SPLITS, other=0.0))
    tl.store(out + n * D + d, (tl.sum(y, axis=0) / total).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def relu_square_kernel(x, size: tl.constexpr, BLOCK: tl.constexpr):
    """max(x, 0)² in place on rows of `size`: grid (N, blocks a row)."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * size + i
    value = tl.maximum(tl.load(x + at, mask=i < size, other=0.0).to(tl.float32), 0.0)
    tl.store(x + at, (value * value).to(x.dtype.element_ty), mask=i < size)


@triton.jit
def _weights(logits, start, largest, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """A softmax but for its sum, of the block of a row that begins at `start`: (weights, their bits as integers)."""
    i = start + tl.arange(0, BLOCK)
    logit = tl.load(logits + i, mask=i < V, other=float("-inf"))
    weight = tl.exp((logit - largest) / temperature)
    return weight, weight.to(tl.int32, bitcast=True)


@triton.jit
def _search(
    logits, largest, temperature, wanted, least, excess, V: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr
):
    """The least number t for which what is above t does not reach `wanted`: the number of weights whose bits are above
    t if COUNT, else their sum. Weights below `least` do not count, and what is above t < least has `excess` less.

    Non-negative floats are ordered as their bits are. Each pass over the row tells which of 8 parts of a span t is in.
    """
    low, high = tl.full([], -1, tl.int32), tl.full([], 0x3F800000, tl.int32)  # the largest weight is 1
    edge = tl.arange(0, 8)
    while high - low > 1:
        step = tl.cdiv(high - low, 8)
        edges = low + edge * step
        above = tl.zeros([BLOCK, 8], dtype=tl.float32)
        for start in range(0, V, BLOCK):
            weight, bits = _weights(logits, start, largest, temperature, V, BLOCK)
            inside = start + tl.arange(0, BLOCK) < V
            value = tl.where(inside & (bits >= least), 1.0 if COUNT else weight, 0.0)
            above += tl.where(bits[:, None] > edges[None, :], value[:, None], 0.0)
        reached = tl.sum(above, axis=0) - tl.where(edges < least, excess, 0.0) >= wanted
        parts = tl.maximum(tl.sum((reached & (edges < high)).to(tl.int32), axis=0), 1)
        high = tl.minimum(high, low + parts * step)
        low += (parts - 1) * step
    return high


@triton.jit
def _beside(logits, largest, temperature, least, V: tl.constexpr, BLOCK: tl.constexpr):
    """(number of weights above `least`, their sum, number of weights equal to it), all as fp32."""
    above = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    tied = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        weight, bits = _weights(logits, start, largest, temperature, V, BLOCK)
        inside = start + tl.arange(0, BLOCK) < V
        above += (inside & (bits > least)).to(tl.float32)
        total += tl.where(bits > least, weight, 0.0)
        tied += (inside & (bits == least)).to(tl.float32)
    return tl.sum(above, axis=0), tl.sum(total, axis=0), tl.sum(tied, axis=0)


@triton.jit
def _keep(weight, bits, least, room, passed):
    """Weights above `least`, and of those equal to it the first `room`, `passed` of which came in earlier blocks."""
    tied = ((bits == least) & (weight > 0)).to(tl.float32)
    kept = (bits > least) | ((tied > 0) & (passed + tl.cumsum(tied, axis=0) <= room))
    return tl.where(kept, weight, 0.0), passed + tl.sum(tied, axis=0)


@triton.jit
def sample_kernel(
    raw, logits_out, temperatures, uniforms, top_ks, top_ps, min_ps, drawn,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One program a row: cap the head's output (S, STRIDE), and draw from it as sampling.sample does.

    A row is read again for each pass, from the cache of its multiprocessor: registers hold half a row at most.
    """
    n = tl.program_id(0).to(tl.int64)
    logits = logits_out + n * V
    peak = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(raw + n * STRIDE + i, mask=i < V, other=0.0).to(tl.float32)
        logit = 2 * CAP * tl.sigmoid(x * (2 / CAP)) - CAP
        tl.store(logits + i, logit, mask=i < V)
        peak = tl.maximum(peak, tl.where(i < V, logit, float("-inf")))
    largest = tl.max(peak, axis=0)
    tl.debug_barrier()  # before other threads read what was stored
    temperature = tl.load(temperatures + n)

    k, p = tl.load(top_ks + n), tl.load(top_ps + n)
    least_k, room_k, excess = tl.full([], -1, tl.int32), tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    least_p, room_p = tl.full([], -1, tl.int32), tl.full([], 0.0, tl.float32)
    if k < V:
        least_k = _search(logits, largest, temperature, k.to(tl.float32), -1, 0.0, V, BLOCK, True)
        above, _, tied = _beside(logits, largest, temperature, least_k, V, BLOCK)
        room_k = k - above
        excess = (tied - room_k) * least_k.to(tl.float32, bitcast=True)
    if p < 1:
        _, above, tied = _beside(logits, largest, temperature, least_k, V, BLOCK)
        least = tl.where(least_k > 0, least_k.to(tl.float32, bitcast=True), 0.0)
        wanted = p * (above + tied * least - excess)
        least_p = _search(logits, largest, temperature, wanted, least_k, excess, V, BLOCK, False)
        _, above, _ = _beside(logits, largest, temperature, least_p, V, BLOCK)
        room_p = tl.maximum(tl.ceil((wanted - above) / least_p.to(tl.float32, bitcast=True)), 1.0)

    # Twice over what is left: its sum, then the first token at which the running sum exceeds a share of it.
    total, target = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    token, last = tl.full([], V, tl.int32), tl.full([], 0, tl.int32)
    for find in tl.static_range(2):
        passed_k, passed_p = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            weight, bits = _weights(logits, start, largest, temperature, V, BLOCK)
            if k < V:
                weight, passed_k = _keep(weight, bits, least_k, room_k, passed_k)
            if p < 1:
                weight, passed_p = _keep(weight, bits, least_p, room_p, passed_p)
            weight = tl.where(weight >= tl.load(min_ps + n), weight, 0.0)
            if find == 1:
                i = start + tl.arange(0, BLOCK)
                # A parallel running sum may rise by rounding where a weight is 0: such a token is never drawn.
                found = (total + tl.cumsum(weight, axis=0) > target) & (weight > 0)
                token = tl.minimum(token, tl.min(tl.where(found, i, V), axis=0))
                last = tl.maximum(last, tl.max(tl.where(weight > 0, i, 0), axis=0))
            total += tl.sum(weight, axis=0)
        target = tl.where(temperature > 1e-29, tl.load(uniforms + n), 0.0) * total
    tl.store(drawn + n, tl.where(total > 0, tl.minimum(token, last), -1))  # NO_TOKEN


def embed(idx, source, drawn, previous, at, wte, gate, smear_lambda) -> torch.Tensor:
    """(N, C) in the dtype of wte; idx gets the ids that stand in drawn."""
    C = wte.size(1)
    x = torch.empty(len(idx), C, dtype=wte.dtype, device=wte.device)
    embed_kernel[(len(idx),)](
        idx, source, drawn, previous, at, wte, gate, smear_lambda, x,
        C=C, BLOCK=triton.next_power_of_2(C), GATED=SMEAR_CHANNELS, EPS=EPS, num_warps=4,
    )  # fmt: skip
    return x


def mix_norm(x, y=None, x0=None, weights=None) -> torch.Tensor:
    """norm(x), after x (N, C) became x + y and weights[0]·x + weights[1]·x0; what is None is left out."""
    u, C = torch.empty_like(x), x.size(1)
    mix_norm_kernel[(len(x),)](
        x, x if y is None else y, x if x0 is None else x0, x if weights is None else weights, u,
        C=C, BLOCK=triton.next_power_of_2(C), ADD=y is not None, MIX=x0 is not None, EPS=EPS, num_warps=4,
    )  # fmt: skip
    return u


def store(qkv, idx, at, row, cos, sin, embedding, table, keys, values, heads: int) -> torch.Tensor:
    """q (N, H, D), ready for attention; keys and values of the N tokens are in their pages."""
    K, D = keys.size(1), keys.size(3)
    q = torch.empty(len(qkv), heads, D, dtype=qkv.dtype, device=qkv.device)
    store_kernel[(len(qkv),)](
        qkv, idx, at, row, cos, sin, qkv if embedding is None else embedding, table, q, keys, values,
        H=heads, K=K, D=D, PAGE=PAGE, WIDTH=table.size(1), STRIDE=qkv.size(1),
        H_BLOCK=triton.next_power_of_2(heads), K_BLOCK=triton.next_power_of_2(K),
        HALF_BLOCK=triton.next_power_of_2(D // 2), GATED=embedding is not None, EPS=EPS, num_warps=4,
    )  # fmt: skip
    return q


def queries_per_block(group: int, decoding: bool, dtype: torch.dtype) -> int:
    """Lanes of a block of queries: tokens × the query heads of one key head; tensor cores take 16 at least."""
    lanes = 16 if decoding else 32 if dtype == torch.float32 else 128
    return max(lanes, triton.next_power_of_2(group))


def attention(q, keys, values, table, at, row, start, count, window: int, decoding: bool) -> torch.Tensor:
    """(N, H, D): each query over the keys of its sequence from at − window to at. Decoding: every block is one token,
    and block i is token i; then few sequences share the multiprocessors by splitting their keys."""
    (N, H, D), K = q.shape, keys.size(1)
    queries, reach = queries_per_block(H // K, decoding, q.dtype), (table.size(1) - 1) * PAGE
    tile = 32 if q.dtype == torch.float32 else 64
    tiles = -(-min(window + PAGE, reach) // tile)
    splits = 1
    while decoding and 2 * splits <= min(MAX_SPLITS, tiles) and splits * N * K < PROGRAMS_WANTED:
        splits *= 2  # powers of two: each number of splits is a kernel of its own
    out = sums = torch.empty_like(q)
    if splits > 1:
        parts = torch.empty(splits, N, H, D, dtype=torch.float32, device=q.device)
        sums = torch.empty(splits, N, H, dtype=torch.float32, device=q.device)
    attention_kernel[(len(start), K, splits)](
        q, keys, values, table, at, row, start, count, parts if splits > 1 else out, sums, LOG2E / D**0.5,
        H=H, K=K, D=D, PAGE=PAGE, WIDTH=table.size(1), WINDOW=window, QUERIES=queries, KEYS=tile,
        D_BLOCK=max(16, triton.next_power_of_2(D)), SPLITS=splits,
        num_warps=4 if queries < 128 else 8, num_stages=3 if decoding else 2,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(N * H,)](
            parts, sums, out, D=D, D_BLOCK=triton.next_power_of_2(D),
            SPLITS=splits, SPLIT_BLOCK=triton.next_power_of_2(splits), num_warps=2,
        )  # fmt: skip
    return out


def relu_square(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)² of x (N, 4·C), in place."""
    block = min(4096, triton.next_power_of_2(x.size(1)))
    relu_square_kernel[(len(x), triton.cdiv(x.size(1), block))](x, size=x.size(1), BLOCK=block, num_warps=4)
    return x


def sample(raw, vocab_size: int, temperature, uniforms, top_k, top_p, min_p, logits, drawn) -> None:
    """Of the head's output raw (S, padded V): logits (S, V) gets the capped ones in fp32, drawn a token id of each row,
    NO_TOKEN where they are not numbers.

    top_k is int32, V for none; the other parameters are fp32: 1 and 0 for no top_p and min_p. All are (S,).
    """
    block = min(2048, triton.next_power_of_2(vocab_size))
    sample_kernel[(len(raw),)](
        raw, logits, temperature, uniforms, top_k, top_p, min_p, drawn,
        V=vocab_size, STRIDE=raw.size(1), BLOCK=block, CAP=LOGIT_SOFTCAP, num_warps=16 if block == 2048 else 4,
    )  # fmt: skip
