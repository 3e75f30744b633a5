"""The hosts of a run: requesting them from the cluster, waiting for them, choosing them, and noticing lost ones."""

import os
import socket
import time
from collections import Counter
from dataclasses import dataclass

import ray
import ray.train
import ray.train.torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as autoscaling

from nanochat_ray import storage, versions
from nanochat_ray.measuring import PROGRESS_SECONDS
from nanochat_ray.train.failing import Place, described, good_rooms, hold_gpus

RESIZE_SECONDS = 30.0  # between checks whether a run can have more workers, because a node has returned
FIRST_LINE_SECONDS = 5.0  # a wait prints its first line after so long
LOST_HOST_SECONDS = 80.0  # Ray notices within this time that a host is lost, with its default settings
# Ray Train renews its request for hosts every 20 seconds. The hosts of a killed run are free after so long.
RESERVATION_SECONDS = 30


@dataclass(frozen=True)
class Request:
    """What a run requests from the cluster."""

    workers: int | None = None  # at most; by default one per GPU, else one per host with as many CPUs as the largest
    use_gpu: bool | None = None  # None uses GPUs if there are any
    wait_minutes: float = 10  # to wait for missing hosts
    beside: int = 0  # GPUs that the default number of workers leaves free for other actors of the run


def scaling_config(
    workers: int | None,
    use_gpu: bool | None = None,
    elastic: bool = True,
    rows: int | None = None,
    beside: int = 0,
) -> ray.train.ScalingConfig:
    """The number of workers of a Request and the resources of each. rows: upper bound on the default on CPUs.

    Several elastic workers continue with those that a lost node leaves, at least one, and grow when there is room for
    more. Workers that are not elastic are placed on one node if the largest has enough resources.
    Raises ValueError if there are too few GPUs or CPUs and no more can join, or too few CPUs for a run of a sweep,
    which does not wait for more.
    """
    cpus, gpus = ([int(node.get(kind, 0)) for node in alive().values()] for kind in ("CPU", "GPU"))
    if use_gpu is None:
        use_gpu = sum(gpus) > 0
    kind, there, each = ("GPU", sum(gpus), 1) if use_gpu else ("CPU", sum(cpus), 1)
    hosts = sum(count == max(cpus) > 0 for count in cpus) if elastic else 1
    workers = workers or (there - beside if use_gpu else min(hosts, rows or hosts)) or 1
    if not use_gpu:  # give each worker as many CPUs as possible; a worker must fit on one node
        each = next((n for n in range(max(cpus), 0, -1) if sum(count // n for count in cpus) >= workers), 1)
    if there < workers and not (can_grow() and (elastic or use_gpu)):
        if use_gpu and not there:
            raise ValueError("no GPU on this machine: omit --use-gpu and --preset gpu")
        raise ValueError(f"{workers} workers are too many for {there} {kind}s: give at most one per {kind}")
    several = elastic and workers > 1
    on_one_node = not several and max((count // each for count in (gpus if use_gpu else cpus)), default=0) >= workers
    return ray.train.ScalingConfig(
        num_workers=(1, workers) if several else workers,
        use_gpu=use_gpu,
        resources_per_worker={kind: each},
        placement_strategy="STRICT_PACK" if on_one_node else "PACK",
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def can_grow() -> bool:
    """Whether other hosts may join this Ray. A Ray that this process has started is only for this machine."""
    node = ray._private.worker._global_node
    return node is None or not node.is_head()


def wait_for_hosts(request: Request, scaling: ray.train.ScalingConfig, stage: str) -> ray.train.ScalingConfig:
    """Request resources for all workers and wait for them. After wait_minutes, some are enough.

    An autoscaler starts hosts only on request. Ray Train keeps requesting during the run and uses new hosts.
    Raises ValueError if there is no room for one worker after wait_minutes.
    """
    asking, said = autoscaling.TrainAutoscalingCoordinatorClient(f"nanochat-ray-{os.getpid()}-{time.time()}"), None
    told = 0.0
    deadline = time.monotonic() + 60 * request.wait_minutes
    try:
        while (there := room(scaling)) < scaling.max_workers and time.monotonic() < deadline:
            asking.maybe_send_resource_request(scaling, scaling.max_workers)
            if there != said or time.monotonic() > told + PROGRESS_SECONDS:
                then = "starts with fewer" if there else "gives up"
                limit = f"{then} after {request.wait_minutes:g} minutes (--wait-minutes)"
                print(f"{stage}: waiting for {wanted(scaling)}: {there} there; {limit}", flush=True)
                said, told = there, time.monotonic()
            time.sleep(1)
            scaling = scaling_config(request.workers, scaling.use_gpu, beside=request.beside)
    finally:  # cancel also after Ctrl-C, or the hosts would stay reserved for minutes
        if said is not None:
            asking.cancel_resource_request()
    if not there:
        raise ValueError(
            f"no room for one of {wanted(scaling)}, after {request.wait_minutes:g} minutes (--wait-minutes)"
        )
    return scaling


def until_started(starting: list, stage: str, kind: str = "GPU") -> None:
    """Wait for the first of these references. They are ready when their tasks or actors have a GPU, or a CPU."""
    began, patience = time.monotonic(), FIRST_LINE_SECONDS
    while not ray.wait(starting, num_returns=1, timeout=patience)[0]:
        free, there = (resources().get(kind, 0) for resources in (ray.available_resources, ray.cluster_resources))
        waited = f"{time.monotonic() - began:.0f} s so far"
        print(f"{stage}: waiting for a {kind}, {free:g} of {there:g} are free, {waited}", flush=True)
        patience = PROGRESS_SECONDS


def room(scaling: ray.train.ScalingConfig) -> int:
    """The number of such workers that fit on the present hosts if nothing else runs there."""
    return sum(rooms(scaling, alive()).values())


def alive() -> dict[str, dict[str, float]]:
    """{node: its resources} of all nodes that are alive."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def rooms(scaling: ray.train.ScalingConfig, nodes: dict[str, dict[str, float]]) -> dict[str, int]:
    """{node: number of such workers that fit}."""
    [(kind, each)] = scaling.resources_per_worker.items()
    return {node: int(resources.get(kind, 0) // each) for node, resources in nodes.items()}


def wanted(scaling: ray.train.ScalingConfig) -> str:
    """The workers as text: "3 workers of 1 CPU"."""
    [(kind, each)] = scaling.resources_per_worker.items()
    return f"{scaling.max_workers} worker{'s' * (scaling.max_workers > 1)} of {each:g} {kind}{'s' * (each > 1)}"


def check_rows(rows: str) -> None:
    """Raises FileNotFoundError that names hosts without the rows, for example because each has its own home."""
    nodes = versions.hosts()
    if storage.is_remote(rows) or len(nodes) < 2:
        return
    task = ray.remote(max_retries=0)(os.path.isdir)
    refs = {task.options(**versions.pinned(node)).remote(rows): host for host, node in nodes.items()}
    lacking = []
    for ref in ray.wait(list(refs), num_returns=len(refs), timeout=versions.ANSWER_SECONDS)[0]:
        try:
            lacking += [] if ray.get(ref) else [refs[ref]]
        except ray.exceptions.RayError:  # skip a lost host, because training does not use it
            continue
    if lacking:
        raise FileNotFoundError(
            f"{rows} is not on {versions.listed(lacking)}: set NANOCHAT_RAY_HOME to a folder that all hosts see, or to "
            "an object store"
        )


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer, with policies for which Ray has no settings.

    failing: the actor that counts failures by place; the monitor if the run is not part of a sweep.
    """

    def __init__(self, *args, monitor, failing, **kwargs):
        super().__init__(*args, **kwargs)
        self.actors = monitor, failing

    def _initialize_and_run_controller(self, **policies):
        if self.scaling_config.elasticity_enabled:
            policies["scaling_policy"] = FreeHosts(self.scaling_config, *self.actors)
        policies["failure_policy"] = Failures(self.run_config.failure_config, *self.actors)
        # Remove callbacks whose actors only take time. Workers read their rows themselves. In the job of a single run,
        # Ray frees the resources of a dead controller at the job's end.
        single = self.actors[0] == self.actors[1]
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if single else DatasetsCallback
        policies["callbacks"] = [each for each in policies["callbacks"] if not isinstance(each, idle)]
        return super()._initialize_and_run_controller(**policies)


class FreeHosts(ElasticScalingPolicy):
    """A scaling policy that starts as many workers as fit beside other programs.

    Ray's policy counts the hosts' resources without those that other training runs reserved. It would repeatedly
    request resources that a service holds. This policy counts free resources after a start has timed out, and before a
    run grows.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, monitor, failing):
        super().__init__(scaling_config)
        self.monitor, self.failing, self.timed_out, self.said = monitor, failing, False, None
        self.own: Counter | None = None  # this run's workers by node; None if free resources are not counted

    def after_controller_state_update(self, previous_state, current_state) -> None:
        if isinstance(current_state, ReschedulingState):
            why = getattr(current_state.training_failed_error, "controller_failure", None)
            self.timed_out = isinstance(why, WorkerGroupStartupTimeoutError)

    def _count_possible_workers(self, reserved_resources) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        bad = left_out(self.scaling_config, self.failing)
        if self.own is None:
            there = rooms(self.scaling_config, alive())
        else:
            there = Counter(free_rooms(self.scaling_config)) + self.own
            bad = {(node, gpu) for node, gpu in bad if gpu is None}  # held GPUs are not free
        return min(possible, sum(good_rooms(there, bad).values()))

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self.own = Counter() if self.timed_out else None
        decision = super().make_decision_for_non_running_worker_group()
        count = decision.num_workers if isinstance(decision, ResizeDecision) else 0
        if self.timed_out and count != self.said:
            then = f"continues with {count}" if count else "waits for them"
            self.monitor.say.remote(f"{wanted(self.scaling_config)}: {count} are free, {then}")
            self.said = count
        if not count:
            time.sleep(1)  # Ray calls this again at once
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state, worker_group_status) -> ScalingDecision:
        self.own = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        self.timed_out, self.said = False, None
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        grows = isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers
        return decision if grows else NoopDecision()


def free_rooms(scaling: ray.train.ScalingConfig) -> dict[str, int]:
    """{node: number of such workers that fit beside other programs}."""
    return rooms(scaling, ray._private.state.available_resources_per_node())


def left_out(scaling: ray.train.ScalingConfig, failing) -> set[Place]:
    """Places to avoid, because workers fail there. Empty if too little would be left."""
    bad = ray.get(failing.bad_places.remote())
    left = good_rooms(rooms(scaling, alive()), bad).values()
    most = max(left, default=0) if scaling.placement_strategy == "STRICT_PACK" else sum(left)
    return bad if most >= scaling.min_workers else set()


class GoodHosts(ControllerCallback):
    """Starts workers on one host if one has room for all, and avoids hosts and GPUs on which they fail.

    It takes the fullest such host, so that an empty one stays free for a larger run. Ray would take the emptiest.
    """

    def __init__(self, monitor, failing):
        self.monitor, self.failing = monitor, failing

    def on_controller_start_worker_group(self, *, scaling_config, num_workers) -> dict[str, str] | None:
        bad, free = left_out(scaling_config, self.failing), free_rooms(scaling_config)
        held = ray.get(self.failing.held_places.remote())
        if taken := hold_gpus(self.failing, bad, held, rooms(scaling_config, alive())):
            self.monitor.say.remote(f"{described(taken)} can't be avoided while others hold it")
        good = good_rooms(free, bad - held)
        if fitting := {node: room for node, room in good.items() if room >= num_workers}:
            small = 2 * num_workers <= max(free.values())  # small and large runs search from opposite ends
            return {ray._raylet.RAY_NODE_ID_KEY: min(sorted(fitting, reverse=not small), key=fitting.__getitem__)}
        failing = ",".join(free.keys() - good.keys())
        return {ray._raylet.RAY_NODE_ID_KEY: f"!in({failing})"} if failing else None


class Failures(DefaultFailurePolicy):
    """Ends a run if a new start would not help, or if workers fail repeatedly without a new step."""

    def __init__(self, failure_config: ray.train.FailureConfig, monitor, failing):
        super().__init__(failure_config)
        self.actors = monitor, failing

    def make_decision(self, training_failed_error) -> FailureDecision:
        decision = super().make_decision(training_failed_error)
        if isinstance(training_failed_error, ray.train.ControllerError):
            # An error while workers start may leave this controller with half a group, so start a new controller.
            only_late = isinstance(training_failed_error.controller_failure, WorkerGroupStartupTimeoutError)
            return decision if only_late else FailureDecision.RAISE
        if failures := getattr(training_failed_error, "worker_failures", None):
            kinds = (
                WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError
            )  # other workers fail because these are gone
            dead = [rank for rank, error in failures.items() if isinstance(error, kinds)]
            if fails_again(*self.actors, dead=dead):
                return FailureDecision.RAISE
        return decision


def fails_again(monitor, failing, dead: list[int], why: str | None = None) -> bool:
    """Count a failure of the dead ranks, or of those that reported an error. Returns True if the run is over."""
    places, run = ray.get(monitor.failed_places.remote(dead))
    return ray.get(monitor.fails_again.remote(ray.get(failing.blame.remote(places, run)), why))


class LostHosts(ControllerCallback):
    """After a failure, waits until Ray knows which hosts are lost, because it would start workers on them.

    The head gives up a host that does not answer after some seconds. Ray Train reads the list of hosts only every 20
    seconds, so this makes it read the list after a failure.
    """

    def __init__(self, monitor):
        self.monitor = monitor

    def __setstate__(self, state: dict) -> None:
        """Runs in the controller's process before it first requests hosts."""
        self.__dict__.update(state)
        autoscaling.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = RESERVATION_SECONDS

    def after_controller_state_update(self, previous_state, current_state) -> None:
        if not isinstance(current_state, RestartingState | ReschedulingState):
            return
        deadline, said = time.monotonic() + LOST_HOST_SECONDS, set()
        while (lost := silent_hosts()) and time.monotonic() < deadline:
            for address in lost - said:
                self.monitor.say.remote(f"host {address} does not answer")
            said |= lost
            time.sleep(0.5)
        ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True))


def silent_hosts() -> set[str]:
    """Addresses of hosts whose Ray does not answer, although it counts as alive."""
    silent = set()
    for node in ray.nodes():
        if node["Alive"]:
            try:
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
            except OSError:
                silent.add(node["NodeManagerAddress"])
    return silent
