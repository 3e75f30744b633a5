"""Pretraining: a depth and a folder of rows, or a mixture of several folders -> a base model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from ray.actor import ActorHandle

from nanochat_ray import storage
from nanochat_ray.data.mixture import read_parts, shares
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.scaling import BASE_LRS, RunPlan, plan_run
from nanochat_ray.train.hosts import Request
from nanochat_ray.train.launch import TrainResult, train
from nanochat_ray.train.loop import Measurement, TrainConfig

SAMPLE_PROMPTS = (
    "The largest planet of the solar system is",
    "Water is made of hydrogen and",
    "The opposite of hot is",
    "Returns the",
)


@dataclass
class PretrainOptions:
    depth: int = 12
    """The dial: layers of the Transformer. Width, batch, horizon and learning rates follow from it."""
    rows: str | None = None
    """Folder of rows or of a mixture, made by prepare. Default: the newest."""
    run: str | None = None
    """Name of the run folder. Default: made from the depth and a hash of these options."""
    head_dim: int = 128
    """Channels of one attention head; the width is rounded up to a multiple of it."""
    window_pattern: str = "SSSL"
    """Attention windows, repeated over the layers. S sees a quarter of the context, L all of it. The last layer is
    always L."""
    target_param_data_ratio: float = 12
    """Training tokens per scaling parameter (matrices of the blocks and the head)."""
    target_flops: float | None = None
    """Train for this many FLOPs instead of for a ratio."""
    num_iterations: int | None = None
    """Train for this many steps instead of for FLOPs or a ratio."""
    total_batch_size: int | None = None
    """Tokens per step over all workers. Default: from depth and ratio."""
    lr_factor: float = 1.0
    """Factor on the plan's learning rates, which are too low for batches of a few thousand tokens."""
    device_batch_size: int | None = None
    """Most rows in one forward pass of a worker. Default: as many as fit."""
    workers: int | None = None
    """Most training workers. Default: every GPU of the cluster, else one per host. If a node is lost, the run continues
    with fewer."""
    use_gpu: bool | None = None
    """Train on GPUs. If the cluster has none yet, it is asked for them. Default: use GPUs if there are some."""
    wait_minutes: float = 10
    """Minutes to wait for hosts with room for all workers. Then the run starts with fewer and grows later."""
    eval_every: int = 250
    """Steps between measurements of val/bpb. 0: only at the end."""
    eval_tokens: int = 10_485_760
    """Validation tokens in each measurement. A mixture measures an equal number of each source."""
    sample_every: int = 2000
    """Steps between greedy samples. 0: only at the end."""
    save_every: int = 1000
    """Steps between checkpoints. 0: only at the end. The last two and the best are kept."""
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
    """Seed of the weights and of the order of rows."""


def run(
    options: PretrainOptions,
    measurement: Measurement | None = None,
    report: Callable[[dict], None] | None = None,
    base_lrs: dict[str, float] = BASE_LRS,
    failing: ActorHandle | None = None,
) -> TrainResult:
    """Pretrain. An interrupted run resumes from its newest checkpoint; a finished one returns at once.

    report, failing: see launch.train. base_lrs: other base rates, for a search.
    Raises FileNotFoundError without rows, and ValueError for options that don't fit together or differ from those with
    which the run folder was started.
    """
    rows, manifest = find_rows(options)
    plan = plan_of(options, manifest)
    print_epochs(rows, plan)
    inputs = {
        "stage": "pretrain",
        "model": asdict(plan.config),
        "total_batch_size": plan.total_batch_size,
        "num_iterations": plan.num_iterations,
        "lrs": {name: lr * options.lr_factor * plan.lr_scale for name, lr in base_lrs.items()},
        "weight_decay": plan.weight_decay,
        "seed": options.seed,
    }
    data = {key: manifest[key] for key in ("source_fingerprint", "tokenizer_sha256", "sequence_len")}
    name = options.run or f"d{options.depth}-{storage.fingerprint(inputs, data)[:6]}"
    run_dir = storage.join(storage.home(), "runs", name)
    tokenizer = Tokenizer.load(manifest["tokenizer"])
    config = TrainConfig(
        **inputs,
        run_dir=run_dir,
        rows=rows,
        tokenizer=manifest["tokenizer"],
        device_batch_size=options.device_batch_size,
        flops_per_token=plan.flops_per_token,
        init_from=None,
        eval_every=options.eval_every,
        eval_tokens=options.eval_tokens,
        sample_every=options.sample_every,
        save_every=options.save_every,
        prompts=[[tokenizer.bos_id, *tokenizer.encode(text)] for text in SAMPLE_PROMPTS],
        dtype=options.dtype,
        compile=options.compile,
        recompute=options.recompute,
        fp8=options.fp8,
    )
    record = asdict(options) | {"plan": asdict(plan), "inputs": inputs | {"data": data}}
    request = Request(options.workers, options.use_gpu, options.wait_minutes)
    return train(config, record, request, measurement, report, failing)


def print_epochs(rows: str, plan: RunPlan) -> None:
    """Print each source's share of a mixture and how often it is read; of a single source, only if more than once."""
    parts = read_parts(rows)
    for part, share in zip(parts, shares([part.weight for part in parts]), strict=True):
        manifest, wanted = read_manifest(part.rows), float(share) * plan.total_tokens
        there = manifest["splits"]["train"]["rows"] * manifest["sequence_len"]
        times = f"{wanted / there:,.2f}" if wanted < there else f"{wanted / there:,.1f}"
        if len(parts) > 1:
            print(
                f"pretrain: {float(share):.1%} {part.name}, whose {there:,} tokens are read {times} times", flush=True
            )
        elif there < wanted:
            print(f"pretrain: the rows have {there:,} tokens for {wanted:,.0f}: {times} epochs", flush=True)


def plan_of(options: PretrainOptions, manifest: dict) -> RunPlan:
    return plan_run(
        options.depth,
        target_param_data_ratio=options.target_param_data_ratio,
        sequence_len=manifest["sequence_len"],
        vocab_size=manifest["vocab_size"],
        head_dim=options.head_dim,
        window_pattern=options.window_pattern,
        total_batch_size=options.total_batch_size,
        num_iterations=options.num_iterations,
        target_flops=options.target_flops,
    )


def find_rows(options: PretrainOptions) -> tuple[str, dict]:
    """(folder, manifest) of the options' rows, or of the newest. Raises FileNotFoundError if there are none."""
    rows = storage.absolute(options.rows) if options.rows else newest_rows()
    return rows, read_manifest(rows)


def read_manifest(rows: str) -> dict:
    uri = storage.join(rows, "manifest.json")
    if not storage.exists(uri):
        raise FileNotFoundError(f"no rows in {rows} (no manifest.json): run `nanochat-ray prepare` first")
    return storage.read_json(uri)


def newest_rows() -> str:
    """The folder of rows whose manifest was written last."""
    root = storage.join(storage.home(), "rows")
    manifests = [
        uri for name in storage.listdir(root) if storage.exists(uri := storage.join(root, name, "manifest.json"))
    ]
    if not manifests:
        raise FileNotFoundError(f"no rows in {root}: run `nanochat-ray prepare` first, or give --rows")
    return storage.parent(max(manifests, key=storage.modified))
