"""How the model, the loss and the optimizer use torch.compile: whole graphs of fixed shapes."""

import re
import threading
from collections.abc import Callable
from functools import cache

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


PROBE_SECONDS = 120  # for a first small compile, which takes some seconds


@cache
def why_not_compiled(device: str) -> str | None:
    """None if a tiny compile works on a "cpu" or "cuda"; else why not, in a line.

    It takes a compiler, Python's headers, a cache folder that can be written, and a disk whose files can be run.
    """
    outcome: list[str | None] = []

    def probe() -> None:
        try:
            tiny = torch.compile(lambda x: torch.relu(x) * 2 + x, **STATIC)
            tiny(torch.ones(64, device=device))
            outcome.append(None)
        except Exception as error:
            outcome.append(_cause(error))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return outcome[0] if outcome else f"a tiny compile took more than {PROBE_SECONDS} s"


def _cause(error: Exception) -> str:
    """The line of a compiler's output that says what is wrong, else the error's first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if re.search(r"\berror:", line)), lines[0])
