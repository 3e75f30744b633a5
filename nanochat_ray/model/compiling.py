"""How the model, the loss and the optimizer use torch.compile: whole graphs of fixed shapes."""

from collections.abc import Callable

import torch

# Graphs that one function may have. Blocks differ by value embedding, window, gradients and batch size; Muon's stacks
# by shape. Dynamo's own limit of 8 is too low, and past it a function runs uncompiled or, with fullgraph, fails.
MOST_KINDS = 64
STATIC = {"dynamic": False, "fullgraph": True}  # a graph for each shape, and an error rather than a graph break


def allow_kinds() -> None:
    """Raise Dynamo's limit of graphs a function. torch.compile has an option for it only in later versions."""
    torch._dynamo.config.recompile_limit = MOST_KINDS


def compile_static(function: Callable, **options) -> Callable:
    allow_kinds()
    return torch.compile(function, **STATIC, **options)
