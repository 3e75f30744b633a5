"""Triton kernels of an embedding table's gradient: sums over runs of equal ids, the same in every run of a program.

Blocks of adjacent sorted ids are summed first. A run inside one block is then done; what runs over the ends of blocks
leaves a sum in fp32 for each block, and these are added in their order.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32  # ids of a program
CHANNELS = 128  # of a program, at most
SUMS_AT_ONCE = 32  # blocks whose sums are read together


@triton.jit
def sum_blocks_kernel(
    grad, ids, places, table, sums, N,
    C: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block's sums. sums is (blocks, 2, C): of the run that began before the block, of the one that goes on after it.

    A block that lies in one run has the first alone.
    """
    block = tl.program_id(1)
    start = block * BLOCK
    n = start + tl.arange(0, BLOCK)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < C
    own = tl.load(ids + n, mask=n < N, other=-1)
    place = tl.load(places + n, mask=n < N, other=0)
    x = tl.load(grad + place[:, None] * C + c, mask=(n < N)[:, None] & inside, other=0.0)
    # Each row of the product is the sum of the rows with the same id. The products are exact, the sums in fp32.
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
    """A run that begins in this block and goes on after it."""
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


def table_gradient(grad: torch.Tensor, ids: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, C) in the dtype of grad (N, C): row i is the sum, taken in fp32, of grad's rows at places where ids is i.

    ids (N,) are sorted. A row that is not finite makes others not finite, too.
    """
    (N, C), grad = grad.shape, grad.contiguous()
    table, blocks = grad.new_zeros(rows, C), triton.cdiv(N, BLOCK)
    sums = grad.new_empty(blocks, 2, C, dtype=torch.float32)
    channels = min(CHANNELS, max(16, triton.next_power_of_2(C)))
    parts = triton.cdiv(C, channels)
    sum_blocks_kernel[(parts, blocks)](
        grad, ids, places, table, sums, N, C=C, BLOCK=BLOCK, CHANNELS=channels, num_warps=4
    )
    if blocks > 1:
        add_sums_kernel[(parts, blocks - 1)](
            ids, sums, table, blocks, C=C, BLOCK=BLOCK, CHANNELS=channels, AT_ONCE=SUMS_AT_ONCE, num_warps=4
        )
    return table
