"""How the model, the loss and the optimizer use torch.compile: whole graphs of fixed shapes."""

import re
import threading
from collections.abc import Callable
from functools import cache

import torch

# Graphs per function. Blocks differ by value embedding, window, gradients and batch size, Muon's stacks by shape.
# Dynamo's default of 8 is too low. Beyond the limit a function runs uncompiled or, with fullgraph, fails.
MAX_GRAPHS = 64
STATIC: dict = {"dynamic": False, "fullgraph": True}  # one graph per shape; a graph break is an error
PROBE_TIMEOUT = 120  # seconds; a first small compile takes some seconds


def raise_recompile_limit() -> None:
    """Set Dynamo's limit to MAX_GRAPHS. torch.compile has an option for it only in later versions."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS  # ty: ignore[invalid-assignment]


def compile_static(function: Callable, **options) -> Callable:
    raise_recompile_limit()
    return torch.compile(function, **STATIC, **options)


@cache
def why_not_compiled(device: str) -> str | None:
    """Compile a tiny function on "cpu" or "cuda". Returns None if that works, else the reason in one line.

    Compiling needs a compiler, Python's headers, a writable cache folder, and a disk that allows executable files.
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
    thread.join(PROBE_TIMEOUT)
    return outcome[0] if outcome else f"a tiny compile took more than {PROBE_TIMEOUT} s"


def _cause(error: Exception) -> str:
    """Return the first line with "error:", as compilers print it, or else the first line of the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if re.search(r"\berror:", line)), lines[0])
