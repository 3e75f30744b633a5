"""The one training loop, shared by pretraining, finetuning and RL, as Ray Train runs it on every worker.

A step's checkpoint comes before what is measured of it. A measurement that fails is noted, and training goes on.
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

COMPILE_THREADS = 8  # of a worker at most: each of a host would start 32 processes that compile
UNTIMED_STEPS = 10  # the first steps compile and warm caches: they are left out of the training time
# A smoothed loss this many nats above ln(vocabulary), the cost of guessing blindly, does not come back; nor does it
# become NaN by itself, as the logits are capped. Finetuning may begin there, with tokens that the base never saw and
# that cost up to 30 nats: the first steps are not judged.
HOPELESS_NATS, UNJUDGED_STEPS = 2.0, 40
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|low on memory|MemoryError", re.I
)
# How Diverged, and rollouts of a model that gives no number, read once they have passed through Ray.
DIVERGED = re.compile(r"the loss is \S+ at step \d+[^\n]*|weights are not finite[^\n]*|output is not a number[^\n]*")
REQUESTS = (None, "save", "stop")  # what the driver may ask for after a step
TOGETHER_SECONDS = 60.0  # in which all workers must have failed in a measurement for training to go on after it


class Diverged(Exception):
    """The loss is no number any more, or hopeless. Starting again would only repeat it."""


class NotSaved(Exception):
    """The run is over, but its last checkpoint could not be written."""


@dataclass(frozen=True)
class TrainConfig:
    """All that a worker needs, as plain data. Batch sizes: device in rows, total in tokens.

    In RL a step's rows are its questions. It has no folder of rows.
    """

    run_dir: str
    stage: str  # "pretrain", "sft" or "rl": which schedules apply
    rows: str | None  # folder with train/ and val/, or of a mixture
    tokenizer: str
    model: dict  # of GPTConfig
    total_batch_size: int
    device_batch_size: int  # at most, in one forward pass
    num_iterations: int
    lrs: dict[str, float]
    weight_decay: float
    flops_per_token: int
    seed: int
    init_from: str | None  # checkpoint whose weights a finetuning starts from, and but for RL its momentum
    eval_every: int
    eval_tokens: int
    sample_every: int
    save_every: int
    prompts: list[list[int]]  # sampled greedily, as token ids
    dtype: str | None
    compile: bool | None
    recompute: bool
    fp8: bool

    @property
    def rows_per_step(self) -> int:
        return self.total_batch_size // self.model["sequence_len"]


@dataclass(frozen=True)
class Measurement:
    """What else is measured during training, besides val/bpb: every `every` steps and at the end.

    It may take long, so there is a checkpoint of each such step before.
    """

    every: int
    measure: Callable[[GPT, Tokenizer], dict[str, float]]  # on every rank, each with the whole model; pickled to them
    name: str = "scores"
    first: bool = False  # before the first step, too

    def is_due(self, step: int) -> bool:
        return due(step, self.every) and (step > 0 or self.first)


@dataclass(frozen=True)
class Learned:
    """What a step's forwards and backwards gave: gradients in the model, and this."""

    loss: torch.Tensor  # this rank's, not divided by the count
    count: float  # of what the loss is the mean over, on all ranks together
    tokens: int  # read by all ranks
    metrics: dict[str, float]


@dataclass
class Progress:
    """Where a run stands. position counts rows consumed by all ranks since the start.

    measured: the last step of which all that was due is measured. A run that goes on from a checkpoint that was not
    measured makes up for it. tokens: that all ranks have read.
    """

    step: int = 0
    measured: int = -1
    position: int = 0
    tokens: int = 0
    smooth_loss: float = 0.0
    total_training_time: float = 0.0
    val_bpb: float | None = None

    def loss(self) -> float:
        """The moving average of the loss, debiased for having started at 0."""
        return self.smooth_loss / (1 - 0.9**self.step) if self.step else float("nan")

    def learn(self, loss: float, vocab_size: int) -> None:
        """Count a step of this loss, in nats a token. Raises Diverged."""
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.step}: look at the data, or lower the learning rates")
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * loss
        self.step += 1
        blind = math.log(vocab_size)
        if self.step >= UNJUDGED_STEPS and self.loss() > blind + HOPELESS_NATS:
            raise Diverged(
                f"the loss is {self.loss():.2f} at step {self.step}, and guessing blindly would cost {blind:.2f}: "
                "look at the data, or lower the learning rates"
            )


@dataclass
class Worker:
    """What one worker holds while it trains."""

    config: TrainConfig
    device: torch.device
    rank: int
    world_size: int
    tokenizer: Tokenizer
    model: GPT
    optimizer: MuonAdamW
    loader: DeviceLoader | None
    val_rows: dict[Part, Rows]  # by source
    learn: Callable[["Worker"], Learned]  # from the step that begins at progress.position
    progress: Progress
    resumed: bool
    writer: checkpoint.Writer
    say: Callable[[str], None]
    measurement: Measurement | None = None
    left_out: set[str] = field(default_factory=set)  # measurements that ended an earlier group of workers
    newest: dict = field(default_factory=dict)  # metrics

    def __post_init__(self):
        self.optimizer.overlap(self.model)
        self.model.recompute = self.config.recompute
        if self.config.fp8:
            self.model.convert_to_fp8()
        if self.config.compile is not False and self.can_compile():
            self.model.compile_for_training()

    def can_compile(self) -> bool:
        """The same on all ranks, whose steps take as long as the slowest's."""
        found = checkpoint.gather(why_not_compiled(self.device.type), self.world_size)
        if why := next(filter(None, found), None):
            if self.rank == 0:
                self.say(f"warning: torch.compile does not work here, steps take a half longer without: {why}")
            return False
        return True

    @property
    def attention(self) -> str:
        """The back end that compiled blocks run."""
        return self.model.transformer.h[0].attn.backend


def train_loop_per_worker(config: dict) -> None:
    """What Ray Train runs on every worker, and again after a failure, which the monitor hears of and counts."""
    monitor, measurement, learn = (config.pop(name) for name in ("monitor", "measurement", "learn"))
    rank = ray.train.get_context().get_world_rank()
    ray.get(monitor.started.remote(rank, ray.get_runtime_context().get_node_id(), own_gpu()))
    try:
        network.meet()
        run(TrainConfig(**config), monitor, measurement, learn)
    except Exception as error:
        own = not may_pass(error) and isinstance(error, ValueError | OSError)  # these are written for the user
        why = str(error).strip().partition("\n")[0] if own else one_line(error)
        ray.get(monitor.failed.remote(rank, why, may_pass(error), fault_of(error)))
        raise


def fault_of(error: Exception) -> str | None:
    """What may be at fault: this worker's GPU, its host, or neither, when memory ran out."""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return None
    return "GPU" if "CUDA error" in str(error) else "host"


def may_pass(error: Exception) -> bool:
    """Whether starting again may help: after what machines, networks and lost workers do, and not after wrong input."""
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    return isinstance(error, OSError | RuntimeError | MemoryError | ray.exceptions.RayError) and not isinstance(
        error, NotImplementedError | RecursionError
    )


def run(c: TrainConfig, monitor, measurement: Measurement | None, learn: Callable[[Worker], Learned]) -> None:
    """Train from the run's newest checkpoint to num_iterations or a requested stop; the monitor is told which."""
    left_out = ray.get(monitor.left_out.remote())
    worker = start(c, monitor.say.remote, monitor.begins.remote, learn)
    worker.measurement, worker.left_out = measurement, set(left_out or ())
    progress = worker.progress
    log = None
    if worker.rank == 0:
        note = partial(monitor.unmeasured.remote, "metrics.jsonl", 0)
        log = MetricsLog(c.run_dir, asdict(c), progress.step, monitor.say.remote, note)
    if log and worker.resumed:
        monitor.say.remote(f"going on from step {progress.step}, workers: {worker.world_size}")
    if log and worker.device.type == "cuda":
        monitor.say.remote(f"attention by {worker.attention}, at most {c.device_batch_size} rows in a forward pass")
    error = None
    try:
        train(worker, monitor, log)
    except (Diverged, NotSaved) as end:  # the same on every rank
        error = str(end)
        finish_save(worker, monitor)  # one that is being written is from before a divergence
    worker.writer.close()
    if log:
        log.write_rest()
        ray.get(monitor.finish.remote({"step": progress.step, "error": error}))
        log.close()  # W&B may take a while, for which a driver that was told to stop does not wait


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
            finish_save(worker, monitor)  # the one before
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
        if not frozen:  # what the first step leaves stays to the end: the garbage collector need not look at it again
            gc.collect()
            gc.freeze()
            frozen = True


def rescue(worker: Worker) -> str:
    """Where the weights of a last step are that the run's folder did not take: on this host's own disk."""
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
    """Tell the driver what may take long from here on."""
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
    """Build the model and the optimizer, from the run's newest checkpoint when there is one."""
    device = ray.train.torch.get_device()
    context = ray.train.get_context()
    if device.type == "cpu":
        assigned = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
        threads = min(assigned, machine.available_cpus())
    else:  # Ray gives a worker with a GPU one thread
        threads = machine.available_cpus() // context.get_local_world_size()
    torch.set_num_threads(max(1, threads))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(threads, COMPILE_THREADS))))
    rank, world_size = context.get_world_rank(), context.get_world_size()

    torch.manual_seed(c.seed)  # the same weights on every rank
    if rank == 0:
        begins(f"building the model, {c.model['n_layer']} layers of {c.model['n_embd']} channels")
    with device:  # a CPU would take long to fill a large model
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
    if momentum_from and checkpoint.has_optimizer(momentum_from):  # an imported checkpoint has none
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


def all_reduce(worker: Worker, values: list[float]) -> list[float]:
    """Sums over the ranks."""
    sums = torch.tensor(values, dtype=torch.float64, device=worker.device)
    if checkpoint.several(worker.world_size):
        dist.all_reduce(sums)
    return sums.tolist()


def train_step(worker: Worker, peak: float, monitor) -> tuple[dict, str | None]:
    """One optimizer step. Returns its metrics, and which of REQUESTS the monitor has (the same on every rank).

    Ends a checkpoint, too, when this step finds that every rank has written its part.
    """
    c, progress = worker.config, worker.progress
    if worker.device.type == "cuda":
        torch.cuda.current_stream(worker.device).synchronize()  # not for a checkpoint's copies, which have their own
        torch.cuda.reset_peak_memory_stats(worker.device)  # evaluations and samples don't count in a step's peak
    began = time.perf_counter()
    answer = monitor.request.remote() if worker.rank == 0 else None
    set_rates(worker.optimizer, c, progress.step)
    learned = worker.learn(worker)
    worker.writer.wait_for_copies()  # the optimizer overwrites what a checkpoint may be copying still
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
        "train/lrm": worker.optimizer.param_groups[0]["lr"] / worker.optimizer.param_groups[0]["initial_lr"],
        "train/dt": seconds,
        "train/tok_per_sec": learned.tokens / seconds,
        "train/mfu": c.flops_per_token * learned.tokens / seconds / peak,
        "train/position": position,  # rows that all ranks consumed before this step
        "train/world_size": worker.world_size,
        "train/peak_memory_mb": peak_memory_mb(worker.device),
    }
    metrics = metrics_of(worker) | measured | learned.metrics
    worker.newest = metrics
    show(worker, monitor)
    return metrics, REQUESTS[int(request)]


def show(worker: Worker, monitor) -> None:
    """Give the driver the newest step's metrics, with the val/bpb that is known."""
    if worker.rank == 0 and worker.newest:
        monitor.update.remote(worker.newest | {"val/bpb": worker.progress.val_bpb})


def observe(worker: Worker, monitor, log: MetricsLog | None, last: bool) -> None:
    """Measure what is due after this step, and note in the progress whether all of it was."""
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
    """Call a function on all ranks, or on one, that measures something. True: it was measured.

    What fails is noted. If only some ranks fail, the others wait for them in a collective: this raises then, Ray starts
    the workers again, and the new ones leave out what ended the ones before. So they do with what killed workers twice.
    An error of the collectives themselves may be that of a lost worker, and is raised.
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
        patience = time.monotonic() + TOGETHER_SECONDS
        while ray.get(monitor.failed_ranks.remote(name)) < ranks:
            if time.monotonic() > patience:
                raise
            time.sleep(0.1)
        return False
    if worker.rank == 0:
        monitor.ended.remote()
    return complete


def note_measured(worker: Worker, monitor) -> None:
    """Write into the checkpoint of this step what was measured after it."""
    changes = {"progress": asdict(worker.progress), "val/bpb": worker.progress.val_bpb}
    try:
        worker.writer.amend(worker.progress.step, changes)
    except Exception as error:
        name = f"noting val/bpb in the checkpoint of step {worker.progress.step}"
        monitor.unmeasured.remote(name, worker.rank, f"{name} failed: {one_line(error)}")


def measure_bpb(worker: Worker, monitor, log: MetricsLog | None) -> bool:
    """False: a stop was asked for meanwhile."""
    worker.progress.val_bpb = None  # an earlier step's is not this one's
    measured = evaluate(worker, worker.tokenizer.token_bytes(), monitor)
    if measured is None:
        return False
    worker.progress.val_bpb = measured["val/bpb"]
    if log:
        log.log(metrics_of(worker) | measured)
    return True


def evaluate(worker: Worker, token_bytes, monitor) -> dict[str, float] | None:
    """val/bpb, and of a mixture that of each source, over eval_tokens of the validation rows, as many of each source.

    The ranks share them. None when a stop is asked for meanwhile."""
    c, stopped, by_source = worker.config, [], {}
    num_rows = max(c.eval_tokens // worker.model.config.sequence_len // len(worker.val_rows), worker.world_size)
    for part, rows in worker.val_rows.items():
        batches = evaluation_batches(rows, num_rows, c.device_batch_size, worker.rank, worker.world_size)
        by_source[part] = bits_per_byte(worker.model, until_stop(batches, monitor, stopped), token_bytes)
        if all_reduce(worker, [len(stopped)])[0]:
            return None
    return mixed_bpb(by_source)


def until_stop(batches: Iterable, monitor, stopped: list) -> Iterator:
    """The batches, until the driver asks for a stop, which is looked for once a second and noted in `stopped`."""
    looked = time.monotonic()
    for batch in batches:
        if time.monotonic() > looked + 1:
            looked = time.monotonic()
            if ray.get(monitor.stopping.remote()):
                stopped.append(True)
                return
        yield batch


def learn_rows(worker: Worker) -> Learned:
    """Gradients of the mean loss of a step's rows, by micro-batches.

    Every learned target of the step weighs the same, on whichever rank and in whichever micro-batch it is.
    """
    c = worker.config
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


def set_rates(optimizer: MuonAdamW, c: TrainConfig, step: int) -> None:
    n = c.num_iterations
    multiplier = {"pretrain": lr_multiplier, "sft": finetune_lr_multiplier, "rl": rl_lr_multiplier}[c.stage](step, n)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon" and c.stage == "pretrain":
            group["momentum"] = muon_momentum(step, n)
            group["weight_decay"] = muon_weight_decay(step, n, c.weight_decay)
        if c.stage == "rl":
            group["weight_decay"] = 0.0


def metrics_of(worker: Worker) -> dict:
    c, progress = worker.config, worker.progress
    return {
        "step": progress.step,
        "total_training_flops": float(c.flops_per_token) * progress.tokens,
        "total_training_time": progress.total_training_time,
    }


def start_save(worker: Worker, log: MetricsLog | None) -> None:
    """Begin a checkpoint of where the run stands; it is written while training goes on."""
    progress = worker.progress
    worker.optimizer.gather_exactly()
    sums = torch.stack([p.detach().sum().float() for p in worker.model.parameters()])
    if all_reduce(worker, [float(not sums.isfinite().all())])[0]:  # a rank whose copy alone is bad ends all
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
        # what a finetuning inherits
        "lrs": c.lrs,
        "total_batch_size": c.total_batch_size,
    }


def finish_save(worker: Worker, monitor) -> str | None:
    """End the checkpoint that was begun, if any. Returns why it could not be written, or None, alike on every rank."""
    error = worker.writer.finish()
    if error and worker.rank == 0:
        monitor.say.remote(f"checkpoint: step {worker.writer.meta['step']} is not saved: {error}")
    return error


def measure(worker: Worker, monitor, log: MetricsLog | None) -> None:
    """Log what the run's Measurement gives. It takes no training time: only train_step counts."""
    worker.optimizer.wait()
    with worker.model.uncompiled():  # every prompt would be another shape to compile
        measured = worker.measurement.measure(worker.model, worker.tokenizer)
    if log:
        log.log(metrics_of(worker) | measured)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in measured.items() if "/" not in name)
        monitor.say.remote(f"step {worker.progress.step}: {scores}")


def write_samples(worker: Worker) -> None:
    """Greedy continuations into samples.md, the newest last."""
    append_samples(worker, sample(worker))


def append_samples(worker: Worker, samples: list[str]) -> None:
    """Lines of Markdown about this step into samples.md."""
    lines = [f"## step {worker.progress.step}", "", *samples]
    uri = storage.join(worker.config.run_dir, "samples.md")
    before = storage.read_text(uri) if storage.exists(uri) and worker.progress.step else ""
    before = before.partition(lines[0] + "\n")[0]  # a resumed run writes these again
    storage.write_bytes(uri, (before + "\n".join(lines) + "\n\n").encode())


def sample(worker: Worker) -> list[str]:
    """A line for each of the run's prompts."""
    worker.optimizer.wait()
    model, prompts, tokens = worker.model, worker.config.prompts, 24
    length = max(map(len, prompts)) + tokens  # training needs the rest of the memory
    room = cache_bytes(model.config, len(prompts), length, model.compute_dtype.itemsize)
    engine = Engine(model, worker.tokenizer, len(prompts), room)
    with model.uncompiled():  # every prompt and every token would be another shape to compile
        completions = engine.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0))
    lines = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = worker.tokenizer.decode(prompt[1:]) + "**" + worker.tokenizer.decode(completion.tokens) + "**"
        lines.append("- " + " ".join(text.split()))
    return lines
