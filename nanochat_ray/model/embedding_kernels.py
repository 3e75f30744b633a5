"""Triton kernels for an embedding table's gradient: deterministic sums over groups of equal ids.

The ids are sorted, so a group is contiguous. The first kernel sums within blocks of ids. A group inside one block is
then complete. A group across several blocks has a partial sum in fp32 for each of them, and the second kernel adds
these in order.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32  # ids per program
MAX_CHANNELS = 128  # per program
SUMS_AT_ONCE = 32  # partial sums that are read together


@triton.jit
def sum_blocks_kernel(
    grad, ids, positions, table, sums, N,
    C: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum each group of equal ids within a block: complete groups into table, partial sums into sums (blocks, 2, C).

    sums[:, 0] is for the group that began in an earlier block, sums[:, 1] for a group that begins here and continues
    in the next block. A block that lies inside one group writes only sums[:, 0].
    """
    block = tl.program_id(1)
    start = block * BLOCK
    n = start + tl.arange(0, BLOCK)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    own = tl.load(ids + n, mask=n < N, other=-1)
    position = tl.load(positions + n, mask=n < N, other=0)
    x = tl.load(grad + position[:, None] * C + c, mask=(n < N)[:, None] & inside, other=0.0)
    # Each row of this product is the sum of all rows with its id. Its products are exact; its sums are in fp32.
    same = own[:, None] == own[None, :]
    total = tl.dot(same.to(x.dtype), x, input_precision="ieee")
    first = (n < N) & ((n == start) | (own != tl.load(ids + n - 1, mask=(n > 0) & (n < N), other=-1)))
    before = tl.load(ids + start - 1, mask=start > 0, other=-1)
    after = tl.load(ids + start + BLOCK, mask=start + BLOCK < N, other=-1)
    whole = (own != before) & (own != after)
    at = table + own.to(tl.int64)[:, None] * C + c
    tl.store(at, total.to(x.dtype), mask=(first & whole)[:, None] & inside)
    kind = tl.where(own == before, 0, 1)
    tl.store(sums + (block * 2 + kind)[:, None] * C + c, total, mask=(first & ~whole)[:, None] & inside)


@triton.jit
def add_sums_kernel(
    ids, sums, table, blocks,
    C: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of the group that begins in this block and continues in the next one, if there is one."""
    block = tl.program_id(1)
    last = tl.load(ids + block * BLOCK + BLOCK - 1)
    after = tl.load(ids + block * BLOCK + BLOCK)
    before = tl.load(ids + block * BLOCK - 1, mask=block > 0, other=-1)
    if (last == after) & (last != before):
        c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        inside = c < C
        total = tl.load(sums + (block * 2 + 1) * C + c, mask=inside, other=0.0)
        block += 1
        while tl.load(ids + block * BLOCK, mask=block < blocks, other=-1) == last:
            n = block + tl.arange(0, AT_ONCE)
            same = tl.load(ids + n * BLOCK, mask=n < blocks, other=-1) == last
            total += tl.sum(tl.load(sums + (n * 2)[:, None] * C + c, mask=same[:, None] & inside, other=0.0), axis=0)
            block += AT_ONCE
        tl.store(table + last.to(tl.int64) * C + c, total.to(table.dtype.element_ty), mask=inside)


def table_gradient(grad: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, rows: int) -> torch.Tensor:
    """Return (rows, C) in the dtype of grad (N, C): row i is the sum of grad[positions[ids == i]], added in fp32.

    ids (N,) are sorted. A row of grad that is not finite makes rows of other ids not finite, too.
    """
    (N, C), grad = grad.shape, grad.contiguous()
    table, blocks = grad.new_zeros(rows, C), triton.cdiv(N, BLOCK)
    sums = grad.new_empty(blocks, 2, C, dtype=torch.float32)
    channels = min(MAX_CHANNELS, max(16, triton.next_power_of_2(C)))
    parts = triton.cdiv(C, channels)
    sum_blocks_kernel[(parts, blocks)](
        grad, ids, positions, table, sums, N, C=C, BLOCK=BLOCK, CHANNELS=channels, num_warps=4
    )
    if blocks > 1:
        add_sums_kernel[(parts, blocks - 1)](
            ids, sums, table, blocks, C=C, BLOCK=BLOCK, CHANNELS=channels, AT_ONCE=SUMS_AT_ONCE, num_warps=4
        )
    return table
