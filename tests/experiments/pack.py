"""Runs that take GPUs and do nothing, on a cluster of two nodes with four pretended ones each.

Takes the sweep's folder and, as JSON, [[name, workers, seconds], …]. Every run leaves the time at which its workers had
started, that at which it ended, and the nodes that they were on.
"""

import json
import sys
import time

import ray
from ray.cluster_utils import Cluster
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from experiments import sweep
from nanochat_ray import storage
from nanochat_ray.train import hosts, launch


def hold(config: dict) -> None:
    """A trial whose Train workers sleep, with the resources that training would take."""
    given = config["trial"]

    def sleep() -> None:
        node = ray.get_runtime_context().get_node_id()
        rank = ray.train.get_context().get_world_rank()
        storage.write_json(f"{given['folder']}/{given['name']}/{rank}.json", {"started": time.time(), "node": node})
        time.sleep(given["seconds"])

    run_dir = f"{given['folder']}/{given['name']}"
    scaling = hosts.scaling_config(given["options"]["workers"], elastic=False)
    monitor = launch.Monitor.remote()
    run_config = launch.run_config(run_dir, True, callbacks=[hosts.GoodHosts(monitor, monitor)])
    DataParallelTrainer(sleep, scaling_config=scaling, run_config=run_config).fit()
    started = [storage.read_json(f"{run_dir}/{rank}.json") for rank in range(given["options"]["workers"])]
    row = {"run": given["name"], "val_bpb": 1.0, "train_time_sec": given["seconds"], "ended": time.time()}
    row |= {"started": max(s["started"] for s in started), "nodes": len({s["node"] for s in started})}
    storage.write_json(f"{run_dir}/result.json", row)


if __name__ == "__main__":
    folder, runs = sys.argv[1], json.loads(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 4})
    cluster.add_node(num_cpus=1, num_gpus=4)
    ray.init(address=cluster.address, log_to_driver=False)
    trials = [
        {"name": name, "folder": folder, "seconds": seconds, "num_iterations": 1, "options": {"workers": workers}}
        for name, workers, seconds in runs
    ]
    sweep.run_trials(folder, trials, hold)
    ray.shutdown()
    cluster.shutdown()
