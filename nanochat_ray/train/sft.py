"""Supervised finetuning: a base checkpoint and conversations -> a chat model, by the loop of pretraining."""

import tempfile
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from nanochat_ray import storage
from nanochat_ray.data.loader import Rows, write_rows
from nanochat_ray.data.packing import pack_conversations, split_conversation
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPTConfig
from nanochat_ray.model.scaling import BASE_LRS, REFERENCE_BATCH, flops_per_token
from nanochat_ray.train import checkpoint
from nanochat_ray.train.hosts import Request
from nanochat_ray.train.launch import TrainResult, train
from nanochat_ray.train.loop import Measurement, TrainConfig

LR_SCALE = 0.8  # of the base run's rates


@dataclass
class SftOptions:
    checkpoint: str
    """Checkpoint to start from, or a run folder, of which the newest is taken."""
    run: str | None = None
    """Name of the run folder; the default is the base run's with -sft."""
    steps: int | None = None
    """Steps to train for; the default is one epoch."""
    total_batch_size: int | None = None
    """Tokens in a step, over all workers; the default is the base run's."""
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


def run(
    options: SftOptions,
    train_conversations: list[dict],
    val_conversations: list[dict],
    measurement: Measurement | None = None,
) -> TrainResult:
    """Finetune on conversations (evals/tasks makes them), go on, or return at once when it is finished.

    Rates are 0.8 of the base run's, momentum goes on from its state, Muon's weight decay is off.
    Raises FileNotFoundError without a checkpoint, ValueError for options that can't be, or not in this run folder.
    """
    base = checkpoint.resolve_checkpoint(storage.absolute(options.checkpoint))
    meta, tokenizer = checkpoint.read_meta(base), Tokenizer.load(base)
    sequence_len = meta["model_config"]["sequence_len"]
    splits = {"train": train_conversations, "val": val_conversations}
    rows = prepare_conversations(splits, tokenizer, sequence_len)
    # A checkpoint imported from nanochat has neither batch nor rates to inherit.
    batch = options.total_batch_size or meta.get("total_batch_size") or 16 * sequence_len
    lrs = meta.get("lrs") or {name: lr * (batch / REFERENCE_BATCH) ** 0.5 for name, lr in BASE_LRS.items()}
    epoch = max(1, len(Rows(storage.join(rows, "train"))) * sequence_len // batch)
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


def prepare_conversations(splits: dict[str, list[dict]], tokenizer: Tokenizer, sequence_len: int) -> str:
    """Render and pack conversations into a folder of rows, unless the same ones are there; returns the folder.

    A conversation longer than a row goes on in another; no token is dropped, which manifest.json counts.
    """
    fingerprint = storage.fingerprint(splits, tokenizer.sha, sequence_len)
    folder = storage.join(storage.home(), "conversations", f"{fingerprint[:8]}-T{sequence_len}")
    manifest_uri = storage.join(folder, "manifest.json")
    if storage.exists(manifest_uri):
        return folder
    counts = {}
    for split, conversations in splits.items():
        if not conversations:
            raise ValueError(f"no {split} conversations to finetune on")
        rendered = [tokenizer.render_conversation(c, max_tokens=None) for c in conversations]
        pieces = list(chain.from_iterable(split_conversation(*c, sequence_len + 1) for c in rendered))
        tokens, mask = pack_conversations(pieces, sequence_len + 1)
        with tempfile.TemporaryDirectory() as scratch:
            write_rows(Path(scratch) / "rows.arrow", tokens, mask)
            storage.publish(Path(scratch) / "rows.arrow", storage.join(folder, split, "rows_00000.arrow"))
        # Counted in the rows: a conversation has one bos, its first token, and all others that rows hold are added.
        packed = int((tokens != tokenizer.bos_id).sum()) + len(conversations)
        counts[split] = count = {
            "conversations": len(conversations),
            "rows": len(tokens),
            "tokens": packed,
            "dropped_tokens": sum(len(ids) for ids, _ in rendered) - packed,
            "learned_tokens": int(mask.sum()),
            "split_conversations": sum(len(ids) > sequence_len + 1 for ids, _ in rendered),
        }
        print("sft: " + split + " " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in count.items()))
    storage.write_json(manifest_uri, {"tokenizer_sha256": tokenizer.sha, "sequence_len": sequence_len, **counts})
    return folder
