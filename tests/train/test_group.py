"""Three ranks over gloo, each a process: do they call the same collectives, and end alike?"""

import multiprocessing
import os
import traceback
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from nanochat_ray.data.loader import write_rows
from nanochat_ray.train import checkpoint, loop

RANKS = 3
COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather_object", "broadcast")
LRS = {"unembedding_lr": 0.01, "embedding_lr": 0.1, "matrix_lr": 0.02, "scalar_lr": 0.1}
MODEL = {"sequence_len": 32, "vocab_size": 4096, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}


class Monitor:
    """In place of the actor: what it is told, and what it asks for at each call."""

    def __init__(self, requests: dict[int, str]):
        self.requests, self.calls, self.outcome = requests, 0, None

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *given: self.answer(name, *given))

    def answer(self, name, *given):
        if name == "request":
            self.calls += 1
            return self.requests.get(self.calls)
        if name == "finish":
            self.outcome = given[0]


def measure(model, tokenizer):
    dist.all_gather_object([None] * dist.get_world_size(), dist.get_rank())
    return {"measured": 1.0}


def recorded(sequence: list[str]) -> None:
    def recording(name, function):
        def call(*args, **options):
            sequence.append(f"{name} {tuple(args[0].shape)}" if torch.is_tensor(args[0]) else name)
            return function(*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, recording(name, getattr(dist, name)))


def train(config, requests, sequence, broken=False):
    """(the collectives of a run, its outcome). broken: this rank's weights become so before the last save."""
    sequence.clear()
    monitor, start_save = Monitor(requests), loop.start_save

    def break_and_save(worker, log):
        if broken and worker.progress.step == config.num_iterations:
            worker.model.transformer.wte.weight.data[:] = torch.nan
        start_save(worker, log)

    loop.start_save = break_and_save
    try:
        loop.run(config, monitor, loop.Measurement(6, measure), None)
    finally:
        loop.start_save = start_save
    return list(sequence), monitor.outcome


def bytes_read_of_the_optimizer(folder, config, monkeypatch):
    """By the new group's ranks, and how many bytes there are."""
    read = []

    class Counting:
        def __init__(self, *args):
            self.file = OPEN(*args)

        def get_slice(self, key):
            rows = self.file.get_slice(key)

            class Rows:
                def __getitem__(self, part):
                    read.append(rows[part])
                    return read[-1]

            return Rows()

    monkeypatch.setattr(checkpoint, "safe_open", Counting)
    worker = loop.start(config)
    assert worker.resumed
    return sum(4 * tensor.numel() for tensor in read)


OPEN = checkpoint.safe_open


def on_rank(rank, folder, config, results):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "disabled"}
    torch.set_num_threads(1)
    sequence, patch = [], pytest.MonkeyPatch()
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=dist.get_world_size)
    patch.setattr(ray.train, "get_context", lambda: context)
    patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_assigned_resources=dict))
    patch.setattr(ray, "get", lambda value: value)
    patch.setattr(loop, "peak_flops", lambda *_: 1e12)
    recorded(sequence)
    try:
        dist.init_process_group("gloo", f"file://{folder}/three", rank=rank, world_size=RANKS)
        found = {
            "whole": train(config, {}, sequence),
            "requests": train(replace(config, run_dir=f"{folder}/asked"), {5: "save", 8: "stop"}, sequence),
            "one is broken": train(replace(config, run_dir=f"{folder}/broken"), {}, sequence, broken=rank == 1),
        }
        worker = loop.start(config)
        worker.progress.val_bpb = 1.0
        dist.barrier()
        dist.destroy_process_group()  # as Ray does while the training of a group that it ends goes on
        worker.progress.step = 99
        with pytest.raises(RuntimeError, match="the process group is gone"):
            loop.start_save(worker, None)
        worker.writer.start(99, worker.model, worker.optimizer, {})
        with pytest.raises(RuntimeError, match="the process group is gone"):
            worker.writer.finish()
        if rank < 2:
            dist.init_process_group("gloo", f"file://{folder}/two", rank=rank, world_size=2)
            found["resumed by two"] = train(replace(config, run_dir=f"{folder}/asked"), {}, sequence)
            found["read"] = bytes_read_of_the_optimizer(folder, config, patch)
        results.put((rank, found))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, golden):
    """(what each rank found, the folder)."""
    folder = tmp_path_factory.mktemp("ranks")
    draw = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 2)):  # one rank has nothing to evaluate
        (folder / "rows" / split).mkdir(parents=True)
        write_rows(str(folder / "rows" / split / "rows_00000.arrow"), draw.integers(0, 256, (count, 33)))
    config = loop.TrainConfig(
        run_dir=f"{folder}/whole", stage="pretrain", rows=f"{folder}/rows", tokenizer=str(golden / "nanochat_d2"),
        model=MODEL | {"window_pattern": "L"}, total_batch_size=8 * 32, device_batch_size=2, num_iterations=12, lrs=LRS,
        weight_decay=0.1, flops_per_token=1, seed=1, init_from=None, eval_every=3, eval_tokens=2 * 32, sample_every=4,
        save_every=5, prompts=[[0, 1, 2]], dtype="float32", compile=False, recompute=False, fp8=False,
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=on_rank, args=(rank, folder, config, results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    for result in found.values():
        assert isinstance(result, dict), result
    return found, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole", "requests", "one is broken", "resumed by two"])
def test_all_ranks_call_the_same_collectives(ranks, case):
    found, _ = ranks
    sequences = [result[case][0] for result in found.values() if case in result]
    assert len(sequences) == (2 if case == "resumed by two" else RANKS)
    assert len(sequences[0]) > 40 and all(sequence == sequences[0] for sequence in sequences)
    outcome = found[0][case][1]
    if case == "one is broken":
        assert "not finite" in outcome["error"] and found[1][case][1] is None
    else:
        assert outcome == {"step": 8 if case == "requests" else 12, "error": None}


@pytest.mark.slow
def test_a_group_that_was_destroyed_leaves_no_checkpoint(ranks):
    _, folder = ranks
    assert not (folder / "whole" / "checkpoints" / "step_000099" / "meta.json").exists()
    newest = checkpoint.latest_checkpoint(f"{folder}/whole")
    assert newest.endswith("step_000012")
    meta = checkpoint.read_meta(newest)
    assert meta["world_size"] == RANKS
    del meta["files"]["optimizer_00002.safetensors"]
    checkpoint.storage.write_json(f"{newest}/meta.json", meta)
    with pytest.raises(ValueError, match="has the optimizer's files of 2 of 3 workers"):
        checkpoint.verify(newest)


@pytest.mark.slow
def test_ranks_that_resume_read_their_own_part_of_the_optimizer(ranks):
    found, folder = ranks
    files = (folder / "whole" / "checkpoints" / "step_000012").glob("optimizer_*")
    there, read = sum(file.stat().st_size for file in files), [found[rank]["read"] for rank in (0, 1)]
    assert 0.9 * there < sum(read) < there and max(read) < 0.65 * there
