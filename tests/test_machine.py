"""Limits of the machine: affinity, and control groups of both versions."""

import os

import pytest

from nanochat_ray import machine

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write the settings of groups, and /proc/self/cgroup."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)

    def write(own: str, settings: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, value in settings.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(value + "\n")

    return write


def test_without_groups_it_is_the_affinity_and_the_machines_memory(groups, monkeypatch):
    assert (machine.available_cpus(), machine.available_memory()) == (64, MACHINE)
    groups("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"})
    assert (machine.available_cpus(), machine.available_memory()) == (64, MACHINE)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3, 5})
    assert machine.available_cpus() == 2


@pytest.mark.parametrize(("quota", "cpus"), [("200000", 2), ("250000", 2), ("50000", 1), ("12800000", 64)])
def test_of_version_2_the_least_limit_of_a_group_and_of_those_above_holds(groups, quota, cpus):
    above = {"a/cpu.max": f"{quota} 100000", "a/memory.max": "3000000"}
    groups("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/b/memory.max": "5000000"} | above)
    assert (machine.available_cpus(), machine.available_memory()) == (cpus, 3_000_000)


def test_a_container_sees_its_own_group_at_the_root(groups):
    groups("0::/docker/0123\n", {"cpu.max": "300000 100000", "memory.max": "4000000"})
    assert (machine.available_cpus(), machine.available_memory()) == (3, 4_000_000)


def test_of_version_1_each_controller_has_a_tree(groups):
    of_cpu = {"cpu,cpuacct/x/cpu.cfs_quota_us": "150000", "cpu,cpuacct/x/cpu.cfs_period_us": "50000"}
    of_root = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    of_memory = {"memory/x/memory.limit_in_bytes": "2000000", "memory/memory.limit_in_bytes": "9223372036854771712"}
    groups("4:cpu,cpuacct:/x\n3:memory:/x\n1:name=systemd:/y\n", of_cpu | of_root | of_memory)
    assert (machine.available_cpus(), machine.available_memory()) == (3, 2_000_000)
