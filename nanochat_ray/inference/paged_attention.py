"""Attention over pages of the KV cache on CPUs. The operator is in the C++ file beside this one."""

from inspect import signature
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def build_paged_attention() -> None:
    """Compile the operator, which takes 10 s, or load it from the cache of torch.compile's kernels."""
    from torch._inductor.codecache import CppCodeCache  # imported here, because it takes a second

    # Torch 2.11 always compiles for the CPU's vector instructions and has no such argument.
    vectors = {"needs_vec_isa": True} if "needs_vec_isa" in signature(CppCodeCache.load_async).parameters else {}
    CppCodeCache.load(SOURCE.read_text(), **vectors)


def paged_attention(q, keys, values, table, last, at, window: int) -> torch.Tensor:
    """Attention of the next tokens of S sequences over their pages, (N, H, D). Call build_paged_attention first.

    q (N, H, D): the tokens of all sequences, one after the other. last (S,): the index of each sequence's last token.
    keys, values (pages, K, PAGE, D). table (S, W): the pages of each sequence. at (N,): the position of each token in
    them; token n sees the positions from at[n] − window to at[n].
    """
    return torch.ops.nanochat_ray.paged_attention(q, keys, values, table, last, at, window)
