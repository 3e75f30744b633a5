"""Writes a model as nanochat's own files, to a folder that can be nanochat's NANOCHAT_BASE_DIR."""

import pickle
from dataclasses import asdict

import tiktoken
import torch

from nanochat_ray import storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT

FOLDERS = {"sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}  # by stage; other stages use base_checkpoints


def write(out: str, model: GPT, tokenizer: Tokenizer, meta: dict) -> str:
    """Write base_checkpoints/d4/model_000600.pt, meta_000600.json and tokenizer/. Returns the checkpoint's folder.

    `nanochat-ray import` of these files gives the same weights and ids, bit for bit. Raises OSError if a file can't be
    written.
    """
    config, step = asdict(model.config), meta["step"]
    folder = storage.join(out, FOLDERS.get(meta.get("stage"), "base_checkpoints"), f"d{config['n_layer']}")
    about = {"step": step, "val_bpb": meta.get("val/bpb"), "model_config": config, "user_config": {}}
    weights = {name: weight.detach().float().cpu() for name, weight in model.named_parameters()}
    _write_tensors(storage.join(folder, f"model_{step:06d}.pt"), weights)
    storage.write_json(storage.join(folder, f"meta_{step:06d}.json"), about)
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    storage.write_bytes(storage.join(out, "tokenizer", "tokenizer.pkl"), pickle.dumps(encoding))
    _write_tensors(storage.join(out, "tokenizer", "token_bytes.pt"), torch.from_numpy(tokenizer.token_bytes()))
    return folder


def _write_tensors(uri: str, tensors: dict[str, torch.Tensor] | torch.Tensor) -> None:
    with storage.writing(uri) as f:
        torch.save(tensors, f)
