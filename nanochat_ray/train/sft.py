"""Supervised finetuning: a base checkpoint and conversations -> a chat model."""

from dataclasses import asdict, dataclass

from nanochat_ray import storage
from nanochat_ray.data.loader import Rows
from nanochat_ray.model.gpt import GPTConfig
from nanochat_ray.model.scaling import BASE_LRS, REFERENCE_BATCH, flops_per_token
from nanochat_ray.train import checkpoint
from nanochat_ray.train.hosts import Request
from nanochat_ray.train.launch import TrainResult, train
from nanochat_ray.train.loop import Measurement, TrainConfig

LR_SCALE = 0.8  # factor on the base run's learning rates
MIN_STEPS = 20  # per epoch; fewer steps hardly teach anything


@dataclass
class SftOptions:
    checkpoint: str
    """Checkpoint to start from, or a run folder, whose newest checkpoint is used."""
    run: str | None = None
    """Name of the run folder. Default: the base run's name with -sft."""
    steps: int | None = None
    """Steps to train for. Default: one epoch."""
    total_batch_size: int | None = None
    """Tokens per step over all workers. Default: the base run's, halved until an epoch has 20 steps."""
    device_batch_size: int | None = None
    """Most rows in one forward pass of a worker. Default: as many as fit."""
    workers: int | None = None
    """Most training workers. Default: every GPU of the cluster, else one per host. If a node is lost, the run continues
    with fewer."""
    use_gpu: bool | None = None
    """Train on GPUs. If the cluster has none yet, it is asked for them. Default: use GPUs if there are some."""
    wait_minutes: float = 10
    """Minutes to wait for hosts with room for all workers. Then the run starts with fewer and grows later."""
    eval_every: int = 100
    """Steps between measurements of val/bpb over the assistant's tokens. 0: only at the end."""
    eval_tokens: int = 1_048_576
    """Validation tokens in each measurement."""
    save_every: int = 500
    """Steps between checkpoints. 0: only at the end."""
    dtype: str | None = None
    """float32 or bfloat16. Default: bfloat16 if the hardware is fast at it."""
    compile: bool | None = None
    """Use torch.compile. It takes a minute at the start and makes steps a third shorter. Default: on, on CPUs only with
    a C++ compiler."""
    recompute: bool = False
    """Activation checkpointing, for depths that don't fit in memory. It takes a third more work."""
    fp8: bool = False
    """Compute the blocks' matmuls in float8. Needs a Hopper GPU or later, and torchao (the extra `gpu`)."""
    seed: int = 42
    """Seed of the order of rows."""


def run(options: SftOptions, rows: str, measurement: Measurement | None = None) -> TrainResult:
    """Finetune on the rows of prepare_conversations. An interrupted run is resumed; a finished one returns at once.

    Learning rates are 0.8 × the base run's, momentum starts from its state, and Muon's weight decay is off.
    Raises FileNotFoundError without a checkpoint, and ValueError for options that don't fit together or differ from
    those with which the run folder was started.
    """
    base = checkpoint.resolve_checkpoint(storage.absolute(options.checkpoint))
    meta = checkpoint.read_meta(base)
    sequence_len = meta["model_config"]["sequence_len"]
    tokens = len(Rows(storage.join(rows, "train"))) * sequence_len
    # A checkpoint imported from nanochat has no batch size and no learning rates.
    of_base = meta.get("total_batch_size") or 16 * sequence_len
    chosen = of_base if options.steps else batch_size(of_base, tokens, sequence_len)
    batch = options.total_batch_size or chosen
    of_batch = {name: lr * (batch / REFERENCE_BATCH) ** 0.5 for name, lr in BASE_LRS.items()}
    lrs = {name: lr * (batch / of_base) ** 0.5 for name, lr in meta["lrs"].items()} if meta.get("lrs") else of_batch
    epoch = max(1, tokens // batch)
    if not options.steps and epoch < MIN_STEPS:
        print(f"sft: {tokens:,} tokens are only {epoch} steps of {batch:,}: add conversations or set --steps")
    inputs = {
        "stage": "sft",
        "init_from": base,
        "rows": rows,
        "model": meta["model_config"],
        "total_batch_size": batch,
        "num_iterations": options.steps or epoch,
        "lrs": {name: LR_SCALE * lr for name, lr in lrs.items()},
        "weight_decay": 0.0,
        "seed": options.seed,
    }
    run_dir = storage.join(storage.home(), "runs", options.run or f"{checkpoint.run_name(base)}-sft")
    config = TrainConfig(
        **inputs,
        run_dir=run_dir,
        tokenizer=base,
        device_batch_size=options.device_batch_size,
        flops_per_token=flops_per_token(GPTConfig(**meta["model_config"])),
        eval_every=options.eval_every,
        eval_tokens=options.eval_tokens,
        sample_every=0,
        save_every=options.save_every,
        prompts=[],
        dtype=options.dtype,
        compile=options.compile,
        recompute=options.recompute,
        fp8=options.fp8,
    )
    request = Request(options.workers, options.use_gpu, options.wait_minutes)
    return train(config, asdict(options) | {"inputs": inputs}, request, measurement)


def batch_size(of_base: int, tokens: int, sequence_len: int) -> int:
    """The base run's batch in tokens, halved until an epoch has MIN_STEPS steps. Whole rows, at least one."""
    rows = of_base // sequence_len
    while rows > 1 and tokens // (rows * sequence_len) < MIN_STEPS:
        rows //= 2
    return rows * sequence_len
