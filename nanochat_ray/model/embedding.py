"""Embedding lookups, with a custom gradient on GPUs.

All tables of the model are looked up with the same ids. So the ids are sorted once, and each table's gradient adds the
rows of equal ids. PyTorch's own gradient sorts for each table, and waits for the GPU to plan its sums.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Order(NamedTuple):
    """The sorted ids of N tokens, (N,) int32, and their positions before sorting, (N,) int64."""

    ids: torch.Tensor
    positions: torch.Tensor


def sort_ids(idx: torch.Tensor) -> Order:
    """Sort token ids. The sort is stable, so that the gradients of equal ids are always added in the same order."""
    return Order(*torch.sort(idx.flatten().int(), stable=True))


def order_for_gradients(idx: torch.Tensor) -> Order | None:
    """Return the `order` for embed(). It is None without gradients, and where PyTorch's own gradient is used."""
    return sort_ids(idx) if idx.is_cuda and torch.is_grad_enabled() and _kernels_work(idx.device) else None


def embed(idx: torch.Tensor, weight: torch.Tensor, order: Order | None) -> torch.Tensor:
    """Return the rows of weight (V, C) at idx (…): (…, C).

    order: from order_for_gradients(idx). If it is None, the gradient is PyTorch's own.
    """
    return F.embedding(idx, weight) if order is None else _Embed.apply(idx, weight, *order)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight, ids, positions):
        ctx.save_for_backward(ids, positions)
        ctx.rows = len(weight)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        from nanochat_ray.model.embedding_kernels import table_gradient

        return None, table_gradient(grad.flatten(0, -2), *ctx.saved_tensors, ctx.rows), None, None


@lru_cache
@torch.no_grad()
def _kernels_work(device: torch.device) -> bool:
    """Return whether Triton is installed and the kernels give correct sums for a small table on this device."""
    if find_spec("triton") is None:
        return False
    from nanochat_ray.model.embedding_kernels import table_gradient

    draw = torch.Generator().manual_seed(0)  # leave the global random state as it is
    idx = (64 * torch.rand(1000, generator=draw) ** 3).long().to(device)  # some ids fill whole blocks
    grad = torch.randn(1000, 80, generator=draw).to(device, torch.bfloat16)
    expected = torch.zeros(64, 80, device=device).index_add_(0, idx, grad.float())
    try:
        found = table_gradient(grad, *sort_ids(idx), 64).float()
        wrong = None if torch.allclose(found, expected, rtol=0.01, atol=0.01) else "wrong sums"
    except Exception as error:  # from Triton's compiler or the driver
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(f"embedding gradients take torch's own path, because the kernels failed: {wrong}", stacklevel=2)
    return wrong is None
