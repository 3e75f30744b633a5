"""Causal attention with an optional sliding window, by the kernel that is best on each device."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Self-attention over whole sequences, as in training.

    q is (B, T, H, D); k and v are (B, T, K, D), K dividing H. A position sees itself and the `window` positions
    before it. Returns (B, T, H, D); the softmax scale is 1/sqrt(D).
    """
    T = q.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    if window >= T - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif q.is_cuda:
        y = _flex_attention(q, k, v, window, grouped)
    else:
        mask = sliding_window_mask(torch.arange(T, device=q.device), torch.arange(T, device=q.device), window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def sliding_window_mask(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """(…, Tq, Tk) booleans, true where the query at a position may see the key at another."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


def _flex_attention(q, k, v, window: int, grouped: bool) -> torch.Tensor:
    # FlexAttention skips the blocks that a window masks, which SDPA with a mask does not. Not yet run on a GPU.
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = _sliding_block_mask(q.size(2), window, str(q.device))
    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped)


@lru_cache(maxsize=8)
def _sliding_block_mask(T: int, window: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    return create_block_mask(visible, B=None, H=None, Q_LEN=T, KV_LEN=T, device=device)
