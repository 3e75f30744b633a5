"""Train a ChatGPT-like model from raw text to a chat answer, on Ray, with one dial: --depth.

The library exports Engine, SamplingParams and load_model. They are imported at first use, because torch takes seconds.
"""

from importlib import import_module

_HOMES = {
    "Engine": "nanochat_ray.inference.engine",
    "SamplingParams": "nanochat_ray.inference.sampling",
    "load_model": "nanochat_ray.train.checkpoint",
}
__all__ = ["Engine", "SamplingParams", "load_model"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
