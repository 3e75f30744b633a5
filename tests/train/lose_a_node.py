"""A cluster of two nodes on this machine, one of which dies in the middle of a run, comes back, and is to go again.

Takes the options of the run as JSON, and exits with 1 when the run fails.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from nanochat_ray.train import checkpoint, hosts, pretrain
from nanochat_ray.train.metrics import read_metrics

QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a dead node is seen in 2 seconds, not 15


def wait_for_steps(run: threading.Thread, run_dir: str, world_size: int, count: int) -> None:
    """Until metrics.jsonl has so many steps of a worker group of this size."""
    while run.is_alive() and count > sum(line.get("train/world_size") == world_size for line in read_metrics(run_dir)):
        time.sleep(0.05)


def wait_for_a_checkpoint(run: threading.Thread, run_dir: str) -> None:
    """Without one, the run would begin again, and its first steps would be forgotten."""
    while run.is_alive() and checkpoint.latest_checkpoint(run_dir) is None:
        time.sleep(0.05)


def tell_ray_that_nodes_changed() -> None:
    """Ray Train looks every 20 seconds; this has it look now."""
    ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("test", recompute=True))


if __name__ == "__main__":
    options = pretrain.PretrainOptions(**json.loads(sys.argv[1]))
    run_dir = str(Path(os.environ["NANOCHAT_RAY_HOME"]) / "runs" / options.run)
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
    hosts.RESIZE_SECONDS = 1.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": QUICK})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    results = []
    run = threading.Thread(target=lambda: results.append(pretrain.run(options)))
    run.start()
    wait_for_steps(run, run_dir, world_size=2, count=12)
    wait_for_a_checkpoint(run, run_dir)
    cluster.remove_node(node, allow_graceful=False)
    wait_for_steps(run, run_dir, world_size=1, count=5)
    node = cluster.add_node(num_cpus=1)
    tell_ray_that_nodes_changed()
    wait_for_steps(run, run_dir, world_size=2, count=20)
    in_two_minutes = int(1000 * (time.time() + 120))  # the run ends before
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    GcsClient(address=cluster.gcs_address).drain_node(node.node_id, reason, "preempted", in_two_minutes)
    run.join()
    ray.shutdown()
    cluster.shutdown()
    sys.exit(not results)
