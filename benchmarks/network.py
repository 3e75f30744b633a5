"""What a step costs over a slow network: `nanochat-ray plan`'s prediction beside what hosts measure. Needs root.

The hosts are namespaces of this machine (tests/cluster/hosts.py) whose links tc limits in both directions. The time of
a step without a network, and the optimizer's share of it, are measured on one host with a worker's number of rows.

    python -m benchmarks.network --hosts 2 3 --mbits 50 100 200
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_ray.model.scaling import model_config
from nanochat_ray.train.plan import GLOO_SHARE, plan_shards, predict_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))
from hosts import BIN, Cluster, Host, run


@dataclass
class Options:
    hosts: tuple[int, ...] = (2, 3)
    mbits: tuple[int, ...] = (50, 100, 200)
    """Mbit/s of each host's link, in each direction."""
    depth: int = 2
    vocab: int = 8192
    seq: int = 64
    rows: int = 4
    """Of each worker in a step."""
    steps: int = 4
    """Timed steps."""
    json: bool = False
    """End with one line of JSON."""


def limit(host: Host, mbits: int) -> None:
    """Both ends of the host's link send at most so much."""
    rate = ["root", "tbf", "rate", f"{mbits}mbit", "burst", "128k", "latency", "20ms"]
    run("tc", "-n", host.namespace, "qdisc", "replace", "dev", "eth0", *rate)
    run("tc", "qdisc", "replace", "dev", host.link, *rate)


def measure(cluster: Cluster, options: Options, workers: int) -> dict:
    arguments = [f"--{name}={getattr(options, name)}" for name in ("depth", "vocab", "seq", "steps")]
    arguments += [f"--device-batch={options.rows}", f"--workers={workers}", "--warmup=1", "--dtype=float32"]
    command = [str(BIN / "python"), "-m", "benchmarks.train", *arguments, "--compile=False", "--json"]
    env = cluster.env | {"TMPDIR": str(cluster.shared)}
    return json.loads(cluster.head.run(*command, env=env, timeout=600).strip().splitlines()[-1])


def compare(options: Options, num_hosts: int) -> list[dict]:
    shape = {"sequence_len": options.seq, "vocab_size": options.vocab, "head_dim": 64, "window_pattern": "L"}
    shards = plan_shards(model_config(options.depth, **shape), num_hosts, torch.float32)
    results = []
    cluster = Cluster(num_hosts)
    cluster.env["RAY_worker_niceness"] = "-10"  # other programs of this machine must not delay the network's threads
    with cluster:
        alone = measure(cluster, options, 1)
        update = alone["step_seconds"] * alone["shares"]["optimizer"]
        compute = alone["step_seconds"] - update * (1 - 1 / num_hosts)
        for mbits in options.mbits:
            for host in cluster.hosts:
                limit(host, mbits)
            network = 1e6 * mbits * GLOO_SHARE
            predicted = predict_step(shards, num_hosts, compute, update / num_hosts, 1, network, latency=1e-4)
            measured = measure(cluster, options, num_hosts)["step_seconds"]
            results.append({"hosts": num_hosts, "mbits": mbits, "sent_mb": predicted.sent / 1e6, "compute": compute})
            results[-1] |= {"predicted": predicted.seconds, "measured": measured}
            print(results[-1], file=sys.stderr, flush=True)
    return results


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    results = [result for num_hosts in options.hosts for result in compare(options, num_hosts)]
    table = Table("hosts", "Mbit/s", "MB sent a step", "compute", "predicted", "measured", "error", title="a step")
    for r in results:
        seconds = (f"{r[name]:.2f} s" for name in ("compute", "predicted", "measured"))
        error = f"{r['predicted'] / r['measured'] - 1:+.0%}"
        table.add_row(f"{r['hosts']}", f"{r['mbits']}", f"{r['sent_mb']:.1f}", *seconds, error)
    Console(highlight=False, stderr=options.json).print(table)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
