"""Checks that all hosts of a cluster run the same versions of Python, Ray, torch and this code."""

import hashlib
import importlib.util
import platform
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ("nanochat_ray", "serving", "experiments")
ANSWER_SECONDS = 60.0  # timeout for a host's answer
THIS_PROCESS = "this process"
REMEDY = "install the same versions on every host, or send the code with `ray job submit --working-dir .`"

# Send this module's functions as code: a host may have another version of the module, or none.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def installed() -> dict[str, str]:
    """Versions on this host. nanochat_ray's version is a hash of its code, because a checkout has no version."""
    versions = {"Python": platform.python_version()}
    for name in ("ray", "torch"):
        try:
            # Ignore the build, such as +cpu: a head without GPUs may have torch's build for CPUs.
            versions[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            versions[name] = "missing"
    digest, missing = hashlib.sha256(), True
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or []:
            for file in sorted(Path(folder).rglob("*.*")):
                if file.suffix in (".py", ".cpp"):
                    digest.update(f"{package}/{file.relative_to(folder)}\0".encode() + file.read_bytes())
                    missing = False
    return versions | {"nanochat_ray": "missing" if missing else digest.hexdigest()[:8]}


def hosts() -> dict[str, dict]:
    """{hostname: Ray's node}. If several nodes share a hostname, the address is added."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes.sort(key=lambda node: (node["NodeManagerHostname"], node["NodeManagerAddress"]))
    names = [node["NodeManagerHostname"] for node in nodes]
    unique = len(set(names)) == len(names)
    return {n if unique else f"{n} ({node['NodeManagerAddress']})": node for n, node in zip(names, nodes, strict=True)}


def pinned(node: dict) -> dict:
    """Options for a task or actor that runs on this node and needs no CPU."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def differences(versions: dict[str, dict[str, str]]) -> list[str]:
    """One line per difference: "torch: 2.13.0 on a, b; 2.12.1 on c", the most common version first."""
    lines = []
    for what in ("Python", "ray", "torch", "nanochat_ray"):
        found = defaultdict(list)
        for host, of_host in versions.items():
            found[of_host[what]].append(host)
        if len(found) > 1:
            groups = sorted(found.items(), key=lambda group: -len(group[1]))
            lines.append(f"{what}: " + "; ".join(f"{value} on {listed(names)}" for value, names in groups))
    return lines


def listed(names: list[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check() -> None:
    """Raises ValueError that names the hosts if they or this process run different versions. Runs one task per host.

    A host that does not answer is ignored, because Ray will not run other tasks there either.
    """
    nodes = hosts()
    if len(nodes) < 2:
        return
    task = ray.remote(max_retries=0)(installed)
    refs = {task.options(**pinned(node)).remote(): host for host, node in nodes.items()}
    found = {THIS_PROCESS: installed()}
    for ref in ray.wait(list(refs), num_returns=len(refs), timeout=ANSWER_SECONDS)[0]:
        try:
            found[refs[ref]] = ray.get(ref)
        except ray.exceptions.RayError:
            continue
    if differing := differences(found):
        raise ValueError(f"the hosts run different versions; {'; '.join(differing)}: {REMEDY}")
