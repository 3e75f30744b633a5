"""Hosts and GPUs on which workers fail again and again: which they are, and how new workers do without them.

A host is left out by a label. Ray gives workers any GPU of a host, so a certain one is held by a placeholder instead.
"""

import time
from collections import Counter
from contextlib import suppress

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray import versions

FAILURES = 2  # after which a host or a GPU is left out
NEWS_SECONDS = 8.0  # in which a placeholder starts if a GPU is free, or becomes so as workers end
TRY_SECONDS = 60.0  # after which whoever began to look for a GPU has been lost itself

Place = tuple[str, str | None]  # a node, and one of its GPUs or None: the host as a whole


class Failing:
    """Counts failures by place. A run has its own, and all runs of a sweep have one actor of it.

    A GPU is left out after two failures, whatever was between: what breaks under load lets steps pass. A host is after
    two of a run that are not both of one GPU, until forgive is called; and when a GPU less did not help.
    """

    def __init__(self):
        self.of_gpus: Counter[Place] = Counter()
        self.of_hosts: Counter[tuple[str, str]] = Counter()  # by run and node
        self.bad: set[Place] = set()
        self.held: dict[Place, ActorHandle] = {}
        self.tried: list[ActorHandle] = []
        self.tried_since = 0.0

    def blame(self, places: set[Place], run: str = "") -> set[Place]:
        """Count a failure of a run at each place. Returns what is to be left out from now on."""
        self.of_gpus.update(place for place in places if place[1] is not None)
        hosts = {node for node, _ in places}
        self.of_hosts.update((run, node) for node in hosts)
        new = {place for place in places if self.of_gpus[place] == FAILURES}
        of_gpu = {node for node, _ in new}
        new |= {(node, None) for node in hosts - of_gpu if self.of_hosts[run, node] >= FAILURES} - self.bad
        self.bad |= new
        return new

    def forgive(self) -> None:
        """There was a new step: failures of hosts are no longer in a row."""
        self.of_hosts.clear()

    def bad_places(self) -> set[Place]:
        return self.bad

    def placeholders(self, node: str, count: int) -> list[ActorHandle]:
        """Actors that take a GPU of the node each; none while another run of the sweep has some."""
        if self.tried and time.monotonic() < self.tried_since + TRY_SECONDS:
            return []
        self.hold({})
        self.tried_since = time.monotonic()
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        self.tried = [Placeholder.options(scheduling_strategy=here).remote() for _ in range(count)]
        return self.tried

    def hold(self, places: dict[Place, ActorHandle]) -> None:
        """Keep these placeholders and end the others of that try."""
        self.held |= places
        for actor in self.tried:
            if actor not in places.values():
                ray.kill(actor)
        self.tried = []

    def release(self, places: set[Place]) -> None:
        """Give GPUs back, as there are no others any more."""
        for place in places & self.held.keys():
            ray.kill(self.held.pop(place))

    def held_places(self) -> set[Place]:
        return set(self.held)


def shared() -> ActorHandle:
    """An actor of Failing, for all runs of a sweep, that ends with this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Failing).remote()


@ray.remote(num_cpus=0, num_gpus=1)
class Placeholder:
    def gpu(self) -> str:
        return own_gpu()


def own_gpu() -> str | None:
    """Ray's name of the GPU that this process was given."""
    return next(iter(ray.get_runtime_context().get_accelerator_ids().get("GPU", [])), None)


def good_rooms(rooms: dict[str, int], bad: set[Place]) -> dict[str, int]:
    """By node, for how many workers there is room without what is bad."""
    gpus = Counter(node for node, gpu in bad if gpu is not None)
    return {node: max(0, room - gpus[node]) for node, room in rooms.items() if (node, None) not in bad}


def hold_gpus(failing, bad: set[Place], held: set[Place], sizes: dict[str, int]) -> set[Place]:
    """Have these GPUs held and no others, so that no worker gets them. Returns those that others hold.

    sizes: by node, how many GPUs it has. Placeholders take all free ones of the host, and only the right ones stay.
    """
    bad = {(node, gpu) for node, gpu in bad if gpu is not None and node in sizes}
    if held - bad:
        ray.get(failing.release.remote(held - bad))
    lacking = bad - held
    for node in {node for node, _ in lacking}:
        wanted, found = {place for place in lacking if place[0] == node}, {}
        actors = ray.get(failing.placeholders.remote(node, sizes[node]))
        asked = {actor.gpu.remote(): actor for actor in actors}
        while wanted - found.keys() and asked and (started := ray.wait(list(asked), timeout=NEWS_SECONDS)[0]):
            for ref in started:
                actor = asked.pop(ref)
                with suppress(ray.exceptions.RayError):  # its node may be lost
                    if (place := (node, ray.get(ref))) in wanted:
                        found[place] = actor
        ray.get(failing.hold.remote(found))
        lacking -= found.keys()
    return lacking


def described(places: set[Place]) -> str:
    """host a, GPU 3 of host b"""
    names = {node["NodeID"]: f"host {host}" for host, node in versions.hosts().items()}
    parts = [(names.get(node, "a lost host"), gpu) for node, gpu in places]
    return versions.listed([host if gpu is None else f"GPU {gpu} of {host}" for host, gpu in parts])
