"""What a run measures and where it goes: metrics.jsonl, W&B, MFU, memory, bits per byte."""

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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat_ray import measuring, storage
from nanochat_ray.data.mixture import Part, shares
from nanochat_ray.model.gpt import GPT

WANDB_SECONDS = 20.0  # W&B may take so long to answer at the start, and to send the rest at the end
# Dense FLOP/s of one device in bf16 and, where known, in fp32 without TF32, from the vendors' data sheets; by a word of
# the device's name.
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
    """Peak FLOP/s of a GPU by (words of) its name. Raises ValueError for one that is not in the table."""
    matches = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name, re.IGNORECASE)]
    if not matches:
        raise ValueError(f"no peak FLOP/s known for GPU {name!r}: known are {', '.join(PEAK_FLOPS)}")
    return PEAK_FLOPS[max(matches, key=len)][dtype == torch.float32]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s against which MFU is counted: a table for GPUs, on a CPU the best of a few 2048³ matmuls in `dtype`.

    A GPU that the table lacks gives NaN, so that a run on new hardware does not stop for it.
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
    """Peak device memory on CUDA since the step began, peak resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def bits_per_byte(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: np.ndarray) -> float:
    """Σ nats / (ln 2 · Σ bytes) over the targets, summed over all ranks; NaN when no target stands for a byte.

    Batches are (idx, targets), both (B, T). Targets that stand for no bytes (special tokens) and ignored ones (−1)
    count in neither sum, so the number does not depend on the vocabulary.
    """
    device = model.lm_head.weight.device
    length = torch.as_tensor(token_bytes, dtype=torch.float64, device=device)
    nats, count = torch.zeros(2, dtype=torch.float64, device=device)
    rows = 0
    for idx, targets in batches:
        rows = rows or len(idx)
        missing = (0, 0, 0, max(rows - len(idx), 0))  # the last batch is filled up: its size would be compiled apart
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
    """{"val/bpb": the mean of the sources' bits per byte by their weights}, and of several "val/bpb/<name>" of each."""
    weights = shares([part.weight for part in by_source])
    whole = sum(float(share) * bpb for share, bpb in zip(weights, by_source.values(), strict=True))
    each = {f"val/bpb/{part.name}": bpb for part, bpb in by_source.items()} if len(by_source) > 1 else {}
    return {"val/bpb": whole} | each


class MetricsLog:
    """Appends to metrics.jsonl and W&B. A resumed run drops the lines its lost steps had written.

    Neither ends a run: what a full disk refuses is kept for later, and close notes what could not be written at all.
    An object store can't append, so there the file is kept here and put whole at every flush.
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
        self.lock = threading.Lock()  # flush comes from the thread that writes checkpoints
        self.wandb = WandB(run_dir, config, say)

    def _put(self, content: bytes) -> None:
        """Write a new file, and hold it open: what a worker left over from an earlier start still writes goes to the
        file that this one replaces."""
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
        """Raises OSError for what can't be written, which is then in `unwritten` still."""
        if not os.fstat(self.file).st_nlink and not os.path.exists(self.uri):  # somebody deleted it
            gone = self.file
            self._put(os.pread(gone, os.fstat(gone).st_size, 0))
            os.close(gone)
        while self.unwritten:  # a disk that becomes full takes a part
            self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]

    def flush(self) -> None:
        """Make sure of all lines so far, as who resumes from a checkpoint needs them. Raises OSError if it can't be."""
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
    """The lines of a run's metrics.jsonl; one that a crash tore is left out."""
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
    """The run's curves at W&B: online where there is a key, else in files that `wandb sync` brings there later.

    What fails at W&B is said once, and the run goes on without: metrics.jsonl has the same numbers.
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
        self.say(f"warning: {why}; the run goes on without it")

    def finish(self) -> None:
        """Waits at most WANDB_SECONDS for what is not sent yet."""
        if self.run is not None:
            with measuring.measuring("W&B", self._give_up):
                self.run.finish()


def _start_wandb(run_dir: str, config: dict, say: Callable[[str], None]):
    import wandb  # takes a second to import: only the rank that logs pays

    id_uri = storage.join(run_dir, "wandb_id")  # the same when the run resumes: one curve, not two
    if not storage.exists(id_uri):
        storage.write_bytes(id_uri, uuid.uuid4().hex.encode())
    parent = storage.name(storage.parent(run_dir))
    local = tempfile.mkdtemp(prefix="wandb-") if storage.is_remote(run_dir) else run_dir
    seconds = float(os.environ.get("WANDB_INIT_TIMEOUT", WANDB_SECONDS))
    start = partial(
        wandb.init,
        project="nanochat-ray",
        name=storage.name(run_dir),
        group=None if parent == "runs" else parent,  # the runs of a sweep are in a folder of its own
        id=storage.read_text(id_uri),
        resume="allow",
        dir=local,
        config=config,
        settings=wandb.Settings(silent=True, console="off", init_timeout=seconds, finish_timeout=seconds),
    )
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    try:
        run = start(mode=mode)
    except Exception as error:  # no answer is no reason to end a run
        why = measuring.one_line(error)
        say(f"warning: W&B does not answer, `wandb sync` brings it what is logged from here on ({why})")
        wandb.teardown()  # it would refuse another start of the same run
        run = start(mode="offline")
    # W&B counts steps of its own, which only grow. Ours is the axis: a resumed run logs lost steps again.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
