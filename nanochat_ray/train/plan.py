"""`nanochat-ray plan`: what a depth implies, before you rent a GPU: sizes, horizon, rates, memory, time and cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from nanochat_ray.model.attention import BLOCK
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.loss import chunk_size
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS, RunPlan, flops_per_token, param_counts, plan_run
from nanochat_ray.model.shards import Matrices, Shard, make_shards
from nanochat_ray.train.checkpoint import compute_dtype
from nanochat_ray.train.metrics import gpu_peak_flops, peak_flops

MAX_TOKENS_PER_GPU = 2**15  # per forward pass; more tokens are not more efficient
MAX_TOKENS_PER_CPU = 2**12  # per forward pass; activations of more tokens don't fit into the cache
PROCESS_BYTES = 900 * 2**20  # Python, torch, Ray and what remains after compiling
CONTEXT_BYTES = 2**30  # on a GPU: CUDA context, workspaces of cuBLAS and cuDNN, compiled kernels
NCCL_BYTES = 2**30  # buffers, with several workers
# GiB that CUDA can use of each GPU. It is less than the name says, because vendors count in GB and reserve some.
GPU_GIB = {"B200": 178, "H200": 139, "H100": 79, "A100-80G": 79, "A100": 39, "L40S": 44, "L4": 22, "A10G": 22}
# Share of a link's bandwidth that gloo uses on CPUs. Measured: 0.5 to 0.9. gloo sends in one direction after the other,
# and two exchanges run in parallel. NCCL is not measured and counts as 1.
GLOO_SHARE = 0.75
GPU_SHARE = 0.9  # share of a GPU's memory that the plan may fill; the plan is accurate to about 10 %
# Bytes a second that a GPU reads from its memory, by the data sheets. Decoding is bound by it.
GPU_BANDWIDTH = {
    "B200": 8e12, "H200": 4.8e12, "H100": 3.35e12, "A100-80G": 2.04e12, "A100": 1.56e12, "L40S": 0.864e12,
    "L4": 0.3e12, "A10G": 0.6e12, "4090": 1.01e12,
}  # fmt: skip
# Seconds that a decoding step takes for a layer, however few rows there are: the start of its kernels, on an H200. With
# it and the bandwidth, steps of 1 and 32 rows at depths 12 and 20, and of 256 rows at 20, come out within 10 % of what
# was measured. One of 256 rows at depth 12 took three times as long, because the GPU waited for its host.
LAYER_SECONDS = 30e-6
GPU_ROWS = 256  # most sequences that an engine decodes at once in reinforcement learning
GSM8K_QUESTIONS, GSM8K_TOKENS = 7473, 100  # to learn from, and of one question: the latter is an estimate


@dataclass
class PlanOptions:
    depth: int = 24
    """The dial: layers of the Transformer."""
    nodes: int = 1
    """Number of nodes. With several, the plan also shows 1, 2, 4, … nodes."""
    gpus: int = 8
    """GPUs per node. 0: one worker on the CPUs."""
    gpu: str = "H100"
    """Type of GPU, for its peak FLOP/s: H100, H200, B200, A100, L40S, L4, A10G, 4090, …"""
    dtype: str | None = None
    """float32 or bfloat16. Default: bfloat16 if the hardware is fast at it."""
    mfu: float = 0.5
    """Share of the peak FLOP/s that training reaches on one node."""
    network: float = 100
    """Gbit/s that each node sends and receives at the same time. `nanochat-ray doctor` measures it."""
    latency: float = 30
    """Microseconds for a message from one node to the next."""
    dollars_per_gpu_hour: float = 3.0
    """Price of a GPU, for the cost."""
    target_param_data_ratio: float = 12
    """Training tokens per scaling parameter."""
    target_flops: float | None = None
    """Train for this many FLOPs instead of for a ratio."""
    sequence_len: int = 2048
    vocab_size: int = 32768
    head_dim: int = 128
    window_pattern: str = "SSSL"
    device_batch_size: int | None = None
    """Rows in one forward pass of a worker. Default: as in pretrain."""
    rl_questions: int = GSM8K_QUESTIONS
    """Questions that reinforcement learning asks once, with its defaults; GSM8K has 7,473. 0 leaves it out. It is
    predicted for GPUs alone."""


@dataclass(frozen=True)
class Prediction:
    memory: dict[str, float]  # bytes per worker, by part
    seconds: float  # of pretraining
    dollars: float
    steps: dict[int, "Step"]  # by number of nodes
    rl: "RlPrediction | None"


@dataclass(frozen=True)
class Step:
    seconds: float
    waiting: float  # part of these seconds in which only the network is busy
    sent: int  # bytes that each worker sends to the next one in a ring


@dataclass(frozen=True)
class RlPrediction:
    """Seconds of a whole run of reinforcement learning. All answers count with the most tokens that are allowed."""

    steps: int
    rollouts: float
    learning: float
    measuring: float  # pass@k

    @property
    def seconds(self) -> float:
        return self.rollouts + self.learning + self.measuring


def run(options: PlanOptions) -> Prediction:
    """Print the plan and return its predictions. Raises ValueError for an unknown GPU, or too many workers."""
    plan = plan_run(
        options.depth,
        target_param_data_ratio=options.target_param_data_ratio,
        sequence_len=options.sequence_len,
        vocab_size=options.vocab_size,
        head_dim=options.head_dim,
        window_pattern=options.window_pattern,
        target_flops=options.target_flops,
    )
    if options.nodes < 1 or options.network <= 0:
        raise ValueError(
            f"--nodes {options.nodes} --network {options.network}: give at least one node, and a speed above 0"
        )
    workers = options.nodes * max(1, options.gpus)
    dtype = torch.bfloat16 if options.gpus and options.dtype is None else compute_dtype(options.dtype, "cpu")
    most = plan.total_batch_size // (options.sequence_len * workers)
    if options.nodes > 1 and not most:
        raise ValueError(
            f"{workers} workers are too many for {plan.total_batch_size // options.sequence_len} rows per step: take "
            "fewer"
        )
    most = max(1, most)
    memory = GPU_SHARE * gpu_memory(options.gpu) if options.gpus else math.inf
    rows = min(most, options.device_batch_size or most)
    if options.device_batch_size is None:
        rows = rows_that_fit(plan.config, most, workers, not options.gpus, dtype, memory, recompute=False)
    peak = gpu_peak_flops(options.gpu, dtype) if options.gpus else peak_flops(torch.device("cpu"), dtype)
    steps = {}
    for nodes in sorted({2**i for i in range(options.nodes.bit_length())} | {options.nodes}):
        workers = nodes * max(1, options.gpus)
        shards = plan_shards(plan.config, workers, dtype)
        compute = plan.flops_per_token * plan.total_batch_size / (workers * peak * options.mfu)
        passes = math.ceil(plan.total_batch_size / (workers * rows * options.sequence_len))
        update = muon_flops(shards) / (peak * options.mfu)
        network = 1e9 * options.network * (1 if options.gpus else GLOO_SHARE)
        steps[nodes] = predict_step(shards, nodes, compute, update, passes, network, 1e-6 * options.latency)
    seconds = plan.num_iterations * steps[options.nodes].seconds
    bandwidth = gpu_bandwidth(options.gpu) if options.gpus else None
    rl = None
    if bandwidth and options.rl_questions:
        rl = predict_rl(
            plan.config, options.rl_questions, options.nodes, options.gpus, peak * options.mfu, bandwidth, rows,
            1e9 * options.network, 1e-6 * options.latency,
        )  # fmt: skip
    prediction = Prediction(
        memory=predict_memory(plan.config, workers, rows, not options.gpus, dtype),
        seconds=seconds,
        dollars=seconds / 3600 * options.nodes * options.gpus * options.dollars_per_gpu_hour,
        steps=steps,
        rl=rl,
    )
    _print(plan, options, rows, prediction)
    if options.nodes > 1:
        _print_nodes(plan, options, prediction)
    return prediction


def plan_shards(config: GPTConfig, workers: int, dtype: torch.dtype) -> Sequence[Shard]:
    """The optimizer's shards on its first rank, in the order in which the backward pass gives their gradients."""
    with torch.device("meta"):
        model = GPT(config)
        groups = build_optimizer(model.set_compute_dtype(dtype), **BASE_LRS, weight_decay=0.0).param_groups
        return make_shards(groups, 0, workers, dtype)


def muon_flops(shards: Sequence[Shard]) -> int:
    """FLOPs of Muon on one worker: five iterations on r × c matrices, r ≤ c, are 5 · (4 r² c + 2 r³) FLOPs."""
    matrices = [view.shape for shard in shards if isinstance(shard, Matrices) for view in shard.owned()]
    return sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in matrices)


def predict_step(
    shards: Sequence[Shard], nodes: int, compute: float, update: float, passes: int, network: float, latency: float
) -> Step:
    """Predict a step of `compute` seconds on each worker, `update` of which are the optimizer's.

    network: bits/s of each node. latency: seconds per message between nodes. passes: micro-batches of a step.

    The model follows the optimizer. Gradients of the last backward pass are sent as they appear, shard by shard. Each
    shard is updated when it has arrived, starting with the first layer. Weights are sent in that order while the next
    forward pass runs, and each layer waits for its weights. A forward pass takes half as long as a backward pass. Data
    go around a ring of all workers, which enters and leaves each node once, so the node's network is the limit. Each
    collective waits for one message after the other between the nodes. Traffic within a node counts as free.
    """
    sent = [shard.bytes_sent() for shard in shards]
    total = sum(map(sum, sent))
    if nodes == 1:
        return Step(compute, 0.0, total)

    def travel(num_bytes: int) -> float:
        return 8 * num_bytes / network + (nodes - 1) * latency if num_bytes else 0.0

    layers = 1 + max(shard.layer for shard in shards if shard.layer < math.inf)
    forward = (compute - update) / passes / 3
    backward = 2 * forward
    # Times since the start of the last backward pass: when the network is free, and when gradients have arrived.
    free, reduced = 0.0, []
    for shard, (gradients, _) in zip(shards, sent, strict=True):
        done = max(0.0, 1 - shard.layer / layers)  # share of the backward pass
        free = max(free, backward * done) + travel(gradients)
        reduced.append(free)
    now, arrived = backward, []
    for arrival, (_, weights) in zip(reversed(reduced), reversed(sent), strict=True):
        now = max(now, arrival) + update / len(shards)
        free = max(free, now) + travel(weights)
        arrived.append(free)
    ahead = now  # start of the next forward pass, delayed by the sum of its waits
    for shard, arrival in zip(reversed(shards), arrived, strict=True):
        ahead = max(ahead, arrival - forward * min(1.0, shard.layer / layers))
    waiting = ahead - backward - update
    return Step(compute + waiting, waiting, total)


def predict_rl(
    config: GPTConfig,
    questions: int,
    nodes: int,
    gpus: int,
    flops: float,
    bandwidth: float,
    rows: int,
    network: float,
    latency: float,
    prompts_per_step: int = 16,
    num_samples: int = 16,
    max_new_tokens: int = 256,
    eval_every: int = 60,
    eval_questions: int = 400,
    eval_samples: int = 8,
) -> RlPrediction:
    """Each question once, by training workers that answer their share themselves and then train on it.

    flops: FLOP/s that a GPU reaches in training. bandwidth: bytes/s of its memory. rows: of a forward pass.
    network, latency: as in predict_step. The other arguments are those of RlOptions, with its defaults. There are at
    most as many workers as questions in a step. Every answer counts with max_new_tokens, because a step waits for its
    longest answer.
    """
    workers = min(nodes * gpus, prompts_per_step)
    steps = math.ceil(questions / prompts_per_step)
    answers = prompts_per_step * num_samples
    rollout = max_new_tokens * decode_seconds(config, math.ceil(answers / workers), max_new_tokens, bandwidth)
    tokens = prompts_per_step * GSM8K_TOKENS + answers * max_new_tokens  # learning reads each question once
    shards = plan_shards(config, workers, torch.bfloat16)
    update = muon_flops(shards) / flops
    compute = flops_per_token(config) * tokens / (workers * flops) + update
    passes = math.ceil(tokens / (workers * rows * config.sequence_len))
    learning = predict_step(shards, min(nodes, workers), compute, update, passes, network, latency).seconds
    evals = 1 + math.ceil(steps / eval_every)  # the first is before the first step
    held_out = math.ceil(eval_questions * eval_samples / workers)
    batches = math.ceil(held_out / GPU_ROWS)
    measuring = batches * max_new_tokens * decode_seconds(config, min(held_out, GPU_ROWS), max_new_tokens, bandwidth)
    return RlPrediction(steps, steps * rollout, steps * learning, evals * measuring)


def decode_seconds(config: GPTConfig, rows: int, max_new_tokens: int, bandwidth: float) -> float:
    """Of a decoding step on a GPU in bf16, in the middle of the answers. It reads all weights and the cache once."""
    counts, context = param_counts(config), GSM8K_TOKENS + max_new_tokens / 2
    seen = sum(min(window, context) for window in config.window_sizes)
    cache = rows * seen * 2 * config.n_kv_head * config.head_dim
    return config.n_layer * LAYER_SECONDS + 2 * (counts["transformer_matrices"] + counts["lm_head"] + cache) / bandwidth


def gpu_bandwidth(kind: str) -> float | None:
    """Bytes a second of a GPU's memory by its kind; None for one that is not in the table."""
    kind = kind.upper()
    return GPU_BANDWIDTH.get(kind, GPU_BANDWIDTH.get(kind.partition("-")[0]))


def predict_memory(
    config: GPTConfig, world_size: int, rows: int, on_cpu: bool, dtype: torch.dtype, recompute: bool = False
) -> dict[str, float]:
    """Peak bytes of a worker by part, with `rows` rows of T tokens in a forward pass. On a CPU, of the whole process.

    Activations are what autograd keeps of a compiled block, and the gradients of one block, in numbers per channel. On
    a GPU, autograd keeps about 19 (residual, norms, q, k, v before and after rotation, attention's output, the MLP's
    two hidden layers of 4 each), and the matrices in the compute dtype. Depths 12 and 24 on one H100 used 5 and 3 %
    less than this. A CPU also keeps attention's weights for the blocks of keys that a block of queries sees, and
    copies for matmuls, and needs a tenth more for gaps between blocks of memory. A GPU's optimizer reuses the memory of
    the activations, so only the excess of its copies counts.
    """
    counts, tokens, size = param_counts(config), rows * config.sequence_len, dtype.itemsize
    embeddings, matrices = counts["wte"] + counts["value_embeds"], counts["transformer_matrices"]
    masters = counts["total"] - embeddings
    chunk = min(chunk_size(config.vocab_size, not on_cpu), tokens) * config.vocab_size
    stack = 4 * config.n_layer * config.n_embd**2  # the largest stack that Muon updates at once: the MLPs' matrices
    kept = [19 + on_cpu * (7 + 1.3 * seen / config.head_dim) for seen in visible_keys(config)]
    channels = (len(kept) + max(kept) if recompute else sum(kept)) + 20 + 30 * on_cpu
    parts = {
        "weights": 4 * masters + size * embeddings,
        "gradients": 4 * masters + size * embeddings,
        "optimizer shard": (4 * matrices + 8 * (counts["total"] - matrices)) / world_size,
        "optimizer's copies": 32 * stack / world_size,
        "activations": (1.1 if on_cpu else 1) * size * config.n_embd * tokens * channels,
        "logits": size * chunk + (size + 4) * counts["lm_head"],  # one chunk, and the head's gradient
        "process": PROCESS_BYTES,
    }
    if not on_cpu:
        parts["activations"] += size * matrices * (size < 4)
        if world_size > 1:  # the reduced gradients of this rank's shards
            parts["optimizer's copies"] += (4 * masters + size * embeddings) / world_size
        reused = parts["activations"] + parts["logits"]
        parts["optimizer's copies"] = max(0, parts["optimizer's copies"] - reused)
        parts["process"] = CONTEXT_BYTES + NCCL_BYTES * (world_size > 1)
    return parts


def gpu_memory(kind: str) -> float:
    """Bytes of a GPU by its type, as Ray or the options name it. inf if it is not in the table."""
    kind = kind.upper()
    return GPU_GIB.get(kind, GPU_GIB.get(kind.partition("-")[0], math.inf)) * 2**30


def rows_that_fit(
    config: GPTConfig, rows: int, world_size: int, on_cpu: bool, dtype: torch.dtype, memory: float, recompute: bool
) -> int:
    """Rows in a forward pass: at most `rows` and MAX_TOKENS_…, halved until the memory plan fits, at least 1."""
    rows = max(1, min(rows, (MAX_TOKENS_PER_CPU if on_cpu else MAX_TOKENS_PER_GPU) // config.sequence_len))
    while rows > 1 and sum(predict_memory(config, world_size, rows, on_cpu, dtype, recompute).values()) > memory:
        rows //= 2
    return rows


def visible_keys(config: GPTConfig) -> list[float]:
    """For each layer, the mean number of keys that the CPU's attention computes per block of queries."""
    T = config.sequence_len
    return [(T + BLOCK) / 2 if window >= T else min(window + BLOCK, T) for window in config.window_sizes]


def _print(plan: RunPlan, options: PlanOptions, rows: int, prediction: Prediction) -> None:
    console = Console(highlight=False)
    sizes = {
        "depth": f"{plan.depth}",
        "width, heads": f"{plan.n_embd}, {plan.n_head} of {plan.head_dim}",
        "windows": f"{plan.config.window_pattern}, {min(plan.config.window_sizes)} to {max(plan.config.window_sizes)}",
        **{f"parameters, {name.replace('_', ' ')}": f"{count:,}" for name, count in plan.param_counts.items()},
        "scaling parameters": f"{plan.scaling_params:,}",
        "FLOPs per token": f"{plan.flops_per_token:,}",
        "tokens": f"{plan.total_tokens:,}",
        "batch": f"{plan.total_batch_size:,} tokens",
        "steps": f"{plan.num_iterations:,}",
        "FLOPs": f"{plan.total_flops:.6e}",
        "learning rates": ", ".join(f"{name.removesuffix('_lr')} {lr:.4g}" for name, lr in plan.lrs.items()),
        "Muon weight decay": f"{plan.weight_decay:.4g}",
    }
    total = sum(prediction.memory.values())
    memory = {name: f"{size / 2**20:,.0f} MiB" for name, size in [*prediction.memory.items(), ("total", total)]}
    hours = prediction.seconds / 3600
    waiting = f", {options.network:g} Gbit/s" if options.nodes > 1 else ""
    outlook = {"time": f"{prediction.seconds:,.0f} s ({hours:.2f} h) at {options.mfu:.0%} MFU{waiting}"}
    if options.gpus:
        outlook["cost"] = f"${prediction.dollars:,.0f} at ${options.dollars_per_gpu_hour:g} per GPU hour"
    if rl := prediction.rl:
        outlook[f"RL, {rl.steps:,} steps"] = (
            f"{rl.seconds:,.0f} s more: rollouts {rl.rollouts:,.0f}, learning {rl.learning:,.0f}, "
            f"pass@k {rl.measuring:,.0f}"
        )
    for title, values in {
        f"depth {plan.depth}": sizes,
        f"memory per worker, {rows} rows per forward pass": memory,
        f"{options.nodes * options.gpus} × {options.gpu}" if options.gpus else "this machine's CPUs": outlook,
    }.items():
        table = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for name, value in values.items():
            table.add_row(name, value)
        console.print(table)


def _print_nodes(plan: RunPlan, options: PlanOptions, prediction: Prediction) -> None:
    console = Console(highlight=False)
    title = f"{plan.total_batch_size:,} tokens per step over {options.network:g} Gbit/s"
    columns = ("nodes", "step", "waiting for the network", "tokens/s", "efficiency", "hours")
    table = Table(*columns, title=title, title_justify="left", min_width=60)
    one, previous, enough = prediction.steps[1].seconds, 1, None
    for nodes, step in prediction.steps.items():
        speedup = one / step.seconds
        table.add_row(
            f"{nodes}",
            f"{step.seconds:.3f} s",
            f"{step.waiting / step.seconds:.0%}",
            f"{plan.total_batch_size / step.seconds:,.0f}",
            f"{speedup / nodes:.0%}",
            f"{plan.num_iterations * step.seconds / 3600:,.2f}",
        )
        before = one / prediction.steps[previous].seconds
        if enough is None and nodes > 1 and speedup < before * (1 + 0.5 * (nodes - previous) / previous):
            enough = previous
        previous = nodes
    console.print(table)
    if enough:
        many = f"{enough} nodes" if enough > 1 else "one node"
        console.print(f"more than {many} hardly pay: over half of the added time is spent waiting for the network")
    counts = plan.param_counts
    size = 4 * counts["total"] + (8 * counts["total"] - 4 * counts["transformer_matrices"])
    first = size - (size - 4 * counts["total"]) * (1 - 1 / options.nodes)
    console.print(
        f"checkpoints of {size / 1e9:,.2f} GB each leave the first node in {8e-9 * first / options.network:,.1f} s at "
        f"best, while training continues; rows are {plan.total_batch_size * 2 / 1e6:,.1f} MB per step"
    )
