"""Checkpoints: saves, finds, loads at any number of workers, and imports from nanochat.

A checkpoint is a folder step_000123/: model.safetensors (fp32), one optimizer_00000.safetensors per rank, the
tokenizer's two files, and meta.json with the step, the row position and each file's size and sha256. meta.json is
written last. A folder without it, or whose files do not match it, is not a checkpoint. A Writer writes checkpoints
while training continues.

File names do not depend on the start that wrote them. So a leftover worker of an earlier start, for example on a host
without network, may replace a file of the same step later. Then its hash differs from the one in meta.json, and the
previous checkpoint is used instead. Files of two starts are never loaded together.
"""

import hashlib
import io
import json
import pickle
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nanochat_ray import machine, storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import MuonAdamW
from nanochat_ray.node_cache import localize


def compute_dtype(dtype: torch.dtype | str | None, device: torch.device | str) -> torch.dtype:
    """float32 or bfloat16, by dtype or name. None is bf16 if the device is fast at it, else fp32.

    CUDA SM80 and later are fast, and CPUs with AMX-BF16 or AVX512-BF16. Raises ValueError for other dtypes.
    """
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {name} is not supported: take float32 or bfloat16")
        return getattr(torch, name)
    if torch.device(device).type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


class Writer:
    """Writes a run's checkpoints, one at a time, while training continues. Each rank has a Writer for its part.

    `start` copies the state to host memory, and a thread writes the copy. Call `wait_for_copies` before the state
    changes again. `finish` waits for the parts of all ranks; then rank 0 writes meta.json, or deletes the checkpoint if
    a part failed. `amend` changes entries of meta.json, before or after `finish`.
    """

    def __init__(self, run_dir: str, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1):
        self.run_dir, self.tokenizer, self.rank, self.world_size = run_dir, tokenizer, rank, world_size
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.copies = HostCopies()
        self.part: Future | None = None  # this rank's part of the checkpoint in progress

    def start(
        self, step: int, model: GPT, optimizer: MuonAdamW | None, meta: dict, flush: Callable[[], None] | None = None
    ) -> None:
        """Start checkpoints/step_{step:06d}. Every rank calls this. flush is called when the files are written."""
        if self.part is not None:
            raise RuntimeError("the previous checkpoint is not finished: call finish first")
        self.folder = _folder(self.run_dir, step)
        self.meta = {**meta, "step": step, "model_config": asdict(model.config)}
        files = {}
        if optimizer is not None:
            self.meta["world_size"] = self.world_size  # the number of the optimizer's files
            state = optimizer.shard_state()
            first_rows = json.dumps({key: row for key, (row, _) in state.items()})
            tensors = {key: value for key, (_, value) in state.items()}
            files[f"optimizer_{self.rank:05d}.safetensors"] = tensors, {"first_rows": first_rows}
        if self.rank == 0:
            files["model.safetensors"] = dict(model.named_parameters()), {"format": "pt"}
        copied, arrived = self.copies.take({name: tensors for name, (tensors, _) in files.items()})
        files = {name: (copied[name], metadata) for name, (_, metadata) in files.items()}
        self.part = self.thread.submit(self._write, self.folder, files, flush, arrived)

    def wait_for_copies(self) -> None:
        """Call this before the state changes. It makes the GPU wait until the copies are complete."""
        self.copies.hold()

    def _write(self, folder: str, files: dict, flush: Callable[[], None] | None, arrived: Callable[[], None]) -> dict:
        """Write this rank's files. Returns their entries for meta.json."""
        arrived()
        if self.rank == 0 and storage.exists(storage.join(folder, "meta.json")):
            storage.remove(storage.join(folder, "meta.json"))  # of a damaged checkpoint, whose files are replaced now
        entries = {name: _write_tensors(storage.join(folder, name), *content) for name, content in files.items()}
        if self.rank == 0:
            self.tokenizer.save(folder)
            for name in ("tokenizer.tiktoken", "tokenizer.json"):
                file = localize(storage.join(folder, name))
                entries[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        if flush:
            with suppress(OSError):  # the log reports its own losses, and they don't affect the weights
                flush()
        return entries

    def written(self) -> bool:
        """Whether this rank's part is written, so that finish does not wait for it."""
        return self.part is None or self.part.done()

    def finish(self) -> str | None:
        """Finish the checkpoint in progress, if any. Every rank calls this. Returns why it failed, or None."""
        if self.part is None:
            return None
        try:
            part, error = self.part.result(), None
        except Exception as e:  # OSError for disks; object stores raise other errors
            part, error = {}, f"{type(e).__name__}: {e}"
        self.part = None
        parts = gather((part, error), self.world_size)
        error = next((error for _, error in parts if error), None)
        if self.rank == 0:
            try:
                if not error:
                    files = {name: entry for part, _ in parts for name, entry in part.items()}
                    storage.write_json(storage.join(self.folder, "meta.json"), {**self.meta, "files": files})
            except Exception as e:
                error = f"{type(e).__name__}: {e}"
            # Delete in the thread, because deleting large files takes a while.
            self.thread.submit(storage.remove, self.folder) if error else self.thread.submit(prune, self.run_dir)
        return next((error for error in gather(error, self.world_size) if error), None)

    def amend(self, step: int, changes: dict) -> None:
        """Change entries of the newest checkpoint's meta.json. Its step is `step`. Raises OSError if that fails."""
        if self.part is not None:
            self.meta |= changes
        elif self.rank == 0:
            uri = storage.join(_folder(self.run_dir, step), "meta.json")
            storage.write_json(uri, storage.read_json(uri) | changes)
            self.thread.submit(prune, self.run_dir)

    def close(self) -> None:
        """Wait until all writing and deleting has ended."""
        self.thread.shutdown()


def save_checkpoint(
    run_dir: str, step: int, model: GPT, optimizer: MuonAdamW | None, tokenizer: Tokenizer, meta: dict
) -> str:
    """Write checkpoints/step_{step:06d} of a run and wait for it. Returns the folder. Raises OSError if that fails."""
    writer = Writer(run_dir, tokenizer)
    writer.start(step, model, optimizer, meta)
    error = writer.finish()
    writer.close()
    if error:
        raise OSError(error)
    return writer.folder


def several(world_size: int) -> bool:
    """Whether there are other ranks to communicate with.

    Raises RuntimeError if the process group is gone. Ray destroys it when it ends workers, which then run on for a
    moment. They must not take their own part for the whole.
    """
    if world_size > 1 and not dist.is_initialized():
        raise RuntimeError("the process group is gone, because Ray is ending these workers")
    return world_size > 1


def gather(value, world_size: int) -> list:
    """The values of all ranks, on every rank."""
    values = [value] * world_size
    if several(world_size):
        dist.all_gather_object(values, value)
    return values


class HostCopies:
    """Copies of tensors in host memory.

    GPU tensors are copied on their own stream while the GPU computes, into pinned buffers that are reused.
    """

    def __init__(self):
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}
        self.stream: Any = None  # a CUDA stream, once tensors of a GPU were copied
        self.event: torch.cuda.Event | None = None  # the newest copies have arrived

    def take(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[dict, Callable[[], None]]:
        """(copies, a function that waits until they have arrived). They are valid until the next call."""
        named = {(file, name): t.detach() for file, tensors in files.items() for name, t in tensors.items()}
        device = next((t.device for t in named.values() if t.is_cuda), None)
        if device is None:
            # Convert to fp32 here. In the writer's thread a conversion would start OpenMP threads of its own. If there
            # are more of them than CPUs, all sleep between operations, and decoding in RL gets 1.5 times slower.
            copied = {key: tensor.to(torch.float32, copy=True) for key, tensor in named.items()}
            return {file: {name: copied[file, name] for name in files[file]} for file in files}, lambda: None
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(
            torch.cuda.current_stream(device)
        )  # wait for the previous step, which changes the tensors
        with torch.cuda.stream(self.stream):
            for key, tensor in named.items():
                if key not in self.buffers:
                    self.buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self.buffers[key].copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event(blocking=True)
            self.event.record()
        copies = {file: {name: self.buffers[file, name] for name in files[file]} for file in files}
        return copies, self.event.synchronize

    def hold(self) -> None:
        """Make work that is queued on the GPU from now on wait for the copies."""
        if self.event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.event)
            self.event = None


def _write_tensors(uri: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict:
    """Write tensors in fp32 as safetensors. Returns {size, sha256}. An interrupted write leaves no file.

    safetensors' save_file is not used, because this hashes while it writes, and its errors name the full disk. The
    format: the header's length (8 bytes, little endian), the header as JSON, then the tensors' bytes.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # align the tensors
    sha256, size = hashlib.sha256(), 8 + len(encoded) + end
    with storage.writing(uri) as f:
        for piece in (len(encoded).to_bytes(8, "little"), encoded, *tensors.values()):
            if isinstance(piece, torch.Tensor):
                piece = piece.float().reshape(-1).view(torch.uint8).numpy().data  # converts one tensor at a time
            f.write(piece)
            sha256.update(piece)
    return {"size": size, "sha256": sha256.hexdigest()}


def _sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checkpoints(run_dir: str) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    return [folder for folder in _folders(run_dir) if storage.exists(storage.join(folder, "meta.json"))]


def _folder(run_dir: str, step: int) -> str:
    return storage.join(run_dir, "checkpoints", f"step_{step:06d}")


def _folders(run_dir: str) -> list[str]:
    root = storage.join(run_dir, "checkpoints")
    return [storage.join(root, name) for name in storage.listdir(root) if re.fullmatch(r"step_\d+", name)]


def remove_unfinished(run_dir: str) -> None:
    """Delete the folders of interrupted saves. Only the one process that writes to the run may call this."""
    for folder in set(_folders(run_dir)) - set(checkpoints(run_dir)):
        storage.remove(folder)


def latest_checkpoint(
    run_dir: str, read: bool = True, rank: int = 0, world_size: int = 1, say: Callable[[str], None] = print
) -> str | None:
    """The newest intact checkpoint, or None. A line reports each damaged one that is skipped.

    read: False checks only sizes. If several ranks call this, each reads a part of the files, and all get the same.
    """
    folders = checkpoints(run_dir) if rank == 0 else []
    folders = gather(folders, world_size)[0]  # use rank 0's list, because the folder may change between two listings
    for folder in reversed(folders):
        error = None
        try:
            verify(folder, read, rank, world_size)
        except ValueError as damaged:
            error = str(damaged)
        error = next((error for error in gather(error, world_size) if error), None)
        if not error:
            return folder
        if rank == 0:
            say(f"checkpoint: skipped a damaged one: {error}")
    return None


def read_meta(folder: str) -> dict:
    return storage.read_json(storage.join(folder, "meta.json"))


def verify(folder: str, read: bool = True, rank: int = 0, world_size: int = 1) -> dict:
    """Check a checkpoint's files and return its meta.json. Raises ValueError that names the damaged file.

    read: False checks only sizes. Of several ranks, each reads a part of the files; if their number is unchanged, each
    reads the files that it wrote.
    """
    meta_uri = storage.join(folder, "meta.json")
    try:
        meta = storage.read_json(meta_uri)
        entries = {storage.join(folder, name): (e["size"], e["sha256"]) for name, e in meta["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{meta_uri} is not a checkpoint's meta.json") from None
    parts, others = (sorted(uri for uri in entries if _is_part(storage.name(uri)) == part) for part in (True, False))
    if len(parts) != meta.get("world_size", len(parts)):
        raise ValueError(f"{meta_uri} has the optimizer's files of {len(parts)} of {meta['world_size']} workers")
    for uri, (size, _) in entries.items():
        try:
            if storage.size(uri) != size:
                raise ValueError(f"{uri} is damaged: its size differs from meta.json")
        except FileNotFoundError:
            raise ValueError(f"{uri} is missing") from None
    mine = (parts + others)[rank::world_size] if read else []
    with ThreadPoolExecutor() as pool:
        for uri, sha256 in zip(mine, pool.map(lambda uri: _sha256(localize(uri)), mine), strict=True):
            if sha256 != entries[uri][1]:
                raise ValueError(f"{uri} is damaged: its sha256 differs from meta.json")
    return meta


def _is_part(name: str) -> bool:
    """Whether a file is a rank's part of the optimizer's state."""
    return name.startswith("optimizer_")


def prune(run_dir: str, keep_last: int = 2) -> None:
    """Delete all checkpoints except the last ones and the one with the best val/bpb. Damaged ones don't count."""
    folders = checkpoints(run_dir)
    whole = [folder for folder in folders if _has_its_files(folder)]
    scores: dict = {folder: read_meta(folder).get("val/bpb") for folder in whole}
    best = min((f for f in whole if scores[f] is not None), key=lambda f: scores[f], default=None)
    for folder in folders:
        if folder not in (*whole[-keep_last:], best):
            storage.remove(folder)


def _has_its_files(folder: str) -> bool:
    """Whether all files exist with the right sizes, without reading them."""
    try:
        entries = read_meta(folder)["files"].items()
        return all(storage.size(storage.join(folder, name)) == entry["size"] for name, entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def resolve_checkpoint(folder: str) -> str:
    """The folder itself if it is a checkpoint, else the newest checkpoint of a run folder.

    Raises FileNotFoundError if it is neither, and ValueError if it is damaged.
    """
    if storage.exists(storage.join(folder, "meta.json")):
        verify(folder)
        return folder
    if newest := latest_checkpoint(folder):
        return newest
    raise FileNotFoundError(f"no checkpoint in {folder}: name a folder step_… or the folder of a run that has one")


def run_name(folder: str) -> str:
    """The run of a checkpoint folder …/runs/<name>/checkpoints/step_000123, or the folder's own name."""
    above = storage.parent(folder)
    return storage.name(storage.parent(above) if storage.name(above) == "checkpoints" else folder)


def load_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """(model, tokenizer, meta) of a checkpoint, or of a run's newest. dtype None: the fastest on the device.

    It limits torch's threads to the CPUs of this process, because torch ignores a container's quota.
    Raises FileNotFoundError if there is no checkpoint, and ValueError if it is damaged or has weights that are NaN or
    infinite.
    """
    torch.set_num_threads(min(torch.get_num_threads(), machine.available_cpus()))
    folder = resolve_checkpoint(folder)
    meta, tokenizer = read_meta(folder), Tokenizer.load(folder)
    config = GPTConfig(**meta["model_config"])
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}")
    with torch.device(device):
        model = GPT(config)
    load_weights(model, folder)
    for name, weight in model.named_parameters():
        if not weight.detach().sum().isfinite():  # one pass over the memory; isfinite().all() makes three
            raise ValueError(f"{folder}: {name} holds NaN or Infinity; the run diverged, take an earlier checkpoint")
    model.set_compute_dtype(compute_dtype(dtype, device))
    return model.eval(), tokenizer, meta


def load_weights(model: GPT, folder: str) -> None:
    uri = storage.join(folder, "model.safetensors")
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri} is missing")
    try:
        model.load_state_dict(load_file(localize(uri)))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{uri} does not hold this model's weights: {str(error).splitlines()[0]}") from None


def has_optimizer(folder: str) -> bool:
    return any(map(_is_part, read_meta(folder)["files"]))


def load_optimizer(optimizer: MuonAdamW, folder: str) -> None:
    """Load this rank's part of the saved state, which any number of ranks may have saved. Reads only that part."""
    parts = defaultdict(list)  # "parameter|state" -> [(first row, row after the last, file)]
    for name in filter(
        _is_part, read_meta(folder)["files"]
    ):  # by meta.json, because an interrupted save may have left other files
        uri = storage.join(folder, name)
        with storage.reading(uri) as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for key, row in json.loads(header["__metadata__"]["first_rows"]).items():
            parts[key].append((row, row + header[key]["shape"][0], uri))
    opened = cache(lambda uri: safe_open(localize(uri), "pt"))

    def read(key: str, start: int, stop: int) -> torch.Tensor:
        if key not in parts:
            raise ValueError(f"{folder} has no optimizer state {key}")
        pieces = [
            opened(uri).get_slice(key)[max(start - first, 0) : min(stop, end) - first]
            for first, end, uri in sorted(parts[key])
            if first < stop and end > start
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    optimizer.load_shard_state(read)


def nanochat_config(written: dict) -> GPTConfig:
    """The config of a nanochat checkpoint. Raises KeyError for a missing size, and TypeError for an unknown field.

    A field that is newer than the checkpoint gets the value that the model was trained with, not today's default.
    """
    config: dict = {"n_kv_head": written["n_head"], "window_pattern": "L"} | written
    if lacking := sorted(config.keys() - written.keys()):
        said = ", ".join(f"{name} {config[name]}" for name in lacking)
        print(
            f"import: the checkpoint is older than these fields and gets their values of that time: {said}", flush=True
        )
    if missing := [field.name for field in fields(GPTConfig) if field.name not in config]:
        raise KeyError(f"model_config lacks {', '.join(missing)}")
    return GPTConfig(**config)


def import_nanochat(source: str, out: str, tokenizer: str, step: int | None = None) -> str:
    """Convert a nanochat checkpoint folder (model_000600.pt, meta_000600.json) to ours at `out`. Returns the folder.

    tokenizer: folder with nanochat's tokenizer.pkl or with our files. Tensors are read with weights_only=True, and the
    pickle with an unpickler that only builds plain data. Raises FileNotFoundError or ValueError that names the file.
    """
    steps = [int(m[1]) for m in (re.fullmatch(r"model_(\d+)\.pt", name) for name in storage.listdir(source)) if m]
    if not steps or (step is not None and step not in steps):
        found = ", ".join(map(str, sorted(steps))) or "none"
        raise FileNotFoundError(f"no model_{step or 0:06d}.pt in {source} (steps found: {found})")
    step = max(steps) if step is None else step
    model_file = localize(storage.join(source, f"model_{step:06d}.pt"))
    theirs = storage.read_json(storage.join(source, f"meta_{step:06d}.json"))
    try:
        state = torch.load(model_file, map_location="cpu", weights_only=True)
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        model = GPT(nanochat_config(theirs["model_config"]))
        model.load_state_dict(state)
    except (RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{model_file} is not a nanochat checkpoint: {str(error).splitlines()[0]}") from None
    ours = _nanochat_tokenizer(tokenizer)
    if ours.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {ours.vocab_size} tokens, but the model {model.config.vocab_size}: name its own tokenizer"
        )
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
        state = _EncodingUnpickler(io.BytesIO(localize(uri).read_bytes())).load().state
        return Tokenizer(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError) as error:
        raise ValueError(f"{uri} is not a nanochat tokenizer: {error}") from None


class _PickledEncoding:
    """Replaces tiktoken's Encoding in the pickle. It keeps the fields and runs no code."""

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is refused")
