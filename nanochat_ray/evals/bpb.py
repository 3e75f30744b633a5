"""Bits per byte of a checkpoint on a folder of rows."""

from dataclasses import dataclass

import torch

from nanochat_ray import storage
from nanochat_ray.data.loader import Rows, evaluation_batches
from nanochat_ray.data.mixture import read_parts
from nanochat_ray.train.checkpoint import load_model
from nanochat_ray.train.metrics import bits_per_byte, mixed_bpb
from nanochat_ray.train.pretrain import newest_rows


@dataclass
class BpbOptions:
    checkpoint: str
    """Folder of the checkpoint, or a run folder, whose newest checkpoint is used."""
    rows: str | None = None
    """Folder of rows or of a mixture, made by prepare with the checkpoint's tokenizer. Default: the newest."""
    eval_tokens: int = 1_048_576
    """Validation tokens to measure on. A mixture's sources get equal parts."""
    device_batch_size: int = 8
    """Rows per forward pass."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    """float32 or bfloat16. Default: bfloat16 if the hardware is fast at it."""


def run(options: BpbOptions) -> dict[str, float]:
    """Return {"val/bpb": …}, in bits per byte. A mixture adds "val/bpb/<name>" for each source.

    Raises FileNotFoundError without a checkpoint or rows, and ValueError if the checkpoint is damaged or the rows were
    made with another tokenizer."""
    model, tokenizer, _ = load_model(options.checkpoint, options.device, options.dtype)
    folder = options.rows or newest_rows()
    made_with = storage.read_json(storage.join(folder, "manifest.json"))["tokenizer_sha256"]
    if made_with != tokenizer.sha:
        raise ValueError(f"{folder} was made with tokenizer {made_with[:8]}, the checkpoint's is {tokenizer.sha[:8]}")
    parts, by_source = read_parts(folder), {}
    for part in parts:
        rows = Rows(storage.join(part.rows, "val"))
        num_rows = max(1, options.eval_tokens // (rows.row_len - 1) // len(parts))
        batches = evaluation_batches(rows, num_rows, options.device_batch_size)
        by_source[part] = bits_per_byte(model, batches, tokenizer.token_bytes())
    return mixed_bpb(by_source)
