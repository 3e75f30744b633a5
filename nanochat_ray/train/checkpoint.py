"""Checkpoints: save, find, load at any number of workers, and import from nanochat.

A checkpoint is a folder step_000123/: model.safetensors (fp32), one optimizer_00000.safetensors a rank, the
tokenizer's two files, and meta.json with the step, the row position and each file's size and sha256. meta.json is
written last: a folder without it, or whose files do not match it, is not a checkpoint. A Writer writes them while the
training goes on.

Files are not named by the attempt that wrote them. A worker that is left over, as on a host that was cut off, may
replace one of the same step later. Its hash is then not the one that the new rank took while it wrote, and the
checkpoint is skipped for the one before: what two attempts wrote is never loaded together.
"""

import hashlib
import io
import json
import pickle
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

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


class Writer:
    """Writes a run's checkpoints, one at a time, while training goes on. Every rank has one, and writes its part.

    start copies the state to host memory, and a thread writes the copy. Call wait_for_copies before the state changes
    again. finish ends what start began: when the parts of all ranks are on disk, rank 0 writes meta.json; when one
    could not be written, none is kept. amend changes what meta.json says, before or after.
    """

    def __init__(self, run_dir: str, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1):
        self.run_dir, self.tokenizer, self.rank, self.world_size = run_dir, tokenizer, rank, world_size
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.copies = HostCopies()
        self.part: Future | None = None  # this rank's files of the checkpoint that start began

    def start(
        self, step: int, model: GPT, optimizer: MuonAdamW | None, meta: dict, flush: Callable[[], None] | None = None
    ) -> None:
        """Begin checkpoints/step_{step:06d}; every rank calls this. flush is called when the files are written."""
        if self.part is not None:
            raise RuntimeError("the checkpoint before is not finished")
        self.folder = _folder(self.run_dir, step)
        self.meta = {**meta, "step": step, "model_config": asdict(model.config)}
        files = {}
        if optimizer is not None:
            self.meta["world_size"] = self.world_size  # each rank writes one file of the state
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
        """Call it before what start copies is changed: a GPU does not go on before it has been copied."""
        self.copies.hold()

    def _write(self, folder: str, files: dict, flush: Callable[[], None] | None, arrived: Callable[[], None]) -> dict:
        """What meta.json says of this rank's files."""
        arrived()
        if self.rank == 0 and storage.exists(storage.join(folder, "meta.json")):
            storage.remove(storage.join(folder, "meta.json"))  # of a damaged one: its other files are replaced now
        entries = {name: _write_tensors(storage.join(folder, name), *content) for name, content in files.items()}
        if self.rank == 0:
            self.tokenizer.save(folder)
            for name in ("tokenizer.tiktoken", "tokenizer.json"):
                file = localize(storage.join(folder, name))
                entries[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        if flush:
            with suppress(OSError):  # of a log: it costs no weights, and says itself what it lost
                flush()
        return entries

    def written(self) -> bool:
        """Whether this rank has nothing more to write: finish would not wait for it."""
        return self.part is None or self.part.done()

    def finish(self) -> str | None:
        """End what start began, if anything; every rank calls this. Returns why it could not be written, or None."""
        if self.part is None:
            return None
        try:
            part, error = self.part.result(), None
        except Exception as e:  # OSError of a disk, but object stores have errors of their own
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
            # In the thread, as deleting large files takes a while.
            self.thread.submit(storage.remove, self.folder) if error else self.thread.submit(prune, self.run_dir)
        return next((error for error in gather(error, self.world_size) if error), None)

    def amend(self, step: int, changes: dict) -> None:
        """Change what meta.json says of the newest checkpoint, that of `step`. Raises OSError when it can't be."""
        if self.part is not None:
            self.meta |= changes
        elif self.rank == 0:
            uri = storage.join(_folder(self.run_dir, step), "meta.json")
            storage.write_json(uri, storage.read_json(uri) | changes)
            self.thread.submit(prune, self.run_dir)

    def close(self) -> None:
        """Wait until nothing is written or deleted any more."""
        self.thread.shutdown()


def save_checkpoint(
    run_dir: str, step: int, model: GPT, optimizer: MuonAdamW | None, tokenizer: Tokenizer, meta: dict
) -> str:
    """Write checkpoints/step_{step:06d} of a run and wait for it; returns the folder. Raises OSError if it can't be."""
    writer = Writer(run_dir, tokenizer)
    writer.start(step, model, optimizer, meta)
    error = writer.finish()
    writer.close()
    if error:
        raise OSError(error)
    return writer.folder


def several(world_size: int) -> bool:
    """Whether there are other ranks to talk to.

    Raises RuntimeError when there were: Ray destroys the process group of workers that it ends, and their training goes
    on for a moment. What one of them then takes for a whole would be a part.
    """
    if world_size > 1 and not dist.is_initialized():
        raise RuntimeError("the process group is gone, as Ray is ending these workers")
    return world_size > 1


def gather(value, world_size: int) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world_size
    if several(world_size):
        dist.all_gather_object(values, value)
    return values


class HostCopies:
    """Copies of tensors in host memory, of what they hold when they are taken.

    Those of a GPU travel on a stream of their own while it computes on, into page-locked buffers that are kept for the
    next time.
    """

    def __init__(self):
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}
        self.stream: torch.cuda.Stream | None = None
        self.event: torch.cuda.Event | None = None  # the newest copies have arrived

    def take(self, files: dict[str, dict[str, torch.Tensor]]) -> tuple[dict, Callable[[], None]]:
        """(copies, a function that waits until they have arrived). They are valid until the next call."""
        named = {(file, name): t.detach() for file, tensors in files.items() for name, t in tensors.items()}
        device = next((t.device for t in named.values() if t.is_cuda), None)
        if device is None:
            return {file: {name: named[file, name].clone() for name in files[file]} for file in files}, lambda: None
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # for the step before, which changes them
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
        """Let the work that is queued on the GPU from here on wait for the copies."""
        if self.event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.event)
            self.event = None


def _write_tensors(uri: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict:
    """Write tensors in fp32 as safetensors, whole or not at all; returns {size, sha256}.

    Not by safetensors' own save_file, as this hashes what it writes without reading it again, and says which disk is
    full. The format: the header's length (8 bytes, little endian), the header as JSON, then the tensors' bytes.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    sha256, size = hashlib.sha256(), 8 + len(encoded) + end
    with storage.writing(uri) as f:
        for piece in (len(encoded).to_bytes(8, "little"), encoded, *tensors.values()):
            if isinstance(piece, torch.Tensor):
                piece = piece.float().reshape(-1).view(torch.uint8).numpy().data  # one in fp32 at a time
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
    """Delete what saves that were cut short have left. Only for who alone writes into the run."""
    for folder in set(_folders(run_dir)) - set(checkpoints(run_dir)):
        storage.remove(folder)


def latest_checkpoint(
    run_dir: str, read: bool = True, rank: int = 0, world_size: int = 1, say: Callable[[str], None] = print
) -> str | None:
    """The newest checkpoint whose files are all there and intact. Older ones stand in for a damaged one, with a line
    that says so.

    read: False looks at sizes alone. When several ranks call it, each reads a part of the files, and all get the same.
    """
    folders = checkpoints(run_dir) if rank == 0 else []
    folders = gather(folders, world_size)[0]  # one could appear or go between two looks
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
    """meta.json of a checkpoint whose files match it. Raises ValueError naming the file that does not.

    read: False looks at sizes alone. Of several ranks each reads a part of the files, if they are as many as those that
    wrote it then what it wrote itself.
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
                raise ValueError(f"{uri} is damaged: its size is not the one in meta.json")
        except FileNotFoundError:
            raise ValueError(f"{uri} is missing") from None
    mine = (parts + others)[rank::world_size] if read else []
    with ThreadPoolExecutor() as pool:
        for uri, sha256 in zip(mine, pool.map(lambda uri: _sha256(localize(uri)), mine), strict=True):
            if sha256 != entries[uri][1]:
                raise ValueError(f"{uri} is damaged: its sha256 is not the one in meta.json")
    return meta


def _is_part(name: str) -> bool:
    """Whether it is a rank's part of the optimizer's state."""
    return name.startswith("optimizer_")


def prune(run_dir: str, keep_last: int = 2) -> None:
    """Delete all checkpoints but the last ones and the one with the best val/bpb; damaged ones count for nothing."""
    folders = checkpoints(run_dir)
    whole = [folder for folder in folders if _has_its_files(folder)]
    scores = {folder: read_meta(folder).get("val/bpb") for folder in whole}
    best = min((folder for folder in whole if scores[folder] is not None), key=scores.get, default=None)
    for folder in folders:
        if folder not in (*whole[-keep_last:], best):
            storage.remove(folder)


def _has_its_files(folder: str) -> bool:
    """What can be seen of `verify` without reading the files."""
    try:
        entries = read_meta(folder)["files"].items()
        return all(storage.size(storage.join(folder, name)) == entry["size"] for name, entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


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


def run_name(folder: str) -> str:
    """The run of a checkpoint folder …/runs/<name>/checkpoints/step_000123, or the folder's own name."""
    above = storage.parent(folder)
    return storage.name(storage.parent(above) if storage.name(above) == "checkpoints" else folder)


def load_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[GPT, Tokenizer, dict]:
    """(model, tokenizer, meta) of a checkpoint, or of a run's newest. dtype None: what is fastest on the device.

    On a CPU torch gets no more threads than this process may use CPUs: it does not know a container's quota.
    Raises FileNotFoundError when there is no checkpoint, ValueError when it is damaged, or holds weights that are not
    numbers.
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
        if not weight.detach().sum().isfinite():  # one pass, where isfinite() over all makes three
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
    """Give each rank its part of the saved state, whatever the number of ranks that saved it. Only that is read."""
    parts = defaultdict(list)  # "parameter|state" -> [(first row, row after the last, file)]
    for name in filter(_is_part, read_meta(folder)["files"]):  # not of the folder: a cut-off save may have left more
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
    """Of a nanochat checkpoint's meta. Raises KeyError for a size that it lacks, TypeError for a field unknown here.

    A field that came later than the model has the value that the model was trained with, which is not today's default.
    """
    config = {"n_kv_head": written["n_head"], "window_pattern": "L"} | written
    if lacking := sorted(config.keys() - written.keys()):
        said = ", ".join(f"{name} {config[name]}" for name in lacking)
        print(f"import: the meta is older than some fields, which are taken as they were then: {said}", flush=True)
    if missing := [field.name for field in fields(GPTConfig) if field.name not in config]:
        raise KeyError(f"model_config lacks {', '.join(missing)}")
    return GPTConfig(**config)


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
        state = _EncodingUnpickler(io.BytesIO(localize(uri).read_bytes())).load().state
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
