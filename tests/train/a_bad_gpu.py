"""A sweep and a run on two pretended GPUs, of which one fails at the second step of whatever trains on it.

Takes a folder, and rows. Leaves result.json there: for the sweep and for the run the GPUs that each group of workers
had, and what they said. The sweep has runs of one worker, so it begins with the first GPU, which is the bad one.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray import tune

from experiments import sweep
from nanochat_ray.train import failing, launch, loop, network, pretrain

BAD = "0"


def break_gpu(log: Path) -> None:
    """In this process and the workers that it starts."""
    train_loop = launch.train_loop_per_worker

    def train_loop_on_gpus(config: dict) -> None:
        gpus = [None] * dist.get_world_size()
        dist.all_gather_object(gpus, failing.own_gpu())
        if dist.get_rank() == 0:
            with open(log, "a") as out:
                print(json.dumps([Path(config["run_dir"]).name, *sorted(gpus)]), file=out)
        ray.train.torch.get_device = lambda: torch.device("cpu")
        train_step = loop.train_step

        def train_step_on_gpu(worker, *given):
            if failing.own_gpu() == BAD and worker.progress.step == 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return train_step(worker, *given)

        loop.train_step = train_step_on_gpu
        train_loop(config)

    launch.train_loop_per_worker = train_loop_on_gpus
    launch.network.TorchConfig = partial(network.TorchConfig, backend="gloo")


def trial(config: dict, failing, log: Path) -> None:
    break_gpu(log)
    sweep.train_trial(config, failing)


if __name__ == "__main__":
    folder, rows = Path(sys.argv[1]), sys.argv[2]
    os.environ |= {"NANOCHAT_RAY_HOME": str(folder), "WANDB_MODE": "disabled"}
    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    tiny = pretrain.PretrainOptions(
        depth=1, rows=rows, head_dim=32, total_batch_size=8 * 64, num_iterations=4, eval_every=4, eval_tokens=1024,
        save_every=0, sample_every=0, dtype="float32", compile=False, use_gpu=True,
    )  # fmt: skip
    said = StringIO()
    with redirect_stdout(said):
        options = sweep.SweepOptions(preset="cpu", name="sweep")
        _, sweep_folder = sweep.begin("sweep", options, {})
        runs = [sweep.replace(tiny, run=f"sweep/{name}", device_batch_size=8) for name in "ab"]
        trials = [sweep.trial(name, run, 1, options) for name, run in zip("ab", runs, strict=True)]
        of_sweep = failing.shared()
        sweep.run_trials(sweep_folder, trials, tune.with_parameters(trial, failing=of_sweep, log=folder / "sweep.log"))
        ray.kill(of_sweep)  # and so its placeholder
    break_gpu(folder / "run.log")
    with redirect_stdout(said):
        pretrain.run(sweep.replace(tiny, run="run"))
    logs = [[json.loads(line) for line in (folder / log).read_text().splitlines()] for log in ("sweep.log", "run.log")]
    (folder / "result.json").write_text(json.dumps([*logs, said.getvalue().splitlines()]))
    ray.shutdown()
