"""What the driver decides before workers start."""

import math
import signal
import time
from types import SimpleNamespace

import pytest
import ray

from nanochat_ray.model.scaling import plan_run
from nanochat_ray.train import hosts, launch, pretrain
from nanochat_ray.train.hosts import Request
from nanochat_ray.train.launch import device_batch_size, run_config, train


def config_of(depth, **changes):
    plan = plan_run(depth)
    defaults = {
        "stage": "pretrain",
        "run_dir": "",
        "fp8": False,
        "dtype": None,
        "recompute": False,
        "device_batch_size": None,
    }
    return SimpleNamespace(
        **defaults | {"model": vars(plan.config), "total_batch_size": plan.total_batch_size} | changes
    )


@pytest.mark.parametrize(
    ("depth", "gib", "rows"), [(12, 79, 16), (24, 79, 16), (26, 79, 8), (26, 139, 16), (12, 22, 16)]
)
def test_on_gpus_the_device_batch_is_what_fits(depth, gib, rows, monkeypatch):
    monkeypatch.setattr(launch, "smallest_gpu", lambda: gib * 2**30)
    scaling = ray.train.ScalingConfig(num_workers=1, use_gpu=True)
    assert device_batch_size(config_of(depth), scaling) == rows
    assert device_batch_size(config_of(depth, device_batch_size=3), scaling) == 3


def test_the_device_batch_of_cpus_does_not_follow_their_memory():
    assert device_batch_size(config_of(24), ray.train.ScalingConfig(num_workers=1)) == 2


def test_fp8_without_torchao_ends_on_one_line_before_anything_starts(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launch.checkpoint, "latest_checkpoint", lambda run_dir, **_: None)
    monkeypatch.setattr(launch.storage, "exists", lambda uri: False)
    with pytest.raises(ValueError, match=r"fp8 needs torchao: pip install 'nanochat-ray\[gpu\]'") as raised:
        train(config_of(12, fp8=True), {"inputs": {}}, Request())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("use_gpu", [False, True])
def test_workers_get_the_environment_of_their_kind_and_the_users_own(use_gpu, monkeypatch, tmp_path):
    """Malloc is tuned for CPU workers alone, also in a cluster with GPUs."""
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    ours = run_config(str(tmp_path), use_gpu).worker_runtime_env["env_vars"]
    assert set(ours) == {"PYTORCH_CUDA_ALLOC_CONF" if use_gpu else "GLIBC_TUNABLES", "NCCL_DEBUG"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    if use_gpu:
        theirs = run_config(str(tmp_path), use_gpu).worker_runtime_env["env_vars"]
        assert theirs == ours | {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}


def test_a_gpus_memory_is_asked_of_its_node_or_known_by_its_kind(ray_session, monkeypatch):
    """This machine has no nvidia-smi, or none that finds a GPU."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    gpus = {"GPU": 2.0, "accelerator_type:H200": 1.0}
    monkeypatch.setattr(launch.ray, "nodes", lambda: [node | {"Resources": gpus}])
    assert launch.smallest_gpu() == 139 * 2**30
    told = ray.remote(num_cpus=0)(lambda: 5 * 2**30)
    monkeypatch.setattr(launch, "_gpu_bytes", told)
    assert launch.smallest_gpu() == 5 * 2**30
    monkeypatch.setattr(launch.ray, "nodes", lambda: [node])
    assert launch.smallest_gpu() == math.inf


def test_hosts_without_the_rows_are_named_before_training(ray_session, monkeypatch, tmp_path):
    """One host stands in for two."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    monkeypatch.setattr(hosts.versions, "hosts", lambda: {"a": node, "b": node})
    hosts.check_rows(str(tmp_path))
    hosts.check_rows("s3://bucket/rows")
    with pytest.raises(FileNotFoundError, match=r"missing is not on a, b: set NANOCHAT_RAY_HOME to a folder that all"):
        hosts.check_rows(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"workers": 3}, "^3 workers are too many for 2 CPUs: give at most one per CPU$"),
        ({"workers": 2, "total_batch_size": 64}, "at least 64 for each of 2 workers"),
        ({"use_gpu": True}, "^no GPU on this machine: omit --use-gpu and --preset gpu$"),
    ],
)
def test_a_run_that_is_refused_leaves_nothing(changes, why, tiny, nanochat_ray_home):
    """And at once: a Ray that this process has started itself does not wait for hosts."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=why):
        pretrain.run(tiny(run="refused", **changes))
    assert time.monotonic() - began < 10
    assert not (nanochat_ray_home / "runs").exists()


@pytest.fixture
def python_handlers():
    """Python's own handlers of signals, as in a new process: a Ray Train in this one leaves its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_that_come_at_once_are_one_and_a_later_one_ends_the_driver(ray_session, python_handlers, monkeypatch):
    """Slurm signals a task by itself and by srun."""
    monitor = launch.Monitor.remote()
    with launch.StopOnSignal(monitor):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert ray.get(monitor.request.remote()) == "stop"
        monkeypatch.setattr(launch, "SAME_SIGNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
