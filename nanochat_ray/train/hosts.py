"""The hosts of a run: what it asks of the cluster, waiting for them, and finding those that are lost."""

import os
import socket
import time
from dataclasses import dataclass

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as autoscaling

RESIZE_SECONDS = 30.0  # between looks at whether a returned node lets a run have more workers again
LOST_HOST_SECONDS = 80.0  # in which Ray finds, with its own settings, that a host is lost
# Ray Train asks again for the hosts of a run every 20 seconds. Those of a run that was killed are free after so long.
RESERVATION_SECONDS = 30


@dataclass(frozen=True)
class Request:
    """What a run asks of the cluster: at most so many workers. By default there is one on every GPU, and without GPUs
    one on every host that has as many CPUs as the largest.

    use_gpu: None takes GPUs where there are any. wait_minutes: how long a cluster has to bring what it lacks.
    """

    workers: int | None = None
    use_gpu: bool | None = None
    wait_minutes: float = 10


def scaling_config(
    workers: int | None, use_gpu: bool | None = None, elastic: bool = True, rows: int | None = None
) -> ray.train.ScalingConfig:
    """Workers and what each gets, as a Request says. The default on CPUs is no more than the rows of a step.

    Several can be elastic: a run goes on with those that a lost node leaves, one at least, and grows when there is room
    for more.
    Raises ValueError when there are too few GPUs or CPUs and no more can come, or too few CPUs for one of several runs,
    which does not wait for more.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    if use_gpu is None:
        use_gpu = sum(gpus) > 0
    kind, there, each = ("GPU", sum(gpus), 1) if use_gpu else ("CPU", sum(cpus), 1)
    hosts = sum(count == max(cpus) > 0 for count in cpus) if elastic else 1
    workers = workers or (there if use_gpu else min(hosts, rows or hosts)) or 1
    if not use_gpu:  # each gets as many CPUs as leave room for all workers; a worker must fit on one node
        each = next((n for n in range(max(cpus), 0, -1) if sum(count // n for count in cpus) >= workers), 1)
    if there < workers and not (can_grow() and (elastic or use_gpu)):
        if use_gpu and not there:
            raise ValueError("no GPU on this machine: leave out --use-gpu and --preset gpu")
        raise ValueError(f"{workers} workers on {there} {kind}s: give at most one a {kind}")
    return ray.train.ScalingConfig(
        num_workers=(1, workers) if elastic and workers > 1 else workers,
        use_gpu=use_gpu,
        resources_per_worker={kind: each},
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def can_grow() -> bool:
    """Whether other hosts may join this Ray: one that this process has started is for this machine alone."""
    node = ray._private.worker._global_node
    return node is None or not node.is_head()


def wait_for_hosts(request: Request, scaling: ray.train.ScalingConfig, stage: str) -> ray.train.ScalingConfig:
    """Ask the cluster for all workers, and wait until there is room for them, or for some when wait_minutes are over.

    An autoscaler brings hosts only when it is asked. Ray Train asks on while the run lasts, and takes what comes.
    Raises ValueError when there is no room for one worker by then.
    """
    asking, said = autoscaling.TrainAutoscalingCoordinatorClient(f"nanochat-ray-{os.getpid()}-{time.time()}"), None
    deadline = time.monotonic() + 60 * request.wait_minutes
    try:
        while (there := room(scaling)) < scaling.max_workers and time.monotonic() < deadline:
            asking.maybe_send_resource_request(scaling, scaling.max_workers)
            if there != said:
                then = "starts with fewer" if there else "gives up"
                limit = f"{then} after {request.wait_minutes:g} minutes (--wait-minutes)"
                print(f"{stage}: waiting for {wanted(scaling)}: {there} there; {limit}", flush=True)
            said = there
            time.sleep(1)
            scaling = scaling_config(request.workers, scaling.use_gpu)
    finally:  # also after Ctrl-C, or the hosts stay reserved for minutes
        if said is not None:
            asking.cancel_resource_request()
    if not there:
        raise ValueError(
            f"no room for one of {wanted(scaling)}, after {request.wait_minutes:g} minutes (--wait-minutes)"
        )
    return scaling


def room(scaling: ray.train.ScalingConfig) -> int:
    """How many such workers the hosts that are there can take, if nothing else runs on them."""
    [(kind, each)] = scaling.resources_per_worker.items()
    return sum(int(node["Resources"].get(kind, 0) // each) for node in ray.nodes() if node["Alive"])


def wanted(scaling: ray.train.ScalingConfig) -> str:
    """3 workers of 1 CPU"""
    [(kind, each)] = scaling.resources_per_worker.items()
    return f"{scaling.max_workers} worker{'s' * (scaling.max_workers > 1)} of {each:g} {kind}{'s' * (each > 1)}"


class LostHosts(ControllerCallback):
    """After a failure, waits until Ray knows which hosts are lost: it would wait for workers on them else.

    A host's Ray that does not answer is given up by the head after some seconds. Ray Train looks at the list of hosts
    every 20 seconds; this has it look when a host was lost.
    """

    def __init__(self, monitor):
        self.monitor = monitor

    def __setstate__(self, state: dict) -> None:
        """Unpickled in the controller's process, before it asks for hosts the first time."""
        vars(self).update(state)
        autoscaling.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = RESERVATION_SECONDS

    def after_controller_state_update(self, previous_state, current_state) -> None:
        if not isinstance(current_state, RestartingState | ReschedulingState):
            return
        patience, said = time.monotonic() + LOST_HOST_SECONDS, set()
        while (lost := silent_hosts()) and time.monotonic() < patience:
            for address in lost - said:
                self.monitor.say.remote(f"host {address} does not answer")
            said |= lost
            time.sleep(0.5)
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True))


def silent_hosts() -> set[str]:
    """Addresses of those whose Ray does not answer, though it counts as alive."""
    silent = set()
    for node in ray.nodes():
        if node["Alive"]:
            try:
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
            except OSError:
                silent.add(node["NodeManagerAddress"])
    return silent
