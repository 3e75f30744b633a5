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
    """Folder of the checkpoint, or a run folder, of which the newest is taken."""
    rows: str | None = None
    """Folder of rows that prepare made with the same tokenizer; the default is the one made last."""
    eval_tokens: int = 1_048_576
    """Validation tokens to measure on; of a mixture an equal part of each source."""
    device_batch_size: int = 8
    """Rows in one forward pass."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""


def run(options: BpbOptions) -> dict[str, float]:
    """{"val/bpb": …}, and of a mixture also "val/bpb/<name>" of each source.

    Raises ValueError when the rows were not made with the checkpoint's tokenizer."""
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
