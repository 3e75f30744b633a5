"""An elastic run on three pretended GPUs, one of which another actor holds until it has started.

Prints, as JSON, the sizes of its groups of workers, the seconds until the first started, and what the monitor was told.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray

from nanochat_ray.train import hosts, launch, network


def work(config: dict) -> None:
    """Until there are three."""
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        with open(config["log"], "a") as log:
            print(context.get_world_size(), time.time(), file=log)
    while context.get_world_size() < 3:
        time.sleep(0.1)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    hosts.RESIZE_SECONDS = 1.0
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "3"
    ray.init("local", num_cpus=4, num_gpus=3, include_dashboard=False, log_to_driver=False)
    holder = ray.remote(num_gpus=1, num_cpus=0)(type("Holder", (), {"hold": lambda self: None}))
    held = holder.remote()
    ray.get(held.hold.remote())
    monitor, log = launch.Monitor.remote(), folder / "log"
    trainer = hosts.Trainer(
        work,
        monitor=monitor,
        failing=monitor,
        train_loop_config={"log": str(log)},
        torch_config=network.TorchConfig(backend="gloo"),
        scaling_config=hosts.scaling_config(None),
        run_config=launch.run_config(str(folder / "run"), True, -1, [hosts.GoodHosts(monitor, monitor)]),
    )
    began = time.time()
    run = threading.Thread(target=trainer.fit, daemon=True)
    run.start()
    while run.is_alive() and not log.exists():
        time.sleep(0.1)
    ray.kill(held)
    run.join()
    starts = [line.split() for line in log.read_text().splitlines()]
    said = ray.get(monitor.read.remote(0))[1]
    print(json.dumps([[int(size) for size, _ in starts], float(starts[0][1]) - began, said]))
    ray.shutdown()
