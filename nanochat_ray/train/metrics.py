"""Measurements of a run and their logs: MFU, memory, bits per byte; metrics.jsonl and W&B."""

import json
import math
import os
import re
import resource
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat_ray import measuring, storage
from nanochat_ray.data.mixture import Part, shares
from nanochat_ray.model.gpt import GPT

WANDB_SECONDS = 20.0  # timeout for W&B's first answer, and for sending the rest at the end
# Dense FLOP/s of one device in bf16 and in fp32 without TF32 (NaN: unknown), from the vendors' data sheets. The key is
# a part of the device's name.
PEAK_FLOPS = {
    "GB200": (2.5e15, 80e12),
    "B200": (2.25e15, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, math.nan),
    "4090": (165e12, 82.6e12),
    "5090": (209e12, 104.8e12),
}


def gpu_peak_flops(name: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Peak FLOP/s of a GPU by its name. Raises ValueError if no key of the table is in the name."""
    matches = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name, re.IGNORECASE)]
    if not matches:
        raise ValueError(f"no peak FLOP/s known for GPU {name!r}: known are {', '.join(PEAK_FLOPS)}")
    return PEAK_FLOPS[max(matches, key=len)][dtype == torch.float32]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s for MFU: from a table for GPUs, else from the fastest of five 2048³ matmuls in `dtype`.

    NaN for a GPU that is not in the table, so that runs work on new hardware.
    """
    if device.type == "cuda":
        try:
            return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)
        except ValueError:
            return math.nan
    a, b = torch.randn(2, 2048, 2048, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: on CUDA, of the device since the step began; on a CPU, the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def bits_per_byte(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: np.ndarray) -> float:
    """Σ nats / (ln 2 · Σ bytes) over the targets of all ranks. NaN if no target stands for a byte.

    batches: (idx, targets), both int64 (B, T). token_bytes: int32 (vocab_size,). Special tokens, which stand for no
    bytes, and ignored targets (−1) count in neither sum, so the result does not depend on the vocabulary.
    """
    device = model.lm_head.weight.device
    length = torch.as_tensor(token_bytes, dtype=torch.float64, device=device)
    nats, count = torch.zeros(2, dtype=torch.float64, device=device)
    rows = 0
    for idx, targets in batches:
        rows = rows or len(idx)
        missing = (0, 0, 0, max(rows - len(idx), 0))  # pad the last batch, because another size would compile again
        idx, targets = F.pad(idx, missing), F.pad(targets, missing, value=-1)
        idx, targets = idx.to(device), targets.to(device)
        losses = model(idx, targets, loss_reduction="none").double()
        n_bytes = torch.where(targets >= 0, length[targets.clamp(min=0)], 0)
        nats += (losses * (n_bytes > 0)).sum()
        count += n_bytes.sum()
    sums = torch.stack([nats, count])
    if dist.is_initialized():
        dist.all_reduce(sums)
    nats, count = sums.tolist()
    return nats / (math.log(2) * count) if count else math.nan


def mixed_bpb(by_source: dict[Part, float]) -> dict[str, float]:
    """{"val/bpb": mean over sources, weighted by their shares}. Several sources add "val/bpb/<name>" for each."""
    weights = shares([part.weight for part in by_source])
    whole = sum(float(share) * bpb for share, bpb in zip(weights, by_source.values(), strict=True))
    each = {f"val/bpb/{part.name}": bpb for part, bpb in by_source.items()} if len(by_source) > 1 else {}
    return {"val/bpb": whole} | each


class MetricsLog:
    """Appends to metrics.jsonl and W&B. A resumed run removes the lines of steps that were lost.

    A failure never ends the run. Lines that a full disk refuses are kept and written later; close notes a final
    failure. Object stores can't append, so for them the lines are kept in memory and written as a whole at each flush.
    """

    def __init__(
        self,
        run_dir: str,
        config: dict,
        step: int,
        say: Callable[[str], None] = print,
        note: Callable[[str], None] = measuring.note,
    ):
        self.uri, self.note = storage.join(run_dir, "metrics.jsonl"), note
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if step else []
        self.lines = [(storage.to_json(line) + "\n").encode() for line in kept]
        self.file: int | None = None
        self._put(b"".join(self.lines))
        self.unwritten = b""
        self.lock = threading.Lock()  # the thread that writes checkpoints calls flush
        self.wandb = WandB(run_dir, config, say)

    def _put(self, content: bytes) -> None:
        """Write a new file and keep it open. A leftover worker of an earlier start still writes to the old, replaced
        file."""
        storage.write_bytes(self.uri, content)
        if not storage.is_remote(self.uri):
            self.file = os.open(self.uri, os.O_RDWR | os.O_APPEND)

    def log(self, metrics: dict) -> None:
        line = (storage.to_json(metrics) + "\n").encode()
        with self.lock:
            if self.file is None:
                self.lines.append(line)
            else:
                self.unwritten += line
                with suppress(OSError):
                    self._append()
        self.wandb.log(metrics)

    def _append(self) -> None:
        """Write the unwritten lines. Raises OSError if that fails; the rest stays in `unwritten`."""
        assert self.file is not None
        if not os.fstat(self.file).st_nlink and not os.path.exists(self.uri):  # someone has deleted the file
            gone = self.file
            self._put(os.pread(gone, os.fstat(gone).st_size, 0))
            os.close(gone)
        while self.unwritten:  # a disk that becomes full may take only a part
            self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]

    def flush(self) -> None:
        """Put all lines on disk, because a run that resumes from a checkpoint needs them. Raises OSError."""
        if self.file is None:
            with self.lock:
                content = b"".join(self.lines)
            storage.write_bytes(self.uri, content)
            return
        with self.lock:
            self._append()
        os.fsync(self.file)

    def write_rest(self) -> None:
        with measuring.measuring(f"writing the last lines of {self.uri}", self.note):
            self.flush()

    def close(self) -> None:
        self.write_rest()
        self.wandb.finish()
        if self.file is not None:
            os.close(self.file)


def read_metrics(run_dir: str) -> list[dict]:
    """The lines of a run's metrics.jsonl, without a line that a crash cut off."""
    uri = storage.join(run_dir, "metrics.jsonl")
    if not storage.exists(uri):
        return []
    lines = []
    for line in storage.read_bytes(uri).splitlines():
        with suppress(ValueError):
            if isinstance(read := json.loads(line), dict) and isinstance(read.get("step"), int):
                lines.append(read)
    return lines


class WandB:
    """The run's curves at W&B: online if there is a key, else in files that `wandb sync` uploads later.

    A failure of W&B is printed once, and the run continues without it. metrics.jsonl has the same numbers.
    """

    def __init__(self, run_dir: str, config: dict, say: Callable[[str], None]):
        self.run, self.say = None, say
        if os.environ.get("WANDB_MODE") == "disabled":
            return
        with measuring.measuring("W&B", self._give_up):
            self.run = _start_wandb(run_dir, config, say)

    def log(self, metrics: dict) -> None:
        if self.run is not None:
            with measuring.measuring("W&B", self._give_up):
                self.run.log(metrics)

    def _give_up(self, why: str) -> None:
        self.run = None
        self.say(f"warning: {why}; the run continues without it")

    def finish(self) -> None:
        """Wait at most WANDB_SECONDS until everything is sent."""
        if self.run is not None:
            with measuring.measuring("W&B", self._give_up):
                self.run.finish()


def _start_wandb(run_dir: str, config: dict, say: Callable[[str], None]):
    import wandb  # it takes a second, so import it only on the rank that logs

    id_uri = storage.join(run_dir, "wandb_id")  # a resumed run uses the same id, so that there is one curve
    if not storage.exists(id_uri):
        storage.write_bytes(id_uri, uuid.uuid4().hex.encode())
    parent = storage.name(storage.parent(run_dir))
    local = tempfile.mkdtemp(prefix="wandb-") if storage.is_remote(run_dir) else run_dir
    seconds = float(os.environ.get("WANDB_INIT_TIMEOUT", WANDB_SECONDS))
    start = partial(
        wandb.init,
        project="nanochat-ray",
        name=storage.name(run_dir),
        group=None if parent == "runs" else parent,  # a sweep's folder groups its runs
        id=storage.read_text(id_uri),
        resume="allow",
        dir=local,
        config=config,
        settings=wandb.Settings(silent=True, console="off", init_timeout=seconds, finish_timeout=seconds),
    )
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    try:
        run = start(mode=mode)
    except Exception as error:  # don't end the run because W&B does not answer
        why = measuring.one_line(error)
        say(f"warning: W&B does not answer; logging to files, which `wandb sync` uploads later ({why})")
        wandb.teardown()  # without it, W&B would refuse to start the same run again
        run = start(mode="offline")
    # Use our step as the axis. W&B's own step can only grow, but a resumed run logs lost steps again.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
