"""Which hosts a run's workers are put on, and when one is left out."""

from types import SimpleNamespace

import pytest
import ray

from nanochat_ray.train import hosts, launch, loop


@pytest.fixture
def monitor(monkeypatch):
    """The actor's object, whose methods answer as Ray's do."""
    names = {"a": {"NodeID": "1"}, "b": {"NodeID": "2"}}
    monkeypatch.setattr(launch, "hosts", lambda: names)
    monkeypatch.setattr(hosts.ray, "get", lambda value: value)
    monitor = launch.Monitor.__ray_actor_class__()
    monitor.failing_nodes = SimpleNamespace(remote=lambda: monitor.failing)
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
    ("free", "failing", "workers", "label"),
    [
        ({"1": 8, "2": 3}, set(), 2, "2"),  # the fullest with room
        ({"1": 8, "2": 3}, set(), 4, "1"),
        ({"1": 8, "2": 3}, set(), 9, None),
        ({"1": 8, "2": 8}, {"1"}, 2, "2"),
        ({"1": 8, "2": 8, "3": 8}, {"1"}, 16, "!in(1)"),
        ({"1": 8, "2": 0}, {"1"}, 8, "1"),  # better than none
    ],
)
def test_the_host_that_workers_start_on(free, failing, workers, label, monitor, monkeypatch):
    monkeypatch.setattr(hosts, "free_rooms", lambda scaling: free)
    monitor.failing = failing
    selector = hosts.OneHost(monitor).on_controller_start_worker_group(scaling_config=None, num_workers=workers)
    assert selector == (label and {"ray.io/node-id": label})
    ray._private.label_utils.validate_label_selector(selector)


def test_a_host_on_which_workers_fail_twice_is_left_out(monitor):
    for rank, node in enumerate("112"):
        monitor.started(rank, node)
    assert not monitor.fails_again(dead=[1])
    monitor.update({"step": 1})
    assert not monitor.fails_again(dead=[1])  # the first was before a new step
    assert not monitor.failing
    monitor.failed(0, "CUDA error: an illegal memory access")
    monitor.failed(2, "Connection closed by peer")
    assert not monitor.fails_again(dead=[])
    assert monitor.failing == {"1"}
    assert monitor.lines[-1] == "workers on a failed twice: the run goes on without that host if there are others"
    monitor.failed(2, "no such file")
    assert monitor.fails_again(dead=[])
    assert monitor.outcome["error"] == "workers failed 3 times in a row without a new step: no such file"


def test_what_a_new_start_would_repeat_on_every_host_ends_the_run_and_on_one_host_leaves_that_out(monitor):
    for rank, node in enumerate("112"):
        monitor.started(rank, node)
    monitor.failed(1, "rows are not on this host", may_pass=False)
    assert not monitor.fails_again(dead=[])
    for rank, node in enumerate("112"):
        monitor.started(rank, node)
    monitor.failed(0, "rows_00000.arrow is not a file of rows", may_pass=False)
    monitor.failed(2, "rows_00000.arrow is not a file of rows", may_pass=False)
    assert monitor.fails_again(dead=[])
    assert monitor.outcome["error"] == "rows_00000.arrow is not a file of rows"


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
