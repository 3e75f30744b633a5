"""Checkpoints: save, find, load at any number of workers, and import from nanochat.

A checkpoint is a folder step_000123/: model.safetensors (fp32), one optimizer_00000.safetensors a rank, the
tokenizer's two files, and meta.json with the step, the row position and each file's size and sha256. meta.json is
written last: a folder without it, or whose files do not match it, is not a checkpoint.
"""

import hashlib
import io
import json
import pickle
import re
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat_ray import storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import MuonAdamW


def compute_dtype(dtype: torch.dtype | str | None, device: torch.device | str) -> torch.dtype:
    """The dtype or the one of that name; None is bf16 where it is fast, else fp32. Raises ValueError for others.

    It is fast on CUDA SM80 and later, and on CPUs with AMX-BF16 or AVX512-BF16.
    """
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {name} is not one of float32, bfloat16")
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def save_checkpoint(
    run_dir: str, step: int, model: GPT, optimizer: MuonAdamW | None, tokenizer: Tokenizer, meta: dict
) -> str:
    """Write checkpoints/step_{step:06d} of a run; every rank calls this, each writes its part. Returns the folder."""
    folder = storage.join(run_dir, "checkpoints", f"step_{step:06d}")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 and storage.exists(storage.join(folder, "meta.json")):
        storage.remove(storage.join(folder, "meta.json"))  # an older save of this step: not valid while we write
    _barrier()
    files = {}
    if optimizer is not None:
        state = optimizer.shard_state()
        tensors = {key: value.contiguous() for key, (_, value) in state.items()}
        first_rows = json.dumps({key: row for key, (row, _) in state.items()})
        files |= _write_tensors(folder, f"optimizer_{rank:05d}.safetensors", tensors, {"first_rows": first_rows})
    if rank == 0:
        weights = {name: p.detach().float().contiguous() for name, p in model.named_parameters()}
        files |= _write_tensors(folder, "model.safetensors", weights, {"format": "pt"})
        tokenizer.save(folder)
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, files)
        files = {name: entry for part in parts for name, entry in part.items()}
    if rank == 0:
        meta = {**meta, "step": step, "model_config": asdict(model.config), "files": files}
        storage.write_json(storage.join(folder, "meta.json"), meta)
    _barrier()
    return folder


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _write_tensors(folder: str, name: str, tensors: dict, metadata: dict) -> dict:
    """Write one safetensors file whole or not at all; returns {name: {size, sha256}}."""
    with tempfile.TemporaryDirectory(dir=_scratch(folder)) as scratch:
        file = Path(scratch) / name
        save_file({key: value.cpu() for key, value in tensors.items()}, file, metadata)
        entry = {"size": file.stat().st_size, "sha256": _sha256(file)}
        storage.publish(file, storage.join(folder, name))
    return {name: entry}


def _scratch(folder: str) -> str | None:
    """Where to write a file before it is published: on the same disk where there is one."""
    if storage.is_remote(folder):
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checkpoints(run_dir: str) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    root = storage.join(run_dir, "checkpoints")
    folders = [storage.join(root, name) for name in storage.listdir(root) if re.fullmatch(r"step_\d+", name)]
    return [folder for folder in folders if storage.exists(storage.join(folder, "meta.json"))]


def latest_checkpoint(run_dir: str) -> str | None:
    """The newest checkpoint whose files are all there and intact. Older ones stand in for a damaged one, with a line
    that says so."""
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
        except ValueError as error:
            print(f"checkpoint: skipped a damaged one: {error}", flush=True)
        else:
            return folder
    return None


def read_meta(folder: str) -> dict:
    return storage.read_json(storage.join(folder, "meta.json"))


def verify(folder: str) -> dict:
    """meta.json of a checkpoint whose files match it. Raises ValueError naming the file that does not."""
    meta_uri = storage.join(folder, "meta.json")
    try:
        meta = storage.read_json(meta_uri)
        entries = meta["files"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{meta_uri} is not a checkpoint's meta.json") from None
    for name, entry in entries.items():
        uri = storage.join(folder, name)
        if not storage.exists(uri):
            raise ValueError(f"{uri} is missing")
        file = storage.localize(uri)
        if file.stat().st_size != entry["size"] or _sha256(file) != entry["sha256"]:
            raise ValueError(f"{uri} is damaged: its size or sha256 is not the one in meta.json")
    return meta


def prune(run_dir: str, keep_last: int = 2) -> None:
    """Delete all checkpoints but the last ones and the one with the best val/bpb."""
    folders = checkpoints(run_dir)
    scores = {folder: read_meta(folder).get("val/bpb") for folder in folders}
    best = min((folder for folder in folders if scores[folder] is not None), key=scores.get, default=None)
    for folder in folders[:-keep_last]:
        if folder != best:
            storage.remove(folder)


def resolve_checkpoint(folder: str) -> str:
    """The folder itself when it is a checkpoint, or the newest checkpoint of a run folder.

    Raises FileNotFoundError when it is neither, ValueError when it is damaged.
    """
    if storage.exists(storage.join(folder, "meta.json")):
        verify(folder)
        return folder
    if newest := latest_checkpoint(folder):
        return newest
    raise FileNotFoundError(f"no checkpoint in {folder}: give a folder step_… or a run folder that has one")


def load_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """(model, tokenizer, meta) of a checkpoint, or of a run's newest. dtype None: what is fastest on the device.

    Raises FileNotFoundError when there is no checkpoint, ValueError when it is damaged.
    """
    folder = resolve_checkpoint(folder)
    meta = read_meta(folder)
    model = GPT(GPTConfig(**meta["model_config"]))
    load_weights(model, folder)
    model.to(device).set_compute_dtype(compute_dtype(dtype, device))
    return model.eval(), Tokenizer.load(folder), meta


def load_weights(model: GPT, folder: str) -> None:
    uri = storage.join(folder, "model.safetensors")
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri} is missing")
    try:
        model.load_state_dict(load_file(storage.localize(uri)))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{uri} does not hold this model's weights: {str(error).splitlines()[0]}") from None


def has_optimizer(folder: str) -> bool:
    return any(name.startswith("optimizer_") for name in read_meta(folder)["files"])


def load_optimizer(optimizer: MuonAdamW, folder: str) -> None:
    """Give each rank its part of the saved state, whatever the number of ranks that saved it."""
    parts = defaultdict(list)  # "parameter|state" -> [(first row, file)]
    for name in read_meta(folder)["files"]:  # not of the folder: an unfinished save may have left more
        if name.startswith("optimizer_"):
            file = safe_open(storage.localize(storage.join(folder, name)), "pt")
            for key, row in json.loads(file.metadata()["first_rows"]).items():
                parts[key].append((row, file))

    def read(key: str) -> torch.Tensor:
        if key not in parts:
            raise ValueError(f"{folder} has no optimizer state {key}")
        tensors = [file.get_tensor(key) for _, file in sorted(parts[key], key=lambda part: part[0])]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    optimizer.load_shard_state(read)


def import_nanochat(source: str, out: str, tokenizer: str, step: int | None = None) -> str:
    """Turn a nanochat checkpoint folder (model_000600.pt, meta_000600.json) into ours at `out`; returns the folder.

    tokenizer: a folder with nanochat's tokenizer.pkl, or with ours. Tensors are read with weights_only=True and the
    pickle with an unpickler that builds plain data alone. Raises FileNotFoundError or ValueError naming the file.
    """
    steps = [int(m[1]) for m in (re.fullmatch(r"model_(\d+)\.pt", name) for name in storage.listdir(source)) if m]
    if not steps or (step is not None and step not in steps):
        found = ", ".join(map(str, sorted(steps))) or "none"
        raise FileNotFoundError(f"no model_{step or 0:06d}.pt in {source} (steps found: {found})")
    step = max(steps) if step is None else step
    model_file = storage.localize(storage.join(source, f"model_{step:06d}.pt"))
    theirs = storage.read_json(storage.join(source, f"meta_{step:06d}.json"))
    try:
        state = torch.load(model_file, map_location="cpu", weights_only=True)
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        model = GPT(GPTConfig(**theirs["model_config"]))
        model.load_state_dict(state)
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{model_file} is not a nanochat checkpoint: {str(error).splitlines()[0]}") from None
    ours = _nanochat_tokenizer(tokenizer)
    if ours.vocab_size != model.config.vocab_size:
        raise ValueError(f"{tokenizer} has {ours.vocab_size} tokens, the model {model.config.vocab_size}")
    meta = {"imported_from": "nanochat", "val/bpb": theirs.get("val_bpb")}
    with tempfile.TemporaryDirectory() as scratch:
        made = save_checkpoint(scratch, step, model, None, ours, meta)
        for name in sorted(storage.listdir(made), key=lambda name: name == "meta.json"):  # meta.json last
            storage.publish(storage.join(made, name), storage.join(out, name))
    return out


def _nanochat_tokenizer(folder: str) -> Tokenizer:
    uri = storage.join(folder, "tokenizer.pkl")
    if not storage.exists(uri):
        return Tokenizer.load(folder)
    try:
        state = _EncodingUnpickler(io.BytesIO(storage.localize(uri).read_bytes())).load().state
        return Tokenizer(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError) as error:
        raise ValueError(f"{uri} is not a nanochat tokenizer: {error}") from None


class _PickledEncoding:
    """Takes the place of tiktoken's Encoding in the pickle: keeps its fields, runs nothing."""

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
