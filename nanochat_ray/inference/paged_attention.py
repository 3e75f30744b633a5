"""Attention over the cache's pages on CPUs: an operator in C++, beside this file."""

from inspect import signature
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")


def build_paged_attention() -> None:
    """Compile the operator as torch.compile does its kernels, which takes 10 s, or find it in their cache."""
    from torch._inductor.codecache import CppCodeCache  # a second of imports that only compiling needs

    # Torch 2.11 always compiles for the CPU's vector instructions and has no such argument.
    vectors = {"needs_vec_isa": True} if "needs_vec_isa" in signature(CppCodeCache.load_async).parameters else {}
    CppCodeCache.load(SOURCE.read_text(), **vectors)


def paged_attention(q, keys, values, table, last, at, window: int) -> torch.Tensor:
    """q (N, H, D) of the next tokens of sequences, those of sequence s up to token last[s]; last is (S,). Over keys and
    values (pages, K, PAGE, D), of which s has the pages table (S, W): a token sees those from at[n] − window to at[n]
    of these. at (N,), adjacent for one sequence's tokens. (N, H, D). It has to be built before."""
    return torch.ops.nanochat_ray.paged_attention(q, keys, values, table, last, at, window)
