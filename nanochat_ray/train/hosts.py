"""The hosts of a run: what it asks of the cluster, waiting for them, which it takes, and which are lost."""

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

RESIZE_SECONDS = 30.0  # between looks at whether a returned node lets a run have more workers again
FIRST_LINE_SECONDS = 5.0  # after which what waits says so
LOST_HOST_SECONDS = 80.0  # in which Ray finds, with its own settings, that a host is lost
# Ray Train asks again for the hosts of a run every 20 seconds. Those of a run that was killed are free after so long.
RESERVATION_SECONDS = 30


@dataclass(frozen=True)
class Request:
    """What a run asks of the cluster: at most so many workers. By default there is one on every GPU, and without GPUs
    one on every host that has as many CPUs as the largest.

    use_gpu: None takes GPUs where there are any. wait_minutes: how long a cluster has to bring what it lacks. beside:
    GPUs that the run needs for other actors of its own; the default leaves them free.
    """

    workers: int | None = None
    use_gpu: bool | None = None
    wait_minutes: float = 10
    beside: int = 0


def scaling_config(
    workers: int | None,
    use_gpu: bool | None = None,
    elastic: bool = True,
    rows: int | None = None,
    beside: int = 0,
) -> ray.train.ScalingConfig:
    """Workers and what each gets, as a Request says. The default on CPUs is no more than the rows of a step.

    Several can be elastic: a run goes on with those that a lost node leaves, one at least, and grows when there is room
    for more. Others are on one node if they fit the largest, and wait until it has room.
    Raises ValueError when there are too few GPUs or CPUs and no more can come, or too few CPUs for one of several runs,
    which does not wait for more.
    """
    cpus, gpus = ([int(node.get(kind, 0)) for node in alive().values()] for kind in ("CPU", "GPU"))
    if use_gpu is None:
        use_gpu = sum(gpus) > 0
    kind, there, each = ("GPU", sum(gpus), 1) if use_gpu else ("CPU", sum(cpus), 1)
    hosts = sum(count == max(cpus) > 0 for count in cpus) if elastic else 1
    workers = workers or (there - beside if use_gpu else min(hosts, rows or hosts)) or 1
    if not use_gpu:  # each gets as many CPUs as leave room for all workers; a worker must fit on one node
        each = next((n for n in range(max(cpus), 0, -1) if sum(count // n for count in cpus) >= workers), 1)
    if there < workers and not (can_grow() and (elastic or use_gpu)):
        if use_gpu and not there:
            raise ValueError("no GPU on this machine: leave out --use-gpu and --preset gpu")
        raise ValueError(f"{workers} workers on {there} {kind}s: give at most one a {kind}")
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
    """Whether other hosts may join this Ray: one that this process has started is for this machine alone."""
    node = ray._private.worker._global_node
    return node is None or not node.is_head()


def wait_for_hosts(request: Request, scaling: ray.train.ScalingConfig, stage: str) -> ray.train.ScalingConfig:
    """Ask the cluster for all workers, and wait until there is room for them, or for some when wait_minutes are over.

    An autoscaler brings hosts only when it is asked. Ray Train asks on while the run lasts, and takes what comes.
    Raises ValueError when there is no room for one worker by then.
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
    finally:  # also after Ctrl-C, or the hosts stay reserved for minutes
        if said is not None:
            asking.cancel_resource_request()
    if not there:
        raise ValueError(
            f"no room for one of {wanted(scaling)}, after {request.wait_minutes:g} minutes (--wait-minutes)"
        )
    return scaling


def until_started(starting: list, stage: str, kind: str = "GPU") -> None:
    """Wait for the first of these references, which tasks or actors give when they have a GPU, or a CPU."""
    began, patience = time.monotonic(), FIRST_LINE_SECONDS
    while not ray.wait(starting, num_returns=1, timeout=patience)[0]:
        free, there = (resources().get(kind, 0) for resources in (ray.available_resources, ray.cluster_resources))
        waited = f"{time.monotonic() - began:.0f} s so far"
        print(f"{stage}: waiting for a {kind}, {free:g} of {there:g} are free, {waited}", flush=True)
        patience = PROGRESS_SECONDS


def room(scaling: ray.train.ScalingConfig) -> int:
    """How many such workers the hosts that are there can take, if nothing else runs on them."""
    return sum(rooms(scaling, alive()).values())


def alive() -> dict[str, dict[str, float]]:
    """By node, what it has."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def rooms(scaling: ray.train.ScalingConfig, nodes: dict[str, dict[str, float]]) -> dict[str, int]:
    """By node, how many such workers its resources are for."""
    [(kind, each)] = scaling.resources_per_worker.items()
    return {node: int(resources.get(kind, 0) // each) for node, resources in nodes.items()}


def wanted(scaling: ray.train.ScalingConfig) -> str:
    """3 workers of 1 CPU"""
    [(kind, each)] = scaling.resources_per_worker.items()
    return f"{scaling.max_workers} worker{'s' * (scaling.max_workers > 1)} of {each:g} {kind}{'s' * (each > 1)}"


def check_rows(rows: str) -> None:
    """Raises FileNotFoundError that names hosts without the rows, as when each has a home of its own."""
    nodes = versions.hosts()
    if storage.is_remote(rows) or len(nodes) < 2:
        return
    task = ray.remote(max_retries=0)(os.path.isdir)
    refs = {task.options(**versions.pinned(node)).remote(rows): host for host, node in nodes.items()}
    lacking = []
    for ref in ray.wait(list(refs), num_returns=len(refs), timeout=versions.ANSWER_SECONDS)[0]:
        try:
            lacking += [] if ray.get(ref) else [refs[ref]]
        except ray.exceptions.RayError:  # a host that is lost is not trained on
            continue
    if lacking:
        raise FileNotFoundError(
            f"{rows} is not on {versions.listed(lacking)}: set NANOCHAT_RAY_HOME to a folder that all hosts see, or to "
            "an object store"
        )


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's, with policies that Ray has no settings for.

    failing: the actor that counts failures by place. The monitor does for a run by itself.
    """

    def __init__(self, *args, monitor, failing, **kwargs):
        super().__init__(*args, **kwargs)
        self.actors = monitor, failing

    def _initialize_and_run_controller(self, **policies):
        if self.scaling_config.elasticity_enabled:
            policies["scaling_policy"] = FreeHosts(self.scaling_config, *self.actors)
        policies["failure_policy"] = Failures(self.run_config.failure_config, *self.actors)
        # Actors that only take time: workers read their rows themselves, and what a controller that died holds is freed
        # at the end of the job, which is that of a single run.
        single = self.actors[0] == self.actors[1]
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if single else DatasetsCallback
        policies["callbacks"] = [each for each in policies["callbacks"] if not isinstance(each, idle)]
        return super()._initialize_and_run_controller(**policies)


class FreeHosts(ElasticScalingPolicy):
    """As many workers as there is room for beside what else runs.

    Ray's own policy counts what hosts have, less what other training runs reserved. What a service holds of that it
    would ask for again and again. This one counts what is free once a start has timed out, and before a run grows.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, monitor, failing):
        super().__init__(scaling_config)
        self.monitor, self.failing, self.timed_out, self.said = monitor, failing, False, None
        self.own: Counter | None = None  # workers by node, when what is free is counted

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
            bad = {(node, gpu) for node, gpu in bad if gpu is None}  # GPUs that are held are not free
        return min(possible, sum(good_rooms(there, bad).values()))

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self.own = Counter() if self.timed_out else None
        decision = super().make_decision_for_non_running_worker_group()
        count = decision.num_workers if isinstance(decision, ResizeDecision) else 0
        if self.timed_out and count != self.said:
            then = f"goes on with {count}" if count else "waits for them"
            self.monitor.say.remote(f"{wanted(self.scaling_config)}: {count} are free, {then}")
            self.said = count
        if not count:
            time.sleep(1)  # Ray asks again at once
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state, worker_group_status) -> ScalingDecision:
        self.own = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        self.timed_out, self.said = False, None
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        grows = isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers
        return decision if grows else NoopDecision()


def free_rooms(scaling: ray.train.ScalingConfig) -> dict[str, int]:
    """By node, how many such workers find room beside what runs there."""
    return rooms(scaling, ray._private.state.available_resources_per_node())


def left_out(scaling: ray.train.ScalingConfig, failing) -> set[Place]:
    """Where workers fail, and are not started any more: nowhere, if too little is left for them then."""
    bad = ray.get(failing.bad_places.remote())
    left = good_rooms(rooms(scaling, alive()), bad).values()
    most = max(left, default=0) if scaling.placement_strategy == "STRICT_PACK" else sum(left)
    return bad if most >= scaling.min_workers else set()


class GoodHosts(ControllerCallback):
    """Starts workers on one host if one has room for all: on the fullest, so that a larger run finds another whole.

    Ray takes the emptiest. And leaves out the hosts and GPUs on which they fail.
    """

    def __init__(self, monitor, failing):
        self.monitor, self.failing = monitor, failing

    def on_controller_start_worker_group(self, *, scaling_config, num_workers) -> dict[str, str] | None:
        bad, free = left_out(scaling_config, self.failing), free_rooms(scaling_config)
        held = ray.get(self.failing.held_places.remote())
        if taken := hold_gpus(self.failing, bad, held, rooms(scaling_config, alive())):
            self.monitor.say.remote(f"{described(taken)} can't be left out while others hold it")
        good = good_rooms(free, bad - held)
        if fitting := {node: room for node, room in good.items() if room >= num_workers}:
            small = 2 * num_workers <= max(free.values())  # small and large runs that start at once look at either end
            return {ray._raylet.RAY_NODE_ID_KEY: min(sorted(fitting, reverse=not small), key=fitting.get)}
        failing = ",".join(free.keys() - good.keys())
        return {ray._raylet.RAY_NODE_ID_KEY: f"!in({failing})"} if failing else None


class Failures(DefaultFailurePolicy):
    """Ends a run that a new start would not help, or whose workers fail again and again without a new step between,
    as the monitor counts."""

    def __init__(self, failure_config: ray.train.FailureConfig, monitor, failing):
        super().__init__(failure_config)
        self.actors = monitor, failing

    def make_decision(self, training_failed_error) -> FailureDecision:
        decision = super().make_decision(training_failed_error)
        if isinstance(training_failed_error, ray.train.ControllerError):
            # What fails while workers start may leave this controller with half a group: the run gets a new one.
            only_late = isinstance(training_failed_error.controller_failure, WorkerGroupStartupTimeoutError)
            return decision if only_late else FailureDecision.RAISE
        if failures := getattr(training_failed_error, "worker_failures", None):
            kinds = WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError  # others fail for want of these
            dead = [rank for rank, error in failures.items() if isinstance(error, kinds)]
            if fails_again(*self.actors, dead):
                return FailureDecision.RAISE
        return decision


def fails_again(monitor, failing, dead: list[int], why: str | None = None) -> bool:
    """Count a failure, of these ranks or of those that said so. True: the run is over."""
    places, run = ray.get(monitor.failed_places.remote(dead))
    return ray.get(monitor.fails_again.remote(ray.get(failing.blame.remote(places, run)), why))


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
