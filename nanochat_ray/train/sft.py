"""Supervised finetuning: a base checkpoint and conversations -> a chat model, by the loop of pretraining."""

from dataclasses import asdict, dataclass

from nanochat_ray import storage
from nanochat_ray.data.loader import Rows
from nanochat_ray.model.gpt import GPTConfig
from nanochat_ray.model.scaling import BASE_LRS, REFERENCE_BATCH, flops_per_token
from nanochat_ray.train import checkpoint
from nanochat_ray.train.hosts import Request
from nanochat_ray.train.launch import TrainResult, train
from nanochat_ray.train.loop import Measurement, TrainConfig

LR_SCALE = 0.8  # of the base run's rates
MIN_STEPS = 20  # in an epoch: fewer would hardly teach anything


@dataclass
class SftOptions:
    checkpoint: str
    """Checkpoint to start from, or a run folder, of which the newest is taken."""
    run: str | None = None
    """Name of the run folder; the default is the base run's with -sft."""
    steps: int | None = None
    """Steps to train for; the default is one epoch."""
    total_batch_size: int | None = None
    """Tokens in a step, over all workers; the default is the base run's, halved until an epoch has 20 steps."""
    device_batch_size: int | None = None
    """Most rows in one forward pass of a worker; the default is what fits."""
    workers: int | None = None
    """Most training workers; the default is every GPU of the cluster, else one a host. While a node is lost, the
    run goes on with fewer."""
    use_gpu: bool | None = None
    """Train on GPUs, for which the cluster is asked if it has none yet; the default is to if it has some."""
    wait_minutes: float = 10
    """How long to wait for hosts with room for all workers; then the run starts with fewer, and takes what comes."""
    eval_every: int = 100
    """Steps between measurements of val/bpb over the assistant's tokens; 0 for the end alone."""
    eval_tokens: int = 1_048_576
    """Validation tokens in each measurement."""
    save_every: int = 500
    """Steps between checkpoints; 0 for the end alone."""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    compile: bool | None = None
    """torch.compile, a minute at the start for steps a third shorter; the default is on, on CPUs if they have a C++
    compiler."""
    recompute: bool = False
    """Activation checkpointing: for depths that don't fit; a third more work."""
    fp8: bool = False
    """Matmuls of the blocks in float8, on Hopper GPUs and later, with torchao (the extra `gpu`)."""
    seed: int = 42
    """Of the order of rows."""


def run(options: SftOptions, rows: str, measurement: Measurement | None = None) -> TrainResult:
    """Finetune on the rows of prepare_conversations, go on, or return at once when it is finished.

    Rates are 0.8 of the base run's, momentum goes on from its state, Muon's weight decay is off.
    Raises FileNotFoundError without a checkpoint, ValueError for options that can't be, or not in this run folder.
    """
    base = checkpoint.resolve_checkpoint(storage.absolute(options.checkpoint))
    meta = checkpoint.read_meta(base)
    sequence_len = meta["model_config"]["sequence_len"]
    tokens = len(Rows(storage.join(rows, "train"))) * sequence_len
    # A checkpoint imported from nanochat has neither batch nor rates to inherit.
    of_base = meta.get("total_batch_size") or 16 * sequence_len
    chosen = of_base if options.steps else batch_size(of_base, tokens, sequence_len)
    batch = options.total_batch_size or chosen
    of_batch = {name: lr * (batch / REFERENCE_BATCH) ** 0.5 for name, lr in BASE_LRS.items()}
    lrs = {name: lr * (batch / of_base) ** 0.5 for name, lr in meta["lrs"].items()} if meta.get("lrs") else of_batch
    epoch = max(1, tokens // batch)
    if not options.steps and epoch < MIN_STEPS:
        print(f"sft: {tokens:,} tokens are only {epoch} steps of {batch:,}: give more conversations, or --steps")
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
    """The base run's, halved until an epoch of `tokens` has MIN_STEPS steps; whole rows, one at least."""
    rows = of_base // sequence_len
    while rows > 1 and tokens // (rows * sequence_len) < MIN_STEPS:
        rows //= 2
    return rows * sequence_len
