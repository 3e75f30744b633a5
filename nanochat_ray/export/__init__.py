"""Exports a checkpoint to the files of other programs: Hugging Face's transformers, and nanochat."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass
class ExportOptions:
    checkpoint: str
    """Folder of the checkpoint, or a run folder, whose newest checkpoint is used."""
    out: Positional[str]
    """Folder to write to, or a URI such as s3://bucket/name."""
    format: Literal["hf", "nanochat"] = "hf"
    """hf: files for transformers, with a model card. nanochat: files for nanochat, with OUT as NANOCHAT_BASE_DIR."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the format hf. bfloat16 halves the size."""
    push: str | None = None
    """USER/NAME on the Hugging Face Hub, to which the folder is uploaded with the token in HF_TOKEN."""


def run(options: ExportOptions) -> str:
    """Export a checkpoint, and return the folder of the model or its address on the Hub.

    Raises FileNotFoundError if there is no checkpoint, ValueError if it is damaged, if OUT is a checkpoint or if --push
    is not possible, and OSError if the files can't be written or uploaded.
    """
    import torch

    from nanochat_ray import storage
    from nanochat_ray.export import card, hf, hub, nanochat
    from nanochat_ray.train.checkpoint import load_model, resolve_checkpoint

    out = storage.absolute(options.out)
    if storage.exists(storage.join(out, "meta.json")):
        raise ValueError(f"{out} is a checkpoint, which an export would overwrite: give another folder as OUT")
    if options.push:
        hub.check(out, options.format)
    folder = resolve_checkpoint(storage.absolute(options.checkpoint))
    model, tokenizer, meta = load_model(folder, dtype=torch.float32)
    if options.format == "nanochat":
        return nanochat.write(out, model, tokenizer, meta)
    hf.write(out, model, tokenizer, getattr(torch, options.dtype))
    card.write(out, model, meta, folder, options.push or storage.name(out))
    return hub.push(out, options.push) if options.push else out
