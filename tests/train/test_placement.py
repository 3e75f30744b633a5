"""Which hosts a run's workers are put on, and when one is left out."""

from types import SimpleNamespace

import pytest
import ray
import ray.train
import torch

from nanochat_ray.train import failing, hosts, launch, loop


@pytest.fixture
def monitor(monkeypatch):
    """The actor's object, whose methods answer as Ray's do."""
    names = {"a": {"NodeID": "1"}, "b": {"NodeID": "2"}}
    monkeypatch.setattr(failing.versions, "hosts", lambda: names)
    monkeypatch.setattr(hosts.ray, "get", lambda value: value)
    monitor = launch.Monitor.__ray_actor_class__()
    methods = ("bad_places", "held_places", "placeholders", "hold", "release", "blame", "failed_places", "fails_again")
    for name in methods:
        method = getattr(monitor, name)
        monkeypatch.setattr(monitor, name, SimpleNamespace(remote=method), raising=False)
    return monitor


@pytest.mark.parametrize(
    ("gpus", "workers", "elastic", "strategy"),
    [
        ([8, 8], 8, False, "STRICT_PACK"),
        ([8, 8], 16, False, "PACK"),
        ([4, 4], 8, False, "PACK"),
        ([8, 8], 8, True, "PACK"),
    ],
)
def test_a_run_of_a_sweep_that_fits_one_host_is_on_one(gpus, workers, elastic, strategy, monkeypatch):
    nodes = [{"NodeID": str(i), "Alive": True, "Resources": {"GPU": n, "CPU": 8}} for i, n in enumerate(gpus)]
    monkeypatch.setattr(hosts.ray, "nodes", lambda: nodes)
    assert hosts.scaling_config(workers, elastic=elastic).placement_strategy == strategy


@pytest.mark.parametrize(
    ("free", "bad", "workers", "label"),
    [
        ({"1": 8, "2": 3}, [], 2, "2"),  # the fullest with room
        ({"1": 8, "2": 3}, [], 4, "1"),
        ({"1": 8, "2": 3}, [], 9, None),
        ({"1": 8, "2": 8}, [("1", None)], 2, "2"),
        ({"1": 8, "2": 8, "3": 8}, [("1", None)], 16, "!in(1)"),
        ({"1": 8}, [("1", None)], 8, "1"),  # better than none
        ({"1": 8, "2": 8}, [("1", "3")], 8, "2"),
        ({"1": 8}, [("1", "3")], 7, "1"),
        ({"1": 1}, [("1", "0")], 1, "1"),
    ],
)
def test_the_host_that_workers_start_on(free, bad, workers, label, monitor, monkeypatch):
    held = []
    monkeypatch.setattr(hosts, "free_rooms", lambda scaling: free)
    monkeypatch.setattr(hosts, "alive", lambda: {node: {"GPU": gpus} for node, gpus in free.items()})
    monkeypatch.setattr(hosts, "hold_gpus", lambda failing, bad, *_: held.extend(gpu for _, gpu in bad if gpu))
    monitor.bad.update(bad)
    scaling = ray.train.ScalingConfig(num_workers=(1, 24), use_gpu=True, resources_per_worker={"GPU": 1})
    selector = hosts.GoodHosts(monitor, monitor).on_controller_start_worker_group(
        scaling_config=scaling, num_workers=workers
    )
    assert selector == (label and {"ray.io/node-id": label})
    assert held == ([] if sum(free.values()) == 1 else [gpu for _, gpu in bad if gpu])
    ray._private.label_utils.validate_label_selector(selector)


def test_a_run_that_takes_no_fewer_workers_is_not_left_without_room(monitor, monkeypatch):
    monitor.bad.update([("1", "3"), ("2", None)])
    monkeypatch.setattr(hosts, "alive", lambda: {"1": {"GPU": 8}, "2": {"GPU": 4}})
    of = {"use_gpu": True, "resources_per_worker": {"GPU": 1}, "placement_strategy": "STRICT_PACK"}
    for workers, left_out in ((7, monitor.bad), (8, set())):
        assert hosts.left_out(ray.train.ScalingConfig(num_workers=workers, **of), monitor) == left_out


def test_a_host_on_which_workers_fail_twice_is_left_out(monitor):
    for rank, node in enumerate("112"):
        monitor.started(rank, node)
    assert not hosts.fails_again(monitor, monitor, dead=[1])
    monitor.update({"step": 1})
    assert not hosts.fails_again(monitor, monitor, dead=[1])  # the first was before a new step
    assert not monitor.bad
    monitor.failed(0, "Input/output error")
    monitor.failed(2, "Connection closed by peer")
    assert not hosts.fails_again(monitor, monitor, dead=[])
    assert monitor.bad == {("1", None)}
    assert monitor.lines[-1] == "workers failed twice on host a: the run avoids them if there are others"
    monitor.failed(2, "no such file")
    assert hosts.fails_again(monitor, monitor, dead=[])
    assert monitor.outcome["error"] == "workers failed 3 times in a row without a new step: no such file"


def test_a_gpu_on_which_workers_fail_twice_is_left_out_and_its_host_if_that_does_not_help(monitor):
    for rank, place in enumerate([("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]):
        monitor.started(rank, *place)
    monitor.failed(0, "Connection closed by peer")
    monitor.failed(1, "CUDA error: an illegal memory access", fault="GPU")
    assert not hosts.fails_again(monitor, monitor, dead=[])
    monitor.update({"step": 1})  # what breaks under load lets steps pass
    assert not hosts.fails_again(monitor, monitor, dead=[1])
    assert monitor.bad == {("1", "1")}
    assert monitor.lines[-1] == "workers failed twice on GPU 1 of host a: the run avoids them if there are others"
    monitor.failed(0, "CUDA out of memory", fault=None)
    assert not hosts.fails_again(monitor, monitor, dead=[])
    assert not hosts.fails_again(monitor, monitor, dead=[0])
    assert monitor.bad == {("1", "1"), ("1", None)}
    assert hosts.fails_again(monitor, monitor, dead=[2, 3])  # a host that is lost is not two bad GPUs
    assert monitor.bad == {("1", "1"), ("1", None)}


def test_what_a_new_start_would_repeat_on_every_host_ends_the_run_and_on_one_host_leaves_that_out(monitor):
    for rank, node in enumerate("112"):
        monitor.started(rank, node)
    monitor.failed(1, "rows are not on this host", may_pass=False)
    assert not hosts.fails_again(monitor, monitor, dead=[])
    for rank, node in enumerate("112"):
        monitor.started(rank, node)
    monitor.failed(0, "rows_00000.arrow is not a file of rows", may_pass=False)
    monitor.failed(2, "rows_00000.arrow is not a file of rows", may_pass=False)
    assert hosts.fails_again(monitor, monitor, dead=[])
    assert monitor.outcome["error"] == "rows_00000.arrow is not a file of rows"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "GPU"),
        (RuntimeError("CUDA error: out of memory"), None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None),
        (MemoryError(), None),
        (RuntimeError("NCCL error: unhandled cuda error, Connection closed by peer"), "host"),
        (OSError(5, "Input/output error"), "host"),
    ],
)
def test_what_is_at_fault(error, fault):
    assert loop.fault_of(error) == fault


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ValueError("rows"), False),
        (FileNotFoundError("tokenizer"), False),
        (KeyError("tokens"), False),
        (ImportError("torchao"), False),
        (RuntimeError("Connection closed by peer"), True),
        (ConnectionError("workers don't reach each other"), True),
        (TimeoutError("no answer"), True),
        (OSError(5, "Input/output error"), True),
        (ray.exceptions.RayError(), True),
    ],
)
def test_restarts_are_for_what_machines_do(error, passes):
    assert loop.may_pass(error) == passes
