"""What this process may use of its machine: by affinity, and by the limits of its control groups.

Containers, systemd and Slurm limit by control groups, of which os.cpu_count() and the machine's memory know nothing.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # a line each: "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1


def available_cpus() -> int:
    """CPUs that this process may use, at least 1: those of its affinity, and whole ones of its groups' quotas."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [
        *(_ratio(*text.split()) for text in _settings("cpu", "cpu.max")),
        *map(_ratio, _settings("cpu", "cpu.cfs_quota_us"), _settings("cpu", "cpu.cfs_period_us")),
    ]
    return max(1, min([count, *(int(quota) for quota in quotas if quota is not None)]))


def available_memory() -> int:
    """Bytes of memory that this process and its neighbours may use: the machine's, or the least limit of its groups."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_settings("memory", "memory.max"), *_settings("memory", "memory.limit_in_bytes")]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def _ratio(quota: str, period: str) -> float | None:
    """CPUs of a quota; None when there is none, which is written "max" or −1."""
    return float(quota) / float(period) if quota.isdigit() else None


def _settings(controller: str, name: str) -> Iterator[str]:
    """The content of a setting in each group that this process is in, and in those above it: all of them hold."""
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            # A container sees its own group at the root, though the path may be that of the host.
            root = CGROUPS / controllers
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    with suppress(OSError):
                        yield (folder / name).read_text().strip()
