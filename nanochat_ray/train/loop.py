"""The training loop of pretraining, finetuning and RL. Ray Train runs it on every worker.

A step is saved before it is measured. If a measurement fails, the failure is noted and training continues.
"""

import gc
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from nanochat_ray import machine, storage
from nanochat_ray.data.loader import DeviceLoader, Loader, Rows, evaluation_batches
from nanochat_ray.data.mixture import Part, read_parts
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.kv_cache import cache_bytes
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.measuring import one_line
from nanochat_ray.model.compiling import why_not_compiled
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.scaling import (
    finetune_lr_multiplier,
    lr_multiplier,
    muon_momentum,
    muon_weight_decay,
    rl_lr_multiplier,
)
from nanochat_ray.train import checkpoint, network
from nanochat_ray.train.failing import own_gpu
from nanochat_ray.train.metrics import MetricsLog, bits_per_byte, mixed_bpb, peak_flops, peak_memory_mb

COMPILE_THREADS = 8  # at most per worker; torch's default is 32 processes for each worker of a host
UNTIMED_STEPS = 10  # the first steps compile and warm caches, so they don't count as training time
# A run has diverged if its smoothed loss is this many nats above random guessing, which costs ln(vocabulary). Such a
# loss does not recover, and it does not become NaN because the logits are capped. The first steps are exempt:
# finetuning may start there, because tokens that the base model never saw cost up to 30 nats.
DIVERGED_NATS, EXEMPT_STEPS = 2.0, 40
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|low on memory|MemoryError", re.I
)
# Matches the messages of Diverged, and of rollouts whose logits are not finite, after they have passed through Ray.
DIVERGED = re.compile(r"the loss is \S+ at step \d+[^\n]*|weights are not finite[^\n]*|output is not a number[^\n]*")
REQUESTS = (None, "save", "stop")  # the driver's possible requests after a step
TOGETHER_SECONDS = 60.0  # training continues after a failed measurement if all workers fail within this time


class Diverged(Exception):
    """The loss is NaN or far above random guessing. A new start would repeat it."""


class NotSaved(Exception):
    """The run is over, but its last checkpoint could not be written."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a worker needs, as plain data. In RL, a step's rows are its questions."""

    run_dir: str
    stage: str  # "pretrain", "sft" or "rl"; it selects the schedules
    rows: str | None  # folder with train/ and val/, or of a mixture; None for RL
    tokenizer: str
    model: dict  # arguments of GPTConfig
    total_batch_size: int  # tokens
    device_batch_size: Any  # rows in one forward pass, at most; None until launch chooses them
    num_iterations: int
    lrs: dict[str, float]
    weight_decay: float
    flops_per_token: int
    seed: int
    init_from: str | None  # checkpoint whose weights finetuning and RL start from; finetuning also takes its momentum
    eval_every: int
    eval_tokens: int
    sample_every: int
    save_every: int
    prompts: list[list[int]]  # token ids, for greedy samples
    dtype: str | None
    compile: bool | None
    recompute: bool
    fp8: bool

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.model["sequence_len"]


@dataclass(frozen=True)
class Measurement:
    """A measurement besides val/bpb, every `every` steps and at the end.

    It may take long, so each such step is saved before it.
    """

    every: int
    measure: Callable[[GPT, Tokenizer], dict[str, float]]  # called on every rank with the whole model; is pickled
    name: str = "scores"
    first: bool = False  # measure before the first step, too

    def is_due(self, step: int) -> bool:
        return due(step, self.every) and (step > 0 or self.first)


@dataclass(frozen=True)
class Learned:
    """The result of a step's forward and backward passes, besides the gradients."""

    loss: torch.Tensor  # sum on this rank
    count: float  # terms of the sum on all ranks
    tokens: int  # tokens read by all ranks
    metrics: dict[str, float]


@dataclass
class Progress:
    """The state of a run, saved in its checkpoints."""

    step: int = 0
    measured: int = -1  # the last step with all measurements; a resumed run makes up for missing ones
    position: int = 0  # rows consumed by all ranks since the start
    tokens: int = 0  # tokens read by all ranks
    smooth_loss: float = 0.0
    total_training_time: float = 0.0
    val_bpb: float | None = None

    def loss(self) -> float:
        """The moving average of the loss, debiased for its start at 0."""
        return self.smooth_loss / (1 - 0.9**self.step) if self.step else float("nan")

    def learn(self, loss: float, vocab_size: int) -> None:
        """Count a step with this loss in nats per token. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.step}: look at the data, or lower the learning rates")
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * loss
        self.step += 1
        guessing = math.log(vocab_size)
        if self.step >= EXEMPT_STEPS and self.loss() > guessing + DIVERGED_NATS:
            raise Diverged(
                f"the loss is {self.loss():.2f} at step {self.step}, far above {guessing:.2f} of random guessing: "
                "look at the data, or lower the learning rates"
            )


@dataclass
class Worker:
    """The state of one worker while it trains."""

    config: TrainConfig
    device: torch.device
    rank: int
    world_size: int
    tokenizer: Tokenizer
    model: GPT
    optimizer: MuonAdamW
    loader: DeviceLoader | None
    val_rows: dict[Part, Rows]  # by source
    learn: Callable[["Worker"], Learned]  # makes the gradients of the step at progress.position
    progress: Progress
    resumed: bool
    writer: checkpoint.Writer
    say: Callable[[str], None]
    measurement: Measurement | None = None
    left_out: set[str] = field(default_factory=set)  # measurements to skip, because they ended an earlier group
    newest: dict = field(default_factory=dict)  # metrics of the last step

    def __post_init__(self):
        self.optimizer.overlap(self.model)
        self.model.recompute = self.config.recompute
        if self.config.fp8:
            self.model.convert_to_fp8()
        if self.config.compile is not False and self.can_compile():
            self.model.compile_for_training()

    def can_compile(self) -> bool:
        """Whether all ranks can compile. If one can't, none does, because a step is as slow as its slowest rank."""
        found = checkpoint.gather(why_not_compiled(self.device.type), self.world_size)
        if why := next(filter(None, found), None):
            if self.rank == 0:
                self.say(f"warning: torch.compile does not work here, so steps take about 1.5 × as long: {why}")
            return False
        return True

    @property
    def attention(self) -> str:
        """The back end that compiled blocks run."""
        return self.model.transformer.h[0].attn.backend


def train_loop_per_worker(config: dict) -> None:
    """Entry point of a Ray Train worker. Ray Train calls it again after a failure. The monitor counts failures."""
    monitor, measurement, learn = (config.pop(name) for name in ("monitor", "measurement", "learn"))
    rank = ray.train.get_context().get_world_rank()
    ray.get(monitor.started.remote(rank, ray.get_runtime_context().get_node_id(), own_gpu()))
    try:
        network.meet()
        run(TrainConfig(**config), monitor, measurement, learn)
    except Exception as error:
        own = not may_pass(error) and isinstance(error, ValueError | OSError)  # our own messages, written for the user
        why = str(error).strip().partition("\n")[0] if own else one_line(error)
        ray.get(monitor.failed.remote(rank, why, may_pass(error), fault_of(error)))
        raise


def fault_of(error: Exception) -> str | None:
    """What may be broken: this worker's "GPU", its "host", or None if memory ran out."""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return None
    return "GPU" if "CUDA error" in str(error) else "host"


def may_pass(error: Exception) -> bool:
    """Whether a new start may help. It may after errors of machines, networks and workers, but not of the input."""
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    return isinstance(error, OSError | RuntimeError | MemoryError | ray.exceptions.RayError) and not isinstance(
        error, NotImplementedError | RecursionError
    )


def run(c: TrainConfig, monitor, measurement: Measurement | None, learn: Callable[[Worker], Learned]) -> None:
    """Train from the run's newest checkpoint to num_iterations or to a requested stop, and report the end."""
    left_out: set[str] | None = ray.get(monitor.left_out.remote())
    worker = start(c, monitor.say.remote, monitor.begins.remote, learn)
    worker.measurement, worker.left_out = measurement, set(left_out or ())
    progress = worker.progress
    log = None
    if worker.rank == 0:
        note = partial(monitor.unmeasured.remote, "metrics.jsonl", 0)
        log = MetricsLog(c.run_dir, asdict(c), progress.step, monitor.say.remote, note)
    if log and worker.resumed:
        monitor.say.remote(f"resuming from step {progress.step}, workers: {worker.world_size}")
    if log and worker.device.type == "cuda":
        monitor.say.remote(f"attention by {worker.attention}, at most {c.device_batch_size} rows in a forward pass")
    error = None
    try:
        train(worker, monitor, log)
    except (Diverged, NotSaved) as end:  # raised on all ranks together
        error = str(end)
        finish_save(worker, monitor)  # the checkpoint being written was taken before the loss diverged, so keep it
    worker.writer.close()
    if log:
        log.write_rest()
        ray.get(monitor.finish.remote({"step": progress.step, "error": error}))
        log.close()  # W&B may take a while; a driver that was asked to stop does not wait for it


def train(worker: Worker, monitor, log: MetricsLog | None) -> None:
    c, progress = worker.config, worker.progress
    begins(worker, monitor, "timing matrix products, for MFU")
    peak = all_reduce(worker, [peak_flops(worker.device, worker.model.compute_dtype)])[0]
    saved_step, request = progress.step if worker.resumed else None, None
    frozen = False
    while True:
        last = progress.step == c.num_iterations
        ending = last or request == "stop"
        other = worker.measurement
        measures = other and request != "stop" and (last or other.is_due(progress.step))
        saves = ending or measures or request == "save" or is_due(progress.step, c.save_every)
        if saves and saved_step != progress.step:
            begins(worker, monitor, f"saving step {progress.step}")
            finish_save(worker, monitor)  # the previous checkpoint
            start_save(worker, log)
            saved_step = progress.step
        if ending or measures or request == "save":
            error = finish_save(worker, monitor)
            if ending and error:
                raise NotSaved(f"step {progress.step} could not be saved: {error}; {rescue(worker)}")
            if error:
                saved_step = None
            if worker.rank == 0 and request == "save":
                monitor.saved.remote(progress.step)
        if saves:
            begins(worker, monitor, None)
        if request != "stop" and progress.measured != progress.step:
            observe(worker, monitor, log, last)
            if saved_step == progress.step:
                note_measured(worker, monitor)
        if ending:
            return
        begins(worker, monitor, "compiling, and the first step" if worker.model.compiled else "the first step", frozen)
        metrics, request = train_step(worker, peak, monitor)
        if log:
            log.log(metrics)
        if not frozen:  # objects created so far live until the end; exclude them from garbage collection
            gc.collect()
            gc.freeze()
            frozen = True


def rescue(worker: Worker) -> str:
    """Save the last step to this host's own disk, because the run's folder failed. Returns a message with the place."""
    run_dir = worker.config.run_dir
    where = storage.disk(run_dir)
    if worker.rank > 0:
        return where
    folder = os.path.join(tempfile.gettempdir(), f"nanochat_ray-{storage.name(run_dir)}")
    try:
        optimizer = worker.optimizer if worker.world_size == 1 else None
        given = worker.model, optimizer, worker.tokenizer, checkpoint_meta(worker)
        saved = checkpoint.save_checkpoint(folder, worker.progress.step, *given)
        return f"{where}; it is in {saved} instead: make room, and move it to {storage.join(run_dir, 'checkpoints')}"
    except (OSError, ValueError) as error:
        return f"{where}; nor in {folder}: {one_line(error)}"


def begins(worker: Worker, monitor, what: str | None, again: bool = False) -> None:
    """Tell the driver that work starts that may take long."""
    if worker.rank == 0 and not again:
        monitor.begins.remote(what)


def is_due(step: int, every: int) -> bool:
    return step > 0 and due(step, every)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def start(
    c: TrainConfig,
    say: Callable[[str], None] = print,
    begins: Callable[[str], None] = lambda what: None,
    learn: Callable[[Worker], Learned] | None = None,
) -> Worker:
    """Build the worker with model and optimizer, from the run's newest checkpoint if there is one."""
    device = ray.train.torch.get_device()
    context = ray.train.get_context()
    threads = cpu_threads(device)
    torch.set_num_threads(threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(threads, COMPILE_THREADS)))
    rank, world_size = context.get_world_rank(), context.get_world_size()

    torch.manual_seed(c.seed)  # the same weights on every rank
    if rank == 0:
        begins(f"building the model, {c.model['n_layer']} layers of {c.model['n_embd']} channels")
    with device:  # initialize on the device, because a CPU would take long for a large model
        model = GPT(GPTConfig(**c.model))
    model.init_weights()
    if rank == 0:
        begins("looking for checkpoints and rows")
    resume_from = checkpoint.latest_checkpoint(c.run_dir, rank=rank, world_size=world_size, say=say)
    if rank == 0:
        checkpoint.remove_unfinished(c.run_dir)
    if origin := resume_from or c.init_from:
        checkpoint.load_weights(model, origin)
    model.set_compute_dtype(checkpoint.compute_dtype(c.dtype, device))
    optimizer = build_optimizer(model, **c.lrs, weight_decay=c.weight_decay)
    momentum_from = resume_from if c.stage == "rl" else origin
    if momentum_from and checkpoint.has_optimizer(momentum_from):  # an imported checkpoint has no optimizer state
        checkpoint.load_optimizer(optimizer, momentum_from)
    progress = Progress()
    if resume_from:
        saved = checkpoint.read_meta(resume_from)["progress"]
        progress = Progress(**{"tokens": saved["position"] * model.config.sequence_len} | saved)

    tokenizer, loader, val_rows = Tokenizer.load(c.tokenizer), None, {}
    if c.rows:
        parts = read_parts(c.rows)
        rows, weights = Rows(*(storage.join(part.rows, "train") for part in parts)), [part.weight for part in parts]
        val_rows = {part: Rows(storage.join(part.rows, "val")) for part in parts}
        loader = DeviceLoader(Loader(rows, c.rows_per_step, rank, world_size, c.seed, weights), device)
    return Worker(
        config=c,
        device=device,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        loader=loader,
        val_rows=val_rows,
        learn=learn or learn_rows,
        progress=progress,
        resumed=resume_from is not None,
        writer=checkpoint.Writer(c.run_dir, tokenizer, rank, world_size),
        say=say,
    )


def cpu_threads(device: torch.device) -> int:
    """CPU threads for this worker: one per CPU that Ray assigned to it.

    Ray assigns no CPUs to a GPU worker, so the GPU workers of a host share its CPUs evenly.
    """
    if device.type == "cpu":
        assigned = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        return max(1, min(assigned, machine.available_cpus()))
    return max(1, machine.available_cpus() // ray.train.get_context().get_local_world_size())


def all_reduce(worker: Worker, values: list[float]) -> list[float]:
    """Sums over the ranks."""
    sums = torch.tensor(values, dtype=torch.float64, device=worker.device)
    if checkpoint.several(worker.world_size):
        dist.all_reduce(sums)
    return sums.tolist()


def train_step(worker: Worker, peak: float, monitor) -> tuple[dict, str | None]:
    """One optimizer step. Returns its metrics, and the driver's request, one of REQUESTS, alike on all ranks.

    It also finishes a checkpoint if all ranks have written their parts.
    """
    c, progress = worker.config, worker.progress
    if worker.device.type == "cuda":
        torch.cuda.current_stream(worker.device).synchronize()  # a checkpoint's copies have their own stream
        torch.cuda.reset_peak_memory_stats(worker.device)  # don't count evaluations and samples in a step's peak
    began = time.perf_counter()
    answer = monitor.request.remote() if worker.rank == 0 else None
    multiplier = set_rates(worker.optimizer, c, progress.step)
    learned = worker.learn(worker)
    worker.writer.wait_for_copies()  # the optimizer overwrites weights that a checkpoint may still be copying
    worker.optimizer.step()
    request = float(REQUESTS.index(ray.get(answer))) if answer else 0.0
    written = float(worker.writer.written())
    loss_sum, request, written = all_reduce(worker, [learned.loss.item(), request, written])
    seconds = time.perf_counter() - began
    if written == worker.world_size:
        finish_save(worker, monitor)

    position = progress.position
    progress.learn(loss_sum / learned.count, worker.model.config.vocab_size)
    progress.position += c.rows_per_step
    progress.tokens += learned.tokens
    if progress.step > UNTIMED_STEPS:
        progress.total_training_time += seconds
    measured = {
        "train/loss": progress.loss(),
        "train/lrm": multiplier,
        "train/dt": seconds,
        "train/tok_per_sec": learned.tokens / seconds,
        "train/mfu": c.flops_per_token * learned.tokens / seconds / peak,
        "train/position": position,  # rows consumed by all ranks before this step
        "train/world_size": worker.world_size,
        "train/peak_memory_mb": peak_memory_mb(worker.device),
    }
    metrics = metrics_of(worker) | measured | learned.metrics
    worker.newest = metrics
    show(worker, monitor)
    return metrics, REQUESTS[int(request)]


def show(worker: Worker, monitor) -> None:
    """Send the newest step's metrics to the driver, with the last val/bpb."""
    if worker.rank == 0 and worker.newest:
        monitor.update.remote(worker.newest | {"val/bpb": worker.progress.val_bpb})


def observe(worker: Worker, monitor, log: MetricsLog | None, last: bool) -> None:
    """Make the measurements that are due after this step. If all succeed, note that in the progress."""
    c, progress, other = worker.config, worker.progress, worker.measurement
    done = True
    if c.rows and (last or due(progress.step, c.eval_every)):
        done &= attempt(worker, monitor, "val/bpb", partial(measure_bpb, worker, monitor, log))
        show(worker, monitor)
    if other and (last or other.is_due(progress.step)):
        done &= attempt(worker, monitor, other.name, partial(measure, worker, monitor, log))
    if worker.rank == 0 and c.prompts and (last or due(progress.step, c.sample_every)):
        attempt(worker, monitor, "samples", partial(write_samples, worker), ranks=1)
    if done:
        progress.measured = progress.step


def attempt(worker: Worker, monitor, what: str, function: Callable[[], bool | None], ranks: int | None = None) -> bool:
    """Call a measuring function on all ranks, or on one. Returns True if it measured. A failure is noted.

    If only some ranks fail, the others wait for them in a collective. Then this raises, Ray restarts the workers, and
    these skip the measurement. They also skip a measurement during which workers died twice. An error of a collective
    is raised, because it may mean a lost worker.
    """
    name, ranks = f"{what} of step {worker.progress.step}", ranks or worker.world_size
    if name in worker.left_out:
        return False
    begins(worker, monitor, f"measuring {name}")
    try:
        complete = function() is not False
    except Exception as error:
        if ranks > 1 and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise
        ray.get(monitor.unmeasured.remote(name, worker.rank, f"{name} failed: {one_line(error)}"))
        deadline = time.monotonic() + TOGETHER_SECONDS
        while ray.get(monitor.failed_ranks.remote(name)) < ranks:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        return False
    if worker.rank == 0:
        monitor.ended.remote()
    return complete


def note_measured(worker: Worker, monitor) -> None:
    """Add this step's measurements to its checkpoint."""
    changes = {"progress": asdict(worker.progress), "val/bpb": worker.progress.val_bpb}
    try:
        worker.writer.amend(worker.progress.step, changes)
    except Exception as error:
        name = f"noting val/bpb in the checkpoint of step {worker.progress.step}"
        monitor.unmeasured.remote(name, worker.rank, f"{name} failed: {one_line(error)}")


def measure_bpb(worker: Worker, monitor, log: MetricsLog | None) -> bool:
    """Measure and log val/bpb. Returns False if a stop was requested meanwhile."""
    worker.progress.val_bpb = None  # forget the value of an earlier step
    measured = evaluate(worker, worker.tokenizer.token_bytes(), monitor)
    if measured is None:
        return False
    worker.progress.val_bpb = measured["val/bpb"]
    if log:
        log.log(metrics_of(worker) | measured)
    return True


def evaluate(worker: Worker, token_bytes, monitor) -> dict[str, float] | None:
    """val/bpb over eval_tokens of validation rows, and for a mixture that of each source, with equal shares of rows.

    The ranks share the rows. Returns None if a stop was requested meanwhile."""
    c, stopped, by_source = worker.config, [], {}
    num_rows = max(c.eval_tokens // worker.model.config.sequence_len // len(worker.val_rows), worker.world_size)
    for part, rows in worker.val_rows.items():
        batches = evaluation_batches(rows, num_rows, c.device_batch_size, worker.rank, worker.world_size)
        by_source[part] = bits_per_byte(worker.model, until_stop(batches, monitor, stopped), token_bytes)
        if all_reduce(worker, [len(stopped)])[0]:
            return None
    return mixed_bpb(by_source)


def until_stop(batches: Iterable, monitor, stopped: list) -> Iterator:
    """The batches, until the driver requests a stop. It is asked once a second, and a stop is noted in `stopped`."""
    looked = time.monotonic()
    for batch in batches:
        if time.monotonic() > looked + 1:
            looked = time.monotonic()
            if ray.get(monitor.stopping.remote()):
                stopped.append(True)
                return
        yield batch


def learn_rows(worker: Worker) -> Learned:
    """Gradients of the mean loss over a step's rows, in micro-batches.

    All learned targets of the step have the same weight, on every rank and in every micro-batch.
    """
    c = worker.config
    assert worker.loader
    with torch.profiler.record_function("data"):
        idx, targets, learned = worker.loader.step(worker.progress.position)
    count = float(c.total_batch_size)
    if worker.loader.loader.rows.masks:
        count = max(all_reduce(worker, [learned])[0], 1.0)
    loss_sum = torch.zeros((), device=worker.device)
    parts = math.ceil(len(idx) / c.device_batch_size)
    for i, (x, y) in enumerate(zip(idx.tensor_split(parts), targets.tensor_split(parts), strict=True)):
        loss = worker.model(x, y, loss_reduction="sum")
        if i == parts - 1:
            worker.optimizer.reduce_in_backward()
        (loss * (worker.world_size / count)).backward()  # the optimizer takes the mean over ranks
        loss_sum += loss.detach()
    epoch = worker.loader.loader.epoch(worker.progress.position + c.rows_per_step)
    return Learned(loss_sum, count, c.total_batch_size, {"train/epoch": epoch})


def set_rates(optimizer: MuonAdamW, c: TrainConfig, step: int) -> float:
    """Set the step's learning rates, momentum and weight decay. Returns the factor of the rates."""
    n = c.num_iterations
    multiplier = {"pretrain": lr_multiplier, "sft": finetune_lr_multiplier, "rl": rl_lr_multiplier}[c.stage](step, n)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon" and c.stage == "pretrain":
            group["momentum"] = muon_momentum(step, n)
            group["weight_decay"] = muon_weight_decay(step, n, c.weight_decay)
        if c.stage == "rl":
            group["weight_decay"] = 0.0
    return multiplier


def metrics_of(worker: Worker) -> dict:
    c, progress = worker.config, worker.progress
    return {
        "step": progress.step,
        "total_training_flops": float(c.flops_per_token) * progress.tokens,
        "total_training_time": progress.total_training_time,
    }


def start_save(worker: Worker, log: MetricsLog | None) -> None:
    """Start a checkpoint of the current state. It is written while training continues."""
    progress = worker.progress
    worker.optimizer.gather_exactly()
    sums = torch.stack([p.detach().sum().float() for p in worker.model.parameters()])
    if all_reduce(worker, [float(not sums.isfinite().all())])[0]:  # stop if the copy of any rank is bad
        raise Diverged(f"weights are not finite after step {progress.step}: look at the data, or lower the rates")
    worker.writer.start(
        progress.step, worker.model, worker.optimizer, checkpoint_meta(worker), log.flush if log else None
    )


def checkpoint_meta(worker: Worker) -> dict:
    c, progress = worker.config, worker.progress
    return {
        "stage": c.stage,
        "progress": asdict(progress),
        "val/bpb": progress.val_bpb,
        # Finetuning inherits these.
        "lrs": c.lrs,
        "total_batch_size": c.total_batch_size,
    }


def finish_save(worker: Worker, monitor) -> str | None:
    """Finish the checkpoint in progress, if any. Returns None, or why it could not be written, alike on all ranks."""
    error = worker.writer.finish()
    if error and worker.rank == 0:
        monitor.say.remote(f"checkpoint: step {worker.writer.meta['step']} is not saved: {error}")
    return error


def measure(worker: Worker, monitor, log: MetricsLog | None) -> None:
    """Make and log the run's Measurement. It does not count as training time."""
    assert worker.measurement
    worker.optimizer.wait()
    with worker.model.uncompiled():  # each prompt length would compile again
        measured = worker.measurement.measure(worker.model, worker.tokenizer)
    if log:
        log.log(metrics_of(worker) | measured)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in measured.items() if "/" not in name)
        monitor.say.remote(f"step {worker.progress.step}: {scores}")


def write_samples(worker: Worker) -> None:
    """Add greedy continuations to samples.md."""
    append_samples(worker, sample(worker))


def append_samples(worker: Worker, samples: list[str]) -> None:
    """Add lines of Markdown about this step to the end of samples.md."""
    lines = [f"## step {worker.progress.step}", "", *samples]
    uri = storage.join(worker.config.run_dir, "samples.md")
    before = storage.read_text(uri) if storage.exists(uri) and worker.progress.step else ""
    before = before.partition(lines[0] + "\n")[0]  # remove what a resumed run writes again
    storage.write_bytes(uri, (before + "\n".join(lines) + "\n\n").encode())


def sample(worker: Worker) -> list[str]:
    """One line of Markdown per prompt of the run: the prompt and its greedy continuation."""
    worker.optimizer.wait()
    model, prompts, tokens = worker.model, worker.config.prompts, 24
    length = max(map(len, prompts)) + tokens  # a small cache, because training needs the memory
    room = cache_bytes(model.config, len(prompts), length, model.compute_dtype.itemsize)
    engine = Engine(model, worker.tokenizer, len(prompts), room)
    with model.uncompiled():  # each length would compile again
        completions = engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0))
    lines = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = worker.tokenizer.decode(prompt[1:]) + "**" + worker.tokenizer.decode(completion.tokens) + "**"
        lines.append("- " + " ".join(text.split()))
    return lines
