"""Causal attention with an optional sliding window, by the kernel that is best on each device."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCK = 128  # queries whose scores are held at once


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Self-attention over whole sequences, as in training.

    q is (B, T, H, D); k and v are (B, T, K, D), K dividing H; heads of q and k have a norm of at most 1.2·√D. A
    position sees itself and the `window` positions before it. Returns (B, T, H, D); the softmax scale is 1/sqrt(D).
    """
    T = q.size(1)
    if q.is_cuda and (flash_attention := _flash_attention_3()):
        return flash_attention(q, k, v, causal=True, window_size=(window, 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        y = _attention_by_blocks(q, k, v, window)
    elif window >= T - 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif q.is_cuda:
        y = _flex_attention(q, k, v, window, grouped)
    else:
        mask = sliding_window_mask(torch.arange(T, device=q.device), torch.arange(T, device=q.device), window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


def _attention_by_blocks(q, k, v, window: int) -> torch.Tensor:
    """Blocks of queries against the keys they can see: plain matmuls, with the softmax fused between them by inductor.

    Faster on CPUs than SDPA, whose backward is slow there and which computes what a window masks.
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.size(1), dim=1) if x.size(1) < H else x for x in (k, v))
    q, k, v = (x.reshape(B * H, T, D) for x in (q / math.sqrt(D), k, v))
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = max(0, start - window) // BLOCK * BLOCK
        visible = sliding_window_mask(torch.arange(start, stop), torch.arange(first, stop), window)
        # No maximum is subtracted before exp: the norms of q and k bound scores by 1.44·√D.
        weights = torch.where(visible, torch.exp((q[:, start:stop] @ k[:, first:stop].mT).float()), 0)
        y = (weights.to(v.dtype) @ v[:, first:stop]) / weights.sum(-1, keepdim=True)
        blocks.append(y.to(v.dtype))
    return torch.cat(blocks, dim=1).view(B, H, T, D)


def sliding_window_mask(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """(…, Tq, Tk) booleans, true where the query at a position may see the key at another."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


@lru_cache(maxsize=1)
def _flash_attention_3():
    """FlashAttention 3 (arXiv:2407.08608) on Hopper GPUs when `kernels` is installed, else None. Not yet run."""
    if torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        from kernels import get_kernel
    except ImportError:
        return None
    return get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func


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
