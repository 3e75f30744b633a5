"""The doctor on hosts that have something wrong with them, and commands that refuse hosts of different versions."""

import shutil
import subprocess

import pytest
from hosts import BIN, REPOSITORY, Cluster, run


def doctor(cluster: Cluster, home: str | None = None) -> tuple[int, list[str]]:
    """Its exit status and its lines."""
    env = cluster.env | ({"NANOCHAT_RAY_HOME": home} if home else {})
    process = cluster.head.popen(
        str(BIN / "python"), "-m", "nanochat_ray.cli", "doctor", env=env, stdout=subprocess.PIPE, text=True
    )
    said, _ = process.communicate(timeout=120)
    print(said)
    return process.returncode, said.splitlines()


def of(lines: list[str], check: str) -> list[str]:
    return [line for line in lines if line[9:].startswith(check)]


def test_hosts_that_are_well(cluster):
    status, lines = doctor(cluster)
    assert status == 0
    assert all(line.startswith(("ok ", "warning ")) for line in lines)
    for check in ("versions", "GPUs", "memory", "/dev/shm", "disk", "clock", "home", "token", "ports", "network"):
        assert of(lines, check), check
    assert "written and read by every host" in of(lines, "home")[0]
    assert "127.0.1.1" in of(lines, "hostname")[0] and "all 3 hosts" in of(lines, "hostname")[0]
    assert not any((cluster.shared / "home").rglob("doctor/*"))


def test_a_home_that_is_not_shared(cluster):
    status, lines = doctor(cluster, home="/tmp/home")
    (line,) = of(lines, "home")
    assert status == 1 and line.startswith("FAIL")
    for host in ("nrhost1", "nrhost2", "nrhost3"):
        assert f"{host} can read files of {host}" in line
    assert "NANOCHAT_RAY_HOME" in line


def test_a_slow_link_and_a_closed_port(cluster):
    slow = cluster.hosts[1]
    limit = ["tc", "-n", slow.namespace, "qdisc", "add", "dev", "eth0", "root", "tbf"]
    run(*limit, "rate", "50mbit", "burst", "64k", "latency", "50ms")
    try:
        _, lines = doctor(cluster)
    finally:
        run("tc", "-n", slow.namespace, "qdisc", "del", "dev", "eth0", "root")
    (line,) = [line for line in of(lines, "network") if line.startswith("warning") and "nrhost2 -> nrhost3" in line]
    assert 10 < float(line.split("nrhost3: ")[1].split()[0]) < 60
    third = cluster.hosts[2]
    third.run("ip", "route", "add", "blackhole", slow.address)
    try:
        status, lines = doctor(cluster)
    finally:
        third.run("ip", "route", "del", "blackhole", slow.address)
    assert status == 1
    assert {line.split(" on ")[1].split(";")[0] for line in of(lines, "ports")} == {"nrhost2", "nrhost3"}


@pytest.fixture
def another_version(cluster, tmp_path_factory):
    """The third host has a package whose code differs."""
    other = cluster.shared / "other"
    shutil.copytree(REPOSITORY / "nanochat_ray", other / "nanochat_ray")
    with open(other / "nanochat_ray" / "storage.py", "a") as f:
        f.write("# another version\n")
    host, before = cluster.hosts[2], dict(cluster.env)
    host.run("ray", "stop")
    cluster.env = before | {"PYTHONPATH": str(other)}
    cluster.join(host)
    cluster.env = before
    yield
    host.run("ray", "stop")
    cluster.join(host)


def test_another_version_is_named(cluster, another_version):
    status, lines = doctor(cluster)
    (line,) = [line for line in of(lines, "versions") if "nrhost3" in line]
    assert status == 1 and line.startswith("FAIL") and "nrhost1, nrhost2, this process; " in line
    source = cluster.shared / "text.jsonl"
    source.write_text('{"text": "some text"}\n' * 40)
    with pytest.raises(RuntimeError) as refused:
        cluster.head.run("python", "-m", "nanochat_ray.cli", "prepare", f"--source={source}", env=cluster.env)
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith("error: ")]
    assert "nanochat_ray" in line and "on nrhost3" in line and "Traceback" not in str(refused.value)
    said = cluster.head.run(
        "ray", "job", "submit", "--address", f"http://{cluster.head.address}:8265", "--working-dir", str(REPOSITORY),
        "--", "python", "-m", "nanochat_ray.cli", "doctor", env=cluster.env,
    )  # fmt: skip
    assert "FAIL     versions" not in said and "ok       versions" in said  # the job brings its code to all hosts
