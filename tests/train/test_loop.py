"""Steps of the loop by themselves, on stand-ins for what is around them."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.train import launch, loop
from nanochat_ray.train.loop import Diverged, attempt, start_save, train_step


class Noted:
    """In place of the monitor and of the workers' calls to it: what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        def remote(*given):
            self.told.append((name, *given))
            return self.failed.get(given[0], 0) if name == "failed_ranks" else None

        return SimpleNamespace(remote=remote)

    @property
    def failed(self) -> Counter:
        return Counter(told[1] for told in self.told if told[0] == "unmeasured")


@pytest.fixture
def monitor(monkeypatch):
    monkeypatch.setattr(loop.ray, "get", lambda value: value)
    return Noted()


def some_worker(**about) -> SimpleNamespace:
    progress = SimpleNamespace(step=7, measured=6, val_bpb=1.0)
    return SimpleNamespace(**{"progress": progress, "rank": 0, "world_size": 1, "left_out": set()} | about)


def test_a_measurement_that_fails_is_noted_and_does_not_end_a_run(monitor):
    def fails():
        raise TypeError("varlen_attn() got an unexpected keyword argument\nand a page of traceback")

    assert not attempt(some_worker(), monitor, "samples", fails)
    why = "samples of step 7 failed: TypeError: varlen_attn() got an unexpected keyword argument"
    assert monitor.told[-2] == ("unmeasured", "samples of step 7", 0, why)


def test_one_rank_that_fails_in_a_measurement_has_all_started_again_without_it(monitor, monkeypatch):
    """The others wait for it in a collective. An error of the collective itself tells of a lost rank, not of this."""
    monkeypatch.setattr(loop, "TOGETHER_SECONDS", 0.1)
    with pytest.raises(FileNotFoundError):
        attempt(some_worker(world_size=2), monitor, "its scores", Path("/none").read_text)
    assert monitor.failed == {"its scores of step 7": 1}
    with pytest.raises(RuntimeError, match="closed by peer"):
        attempt(some_worker(world_size=2), monitor, "val/bpb", lambda: exec('raise RuntimeError("closed by peer")'))
    assert "val/bpb of step 7" not in monitor.failed
    out = some_worker(world_size=2, left_out={"its scores of step 7"})
    assert not attempt(out, monitor, "its scores", lambda: pytest.fail("measured again"))


def test_new_workers_leave_out_a_measurement_in_which_workers_were_lost_twice():
    monitor = launch.Monitor.__ray_actor_class__()
    for _ in range(2):
        assert monitor.left_out() == set()
        monitor.begins("measuring val/bpb of step 9")
    assert monitor.left_out() == {"val/bpb of step 9"}
    assert monitor.lines == ["warning: val/bpb of step 9 is left out: workers were lost in it 2 times"]
    assert monitor.read_unmeasured() == ["val/bpb of step 9 is left out: workers were lost in it 2 times"]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_weight_that_is_not_finite_stops_a_save(wrong):
    model = GPT(GPTConfig(16, 64, 2, 2, 2, 32)).set_compute_dtype(torch.bfloat16)
    with torch.no_grad():
        model.transformer.wte.weight[3, 4] = wrong
    worker = SimpleNamespace(
        config=None,
        progress=SimpleNamespace(step=7),
        model=model,
        optimizer=build_optimizer(model, **BASE_LRS, weight_decay=0.0),
        device=torch.device("cpu"),
        world_size=1,
    )
    with pytest.raises(Diverged, match="step 7"):
        start_save(worker, None)


def test_the_optimizer_waits_for_the_copies_of_a_checkpoint(monkeypatch):
    """On a GPU these are taken while the forward and backward run; then the weights are overwritten."""
    order = []
    learned = loop.Learned(torch.zeros(()), 1.0, 1, {})
    monkeypatch.setattr(loop, "set_rates", lambda *_: 1.0)

    def update():
        order.append("update")
        raise InterruptedError

    worker = SimpleNamespace(
        config=None,
        rank=1,
        progress=SimpleNamespace(step=7),
        device=torch.device("cpu"),
        writer=SimpleNamespace(wait_for_copies=lambda: order.append("copied")),
        optimizer=SimpleNamespace(step=update),
        learn=lambda worker: order.append("gradients") or learned,
    )
    with pytest.raises(InterruptedError):
        train_step(worker, 1.0, None)
    assert order == ["gradients", "copied", "update"]


@pytest.mark.parametrize(("kind", "threads"), [("cpu", 3), ("cuda", 4)])
def test_a_worker_with_a_gpu_has_its_share_of_the_hosts_cpus(monkeypatch, kind, threads):
    """Ray gives it none, and PyTorch one thread."""
    monkeypatch.setattr(loop.machine, "available_cpus", lambda: 16)
    given = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 3.0})
    monkeypatch.setattr(loop.ray, "get_runtime_context", lambda: given)
    monkeypatch.setattr(loop.ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 4))
    assert loop.cpu_threads(torch.device(kind)) == threads
