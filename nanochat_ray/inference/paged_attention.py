"""Attention over the cache's pages where a row has one query, on CPUs: an operator in C++, beside this file."""

from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def build_paged_attention() -> None:
    """Compile the operator as torch.compile does its kernels, which takes 10 s, or find it in their cache."""
    from torch._inductor.codecache import CppCodeCache  # a second of imports that only compiling needs

    CppCodeCache.load(SOURCE.read_text(), needs_vec_isa=True)


def paged_attention(q, keys, values, table, at, window: int) -> torch.Tensor:
    """q (B, 1, H, D) over keys and values (pages, K, PAGE, D), of which row b has the pages table (B, N): the tokens
    from at[b] − window to at[b] of these, at being (B, 1). (B, 1, H, D). It has to be built before."""
    return torch.ops.nanochat_ray.paged_attention(q, keys, values, table, at, window)
