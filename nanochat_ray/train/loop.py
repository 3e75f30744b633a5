"""The one training loop, shared by pretraining and finetuning, as Ray Train runs it on every worker."""

import math
import time
from dataclasses import asdict, dataclass, field

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from nanochat_ray import storage
from nanochat_ray.data.loader import Loader, Rows, evaluation_batches
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import MuonAdamW, build_optimizer
from nanochat_ray.model.scaling import finetune_lr_multiplier, lr_multiplier, muon_momentum, muon_weight_decay
from nanochat_ray.train import checkpoint
from nanochat_ray.train.metrics import MetricsLog, bits_per_byte, peak_flops, peak_memory_mb

UNTIMED_STEPS = 10  # the first steps compile and warm caches: they are left out of the training time


class Diverged(Exception):
    """The loss is no number any more. Starting again would only repeat it."""


@dataclass(frozen=True)
class TrainConfig:
    """All that a worker needs, as plain data. Batch sizes: device in rows, total in tokens."""

    run_dir: str
    stage: str  # "pretrain" or "sft": which schedules apply
    rows: str  # folder with train/ and val/
    tokenizer: str
    model: dict  # of GPTConfig
    total_batch_size: int
    device_batch_size: int | None
    num_iterations: int
    lrs: dict[str, float]
    weight_decay: float
    flops_per_token: int
    seed: int
    init_from: str | None  # checkpoint whose weights and momentum a finetuning starts from
    eval_every: int
    eval_tokens: int
    sample_every: int
    save_every: int
    prompts: list[list[int]]  # sampled greedily, as token ids
    dtype: str | None
    compile: bool | None


@dataclass
class Progress:
    """Where a run stands. position counts rows consumed by all ranks since the start."""

    step: int = 0
    position: int = 0
    smooth_loss: float = 0.0
    total_training_time: float = 0.0
    val_bpb: float | None = None

    def loss(self) -> float:
        """The moving average of the loss, debiased for having started at 0."""
        return self.smooth_loss / (1 - 0.9**self.step) if self.step else float("nan")


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
    loader: Loader
    val_rows: Rows
    progress: Progress
    resumed: bool
    forward: torch.nn.Module = field(init=False)

    def __post_init__(self):
        compiles = self.config.compile
        if compiles is None:  # in fp32 on a CPU matmuls are nearly all of a step, and compiling takes minutes
            compiles = self.device.type == "cuda" or self.model.compute_dtype == torch.bfloat16
        self.forward = torch.compile(self.model, dynamic=False) if compiles else self.model


def train_loop_per_worker(config: dict) -> None:
    """Train from the run's newest checkpoint to num_iterations or a requested stop; the monitor is told which."""
    monitor = config.pop("monitor")
    worker = start(TrainConfig(**config))
    progress = worker.progress
    log = MetricsLog(worker.config.run_dir, config, progress.step) if worker.rank == 0 else None
    error = None
    try:
        train(worker, monitor, log)
    except Diverged as diverged:  # the same on every rank
        error = str(diverged)
    if log:
        log.close()
        ray.get(monitor.finish.remote({"step": progress.step, "error": error}))


def train(worker: Worker, monitor, log: MetricsLog | None) -> None:
    c, progress = worker.config, worker.progress
    peak = all_reduce(worker, [peak_flops(worker.device, worker.model.compute_dtype)])[0]
    token_bytes = worker.tokenizer.token_bytes()
    saved_step, stop = progress.step if worker.resumed else None, False
    while True:
        last = progress.step == c.num_iterations
        if saved_step != progress.step:  # what was measured before the checkpoint is not measured again
            if last or due(progress.step, c.eval_every):
                progress.val_bpb = evaluate(worker, token_bytes)
                if log:
                    log.log(metrics_of(worker) | {"val/bpb": progress.val_bpb})
            if worker.rank == 0 and c.prompts and (last or due(progress.step, c.sample_every)):
                write_samples(worker)
            if last or stop or (progress.step and due(progress.step, c.save_every)):
                save(worker)
                if log:
                    log.flush()  # what a resumed run goes on from
        if last or stop:
            return
        metrics, stop = train_step(worker, peak, monitor)
        if log:
            log.log(metrics)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def start(c: TrainConfig) -> Worker:
    """Build the model and the optimizer, from the run's newest checkpoint when there is one."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    torch.manual_seed(c.seed)  # the same weights on every rank
    model = GPT(GPTConfig(**c.model)).to(device)
    model.init_weights()
    resume_from = checkpoint.latest_checkpoint(c.run_dir) if rank == 0 else None
    resume_from = broadcast(resume_from)  # one rank decides: a checkpoint could appear or go between two looks
    if origin := resume_from or c.init_from:
        checkpoint.load_weights(model, origin)
    model.set_compute_dtype(checkpoint.compute_dtype(c.dtype, device))
    optimizer = build_optimizer(model, **c.lrs, weight_decay=c.weight_decay)
    if origin and checkpoint.has_optimizer(origin):  # an imported checkpoint has none
        checkpoint.load_optimizer(optimizer, origin)
    progress = Progress()
    if resume_from:
        progress = Progress(**checkpoint.read_meta(resume_from)["progress"])

    rows = Rows(storage.join(c.rows, "train"))
    loader = Loader(rows, c.total_batch_size // model.config.sequence_len, rank, world_size, c.seed)
    return Worker(
        config=c,
        device=device,
        rank=rank,
        world_size=world_size,
        tokenizer=Tokenizer.load(c.tokenizer),
        model=model,
        optimizer=optimizer,
        loader=loader,
        val_rows=Rows(storage.join(c.rows, "val")),
        progress=progress,
        resumed=resume_from is not None,
    )


def broadcast(value):
    """Rank 0's value on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_reduce(worker: Worker, values: list[float]) -> list[float]:
    """Sums over the ranks."""
    sums = torch.tensor(values, dtype=torch.float64, device=worker.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def train_step(worker: Worker, peak: float, monitor) -> tuple[dict, bool]:
    """One optimizer step. Returns its metrics, and whether a stop was asked for (the same on every rank)."""
    c, progress = worker.config, worker.progress
    synchronize(worker.device)
    began = time.perf_counter()
    answer = monitor.stop_requested.remote() if worker.rank == 0 else None
    set_rates(worker.optimizer, c, progress.step)
    loss_sum, count = forward_backward(worker)
    worker.optimizer.step()
    worker.model.zero_grad(set_to_none=True)
    asked = float(ray.get(answer)) if answer else 0.0
    loss_sum, asked = all_reduce(worker, [loss_sum.item(), asked])
    seconds = time.perf_counter() - began

    loss = loss_sum / count
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {progress.step}: look at the data, or lower the learning rates")
    progress.smooth_loss = 0.9 * progress.smooth_loss + 0.1 * loss
    progress.step += 1
    progress.position += c.total_batch_size // worker.model.config.sequence_len
    if progress.step > UNTIMED_STEPS:
        progress.total_training_time += seconds
    metrics = metrics_of(worker) | {
        "train/loss": progress.loss(),
        "train/lrm": worker.optimizer.param_groups[0]["lr"] / worker.optimizer.param_groups[0]["initial_lr"],
        "train/dt": seconds,
        "train/tok_per_sec": c.total_batch_size / seconds,
        "train/mfu": c.flops_per_token * c.total_batch_size / seconds / peak,
        "train/epoch": worker.loader.epoch(progress.position),
        "train/peak_memory_mb": peak_memory_mb(worker.device),
    }
    if worker.rank == 0:
        monitor.update.remote(metrics | {"val/bpb": progress.val_bpb})
    return metrics, asked > 0


def evaluate(worker: Worker, token_bytes) -> float:
    """val/bpb over eval_tokens of the validation rows, shared by the ranks."""
    c = worker.config
    num_rows = max(c.eval_tokens // worker.model.config.sequence_len, worker.world_size)
    batches = evaluation_batches(worker.val_rows, num_rows, c.device_batch_size, worker.rank, worker.world_size)
    return bits_per_byte(worker.forward, batches, token_bytes)


def forward_backward(worker: Worker) -> tuple[torch.Tensor, float]:
    """Gradients of the step's mean loss, by micro-batches. Returns this rank's summed loss and the step's count.

    Every learned target of the step weighs the same, on whichever rank and in whichever micro-batch it is.
    """
    c = worker.config
    idx, targets = worker.loader.step(worker.progress.position)
    count = float(c.total_batch_size)
    if worker.loader.rows.masks:
        count = max(all_reduce(worker, [(targets >= 0).sum().item()])[0], 1.0)
    loss_sum = torch.zeros((), device=worker.device)
    micro_batches = zip(idx.split(c.device_batch_size), targets.split(c.device_batch_size), strict=True)
    for x, y in micro_batches:
        x, y = x.to(worker.device, non_blocking=True), y.to(worker.device, non_blocking=True)
        losses = worker.forward(x, y, loss_reduction="none").sum()
        (losses * (worker.world_size / count)).backward()  # the optimizer takes the mean over ranks
        loss_sum += losses.detach()
    return loss_sum, count


def set_rates(optimizer: MuonAdamW, c: TrainConfig, step: int) -> None:
    n = c.num_iterations
    finetuning = c.stage == "sft"
    multiplier = finetune_lr_multiplier(step, n) if finetuning else lr_multiplier(step, n)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon" and not finetuning:
            group["momentum"] = muon_momentum(step, n)
            group["weight_decay"] = muon_weight_decay(step, n, c.weight_decay)


def metrics_of(worker: Worker) -> dict:
    c, progress = worker.config, worker.progress
    return {
        "step": progress.step,
        "total_training_flops": float(c.flops_per_token) * c.total_batch_size * progress.step,
        "total_training_time": progress.total_training_time,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save(worker: Worker) -> None:
    c, progress = worker.config, worker.progress
    if not all(p.isfinite().all() for p in worker.model.parameters()):
        raise Diverged(f"weights are not finite after step {progress.step}: look at the data, or lower the rates")
    meta = {
        "stage": c.stage,
        "progress": asdict(progress),
        "val/bpb": progress.val_bpb,
        # what a finetuning inherits
        "lrs": c.lrs,
        "total_batch_size": c.total_batch_size,
    }
    checkpoint.save_checkpoint(c.run_dir, progress.step, worker.model, worker.optimizer, worker.tokenizer, meta)
    if worker.rank == 0:
        checkpoint.prune(c.run_dir)


def write_samples(worker: Worker) -> None:
    """Greedy continuations into samples.md, the newest last."""
    engine = Engine(worker.model, worker.tokenizer)
    completions = engine.generate(worker.config.prompts, SamplingParams(max_tokens=24, temperature=0.0))
    lines = [f"## step {worker.progress.step}", ""]
    for prompt, completion in zip(worker.config.prompts, completions, strict=True):
        text = worker.tokenizer.decode(prompt[1:]) + "**" + worker.tokenizer.decode(completion.tokens) + "**"
        lines.append("- " + " ".join(text.split()))
    uri = storage.join(worker.config.run_dir, "samples.md")
    before = storage.read_text(uri) if storage.exists(uri) and worker.progress.step else ""
    before = before.partition(lines[0] + "\n")[0]  # a resumed run writes these again
    storage.write_bytes(uri, (before + "\n".join(lines) + "\n\n").encode())
