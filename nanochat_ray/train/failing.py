"""Finds hosts and GPUs on which workers fail repeatedly, and keeps new workers away from them.

A host is avoided by a label. Ray can't avoid a single GPU of a host, so a placeholder actor holds it.
"""

import time
from collections import Counter
from contextlib import suppress

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray import versions

FAILURES = 2  # after so many, a host or a GPU is avoided
START_SECONDS = 8.0  # to wait for a placeholder to start on a GPU that is free or becomes free
TRY_SECONDS = 60.0  # a run that has searched for a GPU for so long is lost

Place = tuple[str, str | None]  # (node, GPU), or (node, None) for the whole host


class Failing:
    """Counts failures by place. A run has its own counter; all runs of a sweep share one actor.

    A GPU is avoided after two failures, even if steps succeeded between them, because a GPU that fails under load lets
    some steps pass. A host is avoided after two failures in a row of one run that are not both of one GPU, and also if
    avoiding a GPU did not help. `forgive` ends a row.
    """

    def __init__(self):
        self.of_gpus: Counter[Place] = Counter()
        self.of_hosts: Counter[tuple[str, str]] = Counter()  # by (run, node)
        self.bad: set[Place] = set()
        self.held: dict[Place, ActorHandle] = {}
        self.tried: list[ActorHandle] = []
        self.tried_since = 0.0

    def blame(self, places: set[Place], run: str = "") -> set[Place]:
        """Count a failure of a run at each place. Returns the places to avoid from now on."""
        self.of_gpus.update(place for place in places if place[1] is not None)
        hosts = {node for node, _ in places}
        self.of_hosts.update((run, node) for node in hosts)
        new = {place for place in places if self.of_gpus[place] == FAILURES}
        of_gpu = {node for node, _ in new}
        new |= {(node, None) for node in hosts - of_gpu if self.of_hosts[run, node] >= FAILURES} - self.bad
        self.bad |= new
        return new

    def forgive(self) -> None:
        """Reset the failures of hosts after a new step, so that they are no longer in a row."""
        self.of_hosts.clear()

    def bad_places(self) -> set[Place]:
        return self.bad

    def placeholders(self, node: str, count: int) -> list[ActorHandle]:
        """Start actors that each take one GPU of the node. Returns none while another run of the sweep does this."""
        if self.tried and time.monotonic() < self.tried_since + TRY_SECONDS:
            return []
        self.hold({})
        self.tried_since = time.monotonic()
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        self.tried = [Placeholder.options(scheduling_strategy=here).remote() for _ in range(count)]
        return self.tried

    def hold(self, places: dict[Place, ActorHandle]) -> None:
        """Keep these placeholders and kill the others that were started with them."""
        self.held |= places
        for actor in self.tried:
            if actor not in places.values():
                ray.kill(actor)
        self.tried = []

    def release(self, places: set[Place]) -> None:
        """Release held GPUs, because no other GPUs are left."""
        for place in places & self.held.keys():
            ray.kill(self.held.pop(place))

    def held_places(self) -> set[Place]:
        return set(self.held)


def shared() -> ActorHandle:
    """An actor of Failing for all runs of a sweep. It ends with this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Failing).remote()


@ray.remote(num_cpus=0, num_gpus=1)
class Placeholder:
    def gpu(self) -> str | None:
        return own_gpu()


def own_gpu() -> str | None:
    """Ray's id of this process's GPU; None without one."""
    return next(iter(ray.get_runtime_context().get_accelerator_ids().get("GPU", [])), None)


def good_rooms(rooms: dict[str, int], bad: set[Place]) -> dict[str, int]:
    """{node: workers that fit without bad places}."""
    gpus = Counter(node for node, gpu in bad if gpu is not None)
    return {node: max(0, room - gpus[node]) for node, room in rooms.items() if (node, None) not in bad}


def hold_gpus(failing, bad: set[Place], held: set[Place], sizes: dict[str, int]) -> set[Place]:
    """Make placeholders hold exactly the bad GPUs, so that no worker gets them. Returns those that others hold.

    sizes: {node: number of GPUs}. Placeholders first take all free GPUs of a host, then only those on bad GPUs stay.
    """
    bad = {(node, gpu) for node, gpu in bad if gpu is not None and node in sizes}
    if held - bad:
        ray.get(failing.release.remote(held - bad))
    lacking = bad - held
    for node in {node for node, _ in lacking}:
        wanted, found = {place for place in lacking if place[0] == node}, {}
        actors = ray.get(failing.placeholders.remote(node, sizes[node]))
        asked = {actor.gpu.remote(): actor for actor in actors}
        while wanted - found.keys() and asked and (started := ray.wait(list(asked), timeout=START_SECONDS)[0]):
            for ref in started:
                actor = asked.pop(ref)
                with suppress(ray.exceptions.RayError):  # the node may be lost
                    if (place := (node, ray.get(ref))) in wanted:
                        found[place] = actor
        ray.get(failing.hold.remote(found))
        lacking -= found.keys()
    return lacking


def described(places: set[Place]) -> str:
    """The places as text: "host a, GPU 3 of host b"."""
    names = {node["NodeID"]: f"host {host}" for host, node in versions.hosts().items()}
    parts = [(names.get(node, "a lost host"), gpu) for node, gpu in places]
    return versions.listed([host if gpu is None else f"GPU {gpu} of {host}" for host, gpu in parts])
