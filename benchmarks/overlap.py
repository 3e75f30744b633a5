"""How long a training step waits for what travels between nodes, where computing leaves the CPUs alone as on GPUs.

Two hosts (namespaces, tests/cluster/hosts.py; needs root) run the optimizer on a model of depth 24 whose blocks sleep
for as long as they would compute. The link is as slow, beside a step, as 400 Gbit/s is for two nodes of 8 H100s: what
depth 24 sends at 16 workers takes 0.207 of a step. The optimizer runs as in training, and again without overlap.

    python -m benchmarks.overlap [--passes 2] [--seconds 4]
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from nanochat_ray.model import shards
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.train.plan import GLOO_SHARE, plan_shards, predict_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

CONFIG = GPTConfig(64, 4096, 24, 3, 3, 192, "L")  # width and vocabulary an eighth of depth 24's
BUCKETS = 4  # of matrices, as on 16 workers
STEPS = 5


@dataclass
class Options:
    seconds: float = 4.0
    """Computing of a step: a third in forwards, the rest in backwards."""
    passes: int = 2
    """Forward and backward passes in a step; the first and the last can hide what travels."""
    wire: float = 0.207
    """Seconds that all bytes take on the link, for each second of computing."""
    rank: int | None = None
    """For the processes that this one starts."""


class Compute(torch.autograd.Function):
    """Takes its time, forward and twice as long backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * ctx.seconds)
        return grad, None


def step_seconds(options: Options, model: GPT, overlap: bool) -> float:
    """Of one training step, as the training loop takes it."""
    optimizer = build_optimizer(model, **BASE_LRS, weight_decay=0.0)
    model.wait_for_weights = None
    if overlap:
        optimizer.overlap(model)
    idx, seconds = torch.zeros((1, 16), dtype=torch.long), []
    for _ in range(STEPS + 1):
        began = time.monotonic()
        for i in range(options.passes):
            loss = model(idx, idx)
            if overlap and i == options.passes - 1:
                optimizer.reduce_in_backward()
            loss.backward()
        optimizer.step()
        seconds.append(time.monotonic() - began)
    optimizer.wait()
    return statistics.median(seconds[1:])


def work(options: Options) -> None:
    """On one host."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    model.set_compute_dtype(torch.bfloat16)
    pause = options.seconds / options.passes / 3 / CONFIG.n_layer
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, x: Compute.apply(x, pause))
    dist.init_process_group("gloo", init_method="env://")
    seconds = [step_seconds(options, model, overlap) for overlap in (False, True)]
    if options.rank == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


def measure(options: Options) -> None:
    from hosts import Cluster

    class Hosts(Cluster):
        def join(self, host) -> None:
            """Without Ray."""

    parts = plan_shards(CONFIG, 2, torch.bfloat16)
    network = 8 * sum(sum(shard.bytes_sent()) for shard in parts) / (options.wire * options.seconds)
    with Hosts(2) as cluster:
        _, fast = train(cluster, options, 20_000)
        apart, overlapped = train(cluster, options, round(network / 1e6))
    update, used = fast - options.seconds, GLOO_SHARE * network
    predicted = predict_step(parts, 2, fast, update, options.passes, used, 1e-4).waiting
    print(f"a link of {network / 1e6:,.0f} Mbit/s between two hosts; {fast:.2f} s a step on one of 20,000")
    rows = (
        ("one after the other", apart - fast),
        ("overlapped", overlapped - fast),
        ("overlapped, predicted", predicted),
    )
    for name, waits in rows:
        print(f"{name:<22}{fast + waits:6.2f} s, waits {waits:.2f} s, {waits / (fast + waits):.1%}")


def train(cluster, options: Options, mbits: int) -> list[float]:
    """Seconds of a step over such a link, one after the other and overlapped."""
    from benchmarks.network import limit

    command = [sys.executable, "-m", "benchmarks.overlap", f"--seconds={options.seconds}", f"--passes={options.passes}"]
    address = {"MASTER_ADDR": cluster.head.address, "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    address |= {"GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": os.getcwd()}
    processes = []
    for rank, host in enumerate(cluster.hosts):
        limit(host, mbits)
        env = address | {"RANK": str(rank)}
        processes.append(host.popen(*command, f"--rank={rank}", env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=600)[0] for process in processes]
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    shards.MIN_BUCKET_BYTES = 4 * 12 * CONFIG.n_layer * CONFIG.n_embd**2 // (BUCKETS + 1)
    measure(options) if options.rank is None else work(options)


if __name__ == "__main__":
    main()
