"""CPUs and memory that this process may use, by its affinity and its control groups.

Containers, systemd and Slurm set limits by control groups, which os.cpu_count() ignores.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # one group per line: "0::/path" (version 2), "4:cpu,cpuacct:/path" (version 1)


def available_cpus() -> int:
    """CPUs that this process may use, at least 1: the least of its affinity and its groups' quotas, rounded down."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [
        *(_ratio(*text.split()) for text in _settings("cpu", "cpu.max")),
        *map(_ratio, _settings("cpu", "cpu.cfs_quota_us"), _settings("cpu", "cpu.cfs_period_us")),
    ]
    return max(1, min([count, *(int(quota) for quota in quotas if quota is not None)]))


def available_memory() -> int:
    """Bytes of memory that this process's groups may use: the machine's memory, or the least limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_settings("memory", "memory.max"), *_settings("memory", "memory.limit_in_bytes")]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def _ratio(quota: str, period: str) -> float | None:
    """CPUs of a quota. None for "max" and −1, which mean no limit."""
    return float(quota) / float(period) if quota.isdigit() else None


def _settings(controller: str, name: str) -> Iterator[str]:
    """The values of a setting in this process's groups and in all groups above them. All of these limits apply."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            # In a container, its own group is at the root, although the path may be the host's. Read all levels.
            root = CGROUPS / controllers
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    with suppress(OSError):
                        yield (folder / name).read_text().strip()
