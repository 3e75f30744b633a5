"""Looking up tables by token ids, with a gradient of our own on GPUs.

All tables of the model are looked up with the same ids, so these are sorted once, and each table's gradient adds up
the rows of equal ids. torch's own gradient sorts for each table, and waits for the GPU in order to plan its sums.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Order(NamedTuple):
    """The ids of N tokens, sorted: (N,) int32, and the places in which they were, (N,) int64."""

    ids: torch.Tensor
    places: torch.Tensor


def sort_ids(idx: torch.Tensor) -> Order:
    """Equal ids stay in the order of their places, so that their gradients are always added in the same order."""
    return Order(*torch.sort(idx.flatten().int(), stable=True))


def order_for_gradients(idx: torch.Tensor) -> Order | None:
    """What embed needs to know of the ids; None where there will be no gradient, and where torch's own is used."""
    return sort_ids(idx) if idx.is_cuda and torch.is_grad_enabled() and _kernels_work(idx.device) else None


def embed(idx: torch.Tensor, weight: torch.Tensor, order: Order | None) -> torch.Tensor:
    """Rows of weight (V, C) at idx (…): (…, C). The gradient is torch's own without an order, which is that of idx."""
    return F.embedding(idx, weight) if order is None else _Embed.apply(idx, weight, *order)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight, ids, places):
        ctx.save_for_backward(ids, places)
        ctx.rows = len(weight)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, grad):
        from nanochat_ray.model.embedding_kernels import table_gradient

        return None, table_gradient(grad.flatten(0, -2), *ctx.saved_tensors, ctx.rows), None, None


@lru_cache
@torch.no_grad()
def _kernels_work(device: torch.device) -> bool:
    """Whether there is Triton, and what it makes of the kernels gives the sums of a small table on this device."""
    if find_spec("triton") is None:
        return False
    from nanochat_ray.model.embedding_kernels import table_gradient

    draw = torch.Generator().manual_seed(0)  # the run's own draws stay as they are
    idx = (64 * torch.rand(1000, generator=draw) ** 3).long().to(device)  # some ids fill whole blocks
    grad = torch.randn(1000, 80, generator=draw).to(device, torch.bfloat16)
    expected = torch.zeros(64, 80, device=device).index_add_(0, idx, grad.float())
    try:
        found = table_gradient(grad, *sort_ids(idx), 64).float()
        wrong = None if torch.allclose(found, expected, rtol=0.01, atol=0.01) else "wrong sums"
    except Exception as error:  # of Triton's compiler or the driver
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(f"embedding gradients take torch's own path, the kernels' failed: {wrong}", stacklevel=2)
    return wrong is None
