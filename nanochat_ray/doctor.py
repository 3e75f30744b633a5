"""`nanochat-ray doctor`: checks the hosts of a cluster before training starts."""

import os
import resource
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import ray

from nanochat_ray import storage
from nanochat_ray.versions import ANSWER_SECONDS, REMEDY, THIS_PROCESS, differences, hosts, installed, listed, pinned

CONNECT_SECONDS = 3.0
SEND_SECONDS, SEND_BYTES = 2.0, 64 * 2**20  # a transfer ends at the first of these
BLOCK = bytes(2**18)
SLOW_NETWORK = 1e9  # bits/s; a link below this, or below half of the median, gets a warning
MIN_OPEN_FILES = 8192
FULL_DISK = 0.95  # used share above which Ray stores no more objects
GIB = 2**30
NO_GPUS = {"names": [], "usable": 0, "peers": True, "error": ""}
GPU_PROGRAM = """
import torch
n = torch.cuda.device_count()
peers = sum(torch.cuda.can_device_access_peer(i, j) for i in range(n) for j in range(n) if i != j)
sums = [torch.ones(8, device=f"cuda:{i}").sum().item() for i in range(n)]
print(torch.cuda.is_available(), sums.count(8.0), peers == n * (n - 1))
"""
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for the reason in versions.py


@dataclass
class DoctorOptions:
    address: str | None = None
    """The cluster's head, HOST:6379, or auto for a cluster on this machine. Default: RAY_ADDRESS, else a local Ray."""


@dataclass(frozen=True)
class Finding:
    level: str  # "ok", "warning" or "FAIL"
    check: str
    text: str  # has one {} per value
    remedy: str = ""
    values: tuple[float, ...] = ()  # findings that differ only in these share a line


class Probe:
    """An actor on one host. Its server echoes bytes, or receives a stream and answers (bytes, seconds)."""

    def __init__(self, address: str, home: str):
        self.address, self.home = address, home

    def facts(self) -> dict:
        try:
            own_address = socket.gethostbyname(socket.gethostname())
        except OSError as error:
            own_address = str(error)
        session = ray._private.worker.global_worker.node.get_session_dir_path()
        return {
            "versions": installed(),
            "gpus": gpus(),
            "shm": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
            "disks": {folder: shutil.disk_usage(folder)[::2] for folder in {session, tempfile.gettempdir()}},
            "memory": ray._common.utils.get_system_memory(),
            "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "own address": own_address,
        }

    def clock(self) -> float:
        return time.time()

    def write_file(self, name: str) -> str:
        """Write a file in the home. Returns the error as one line, or ""."""
        try:
            storage.write_bytes(storage.join(self.home, "doctor", name), name.encode())
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def read_files(self, names: list[str]) -> set[str]:
        """The names of files that exist and have the right content."""

        def read(name: str) -> bool:
            with suppress(Exception):
                return storage.read_bytes(storage.join(self.home, "doctor", name)) == name.encode()
            return False

        with ThreadPoolExecutor(8) as pool:
            return {name for name, there in zip(names, pool.map(read, names), strict=True) if there}

    def remove_files(self) -> None:
        with suppress(Exception):
            storage.remove(storage.join(self.home, "doctor"))

    def listen(self) -> int:
        """Start the server. Returns its port, which the system chooses, as it does for Ray's workers, gloo and NCCL."""
        server = socket.create_server((self.address, 0), backlog=1024)
        threading.Thread(target=self._accept, args=[server], daemon=True).start()
        return server.getsockname()[1]

    def _accept(self, server: socket.socket) -> None:
        while True:
            threading.Thread(target=self._serve, args=[server.accept()[0]], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(ANSWER_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind = connection.recv(1)
            if kind == b"e":
                while byte := connection.recv(1):
                    connection.sendall(byte)
            elif kind == b"t":
                buffer, received, start = bytearray(len(BLOCK)), 0, time.perf_counter()
                while n := connection.recv_into(buffer):
                    received += n
                connection.sendall(struct.pack("!Qd", received, time.perf_counter() - start))

    def unreachable(self, places: list[tuple[str, int]]) -> list[tuple[str, int]]:
        def reach(place: tuple[str, int]) -> bool:
            with suppress(OSError), socket.create_connection(place, CONNECT_SECONDS) as s:
                s.sendall(b"ee")
                return s.recv(1) == b"e"
            return False

        with ThreadPoolExecutor(64) as pool:
            return [place for place, reached in zip(places, pool.map(reach, places), strict=True) if not reached]

    def measure(self, place: tuple[str, int]) -> tuple[float, float]:
        """(bits/s of one TCP stream to the place, seconds of a round trip)."""
        with socket.create_connection(place, CONNECT_SECONDS) as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            s.sendall(b"e")
            trips = []
            for _ in range(20):
                start = time.perf_counter()
                s.sendall(b".")
                s.recv(1)
                trips.append(time.perf_counter() - start)
        with socket.create_connection(place, CONNECT_SECONDS) as s:
            s.settimeout(ANSWER_SECONDS)
            s.sendall(b"t")
            deadline = time.monotonic() + SEND_SECONDS
            for _ in range(0, SEND_BYTES, len(BLOCK)):
                s.sendall(BLOCK)
                if time.monotonic() > deadline:
                    break
            s.shutdown(socket.SHUT_WR)
            received, seconds = struct.unpack("!Qd", s.recv(16, socket.MSG_WAITALL))
        return 8 * received / seconds, min(trips)


def gpus() -> dict:
    """This host's GPUs according to the driver, and how many torch can use, in a process that sees all of them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return NO_GPUS | {"error": "" if isinstance(error, FileNotFoundError) else str(error)}
    if told.returncode:
        return NO_GPUS | {"error": (told.stdout + told.stderr).strip().partition("\n")[0]}
    lines = [[part.strip() for part in line.split(",")] for line in told.stdout.strip().splitlines()]
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # Ray hides GPUs
    try:
        ran = subprocess.run([sys.executable, "-c", GPU_PROGRAM], capture_output=True, text=True, timeout=90, env=env)
        words, error = ran.stdout.split(), (ran.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        words, error = [], "torch did not answer within 90 s"
    usable = int(words[1]) if words and words[0] == "True" else 0
    return {
        "names": [f"{name}, {memory} MiB, driver {driver}" for name, memory, driver in lines],
        "usable": usable,
        "peers": len(lines) < 2 or words[2:] == ["True"],
        "error": error if usable < len(lines) else "",
    }


def run(options: DoctorOptions) -> bool:
    """Print a line per finding. Returns True if no check fails."""
    found: dict[Finding, list[tuple[str, tuple]]] = defaultdict(list)  # hosts and values by finding without values
    failed = False
    for host, finding in diagnose():
        found[replace(finding, values=())].append((host, finding.values))
        failed |= finding.level == "FAIL"
    num_hosts = len(hosts())

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    for finding, where in found.items():
        columns = [(min(column), max(column)) for column in zip(*(values for _, values in where), strict=True)]
        spans = (number(low) if low == high else f"{number(low)} to {number(high)}" for low, high in columns)
        text = finding.text.format(*spans) if columns else finding.text
        names = [host for host, _ in where if host]
        if names and num_hosts > 1:
            text += f" on all {num_hosts} hosts" if len(names) == num_hosts else f" on {listed(names)}"
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"{finding.level:<8} {finding.check:<10} {text}{remedy}", flush=True)
    return not failed


def diagnose() -> Iterator[tuple[str, Finding]]:
    """(host, finding) of all checks. The host is "" if a finding concerns all hosts."""
    home, nodes = storage.home(), hosts()
    actor = ray.remote(Probe)
    probes = {host: actor.options(**pinned(n)).remote(n["NodeManagerAddress"], home) for host, n in nodes.items()}
    facts = ask(probes, "facts")
    for host, error in facts.items():
        if isinstance(error, Exception):
            yield host, Finding("FAIL", "host", f"no answer ({error})", "restart Ray there, or remove the host")
    facts = {host: fact for host, fact in facts.items() if not isinstance(fact, Exception)}
    probes = {host: probes[host] for host in facts}
    versions = {THIS_PROCESS: installed()} | {host: fact["versions"] for host, fact in facts.items()}
    yield from (("", finding) for finding in check_versions(versions))
    for host, fact in facts.items():
        yield from ((host, finding) for finding in check_host(fact, nodes[host]["Resources"], len(nodes)))
    yield from check_clocks(probes)
    yield from check_home(probes, home)
    if len(probes) > 1:
        yield "", check_token()
        yield from check_network(probes, {host: nodes[host]["NodeManagerAddress"] for host in probes})


def ask(probes: dict, method: str, arguments: dict | None = None) -> dict:
    """{host: the answer of its probe, or the exception that it raised}."""
    refs = {host: getattr(probe, method).remote(*(arguments or {}).get(host, ())) for host, probe in probes.items()}
    deadline, answers = time.monotonic() + 2 * ANSWER_SECONDS, {}
    for host, ref in refs.items():
        try:
            answers[host] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except Exception as error:
            answers[host] = error.cause if isinstance(error, ray.exceptions.RayTaskError) else type(error)(type(error))
    return answers


def check_versions(versions: dict[str, dict[str, str]]) -> list[Finding]:
    if differing := differences(versions):
        return [Finding("FAIL", "versions", line, REMEDY) for line in differing]
    same = ", ".join(f"{name} {value}" for name, value in versions[THIS_PROCESS].items())
    return [Finding("ok", "versions", same)]


def check_host(facts: dict, resources: dict, num_hosts: int) -> Iterator[Finding]:
    yield from check_gpus(facts["gpus"], int(resources.get("GPU", 0)))
    memory, store = facts["memory"] / GIB, resources.get("object_store_memory", 0) / GIB
    yield Finding("ok", "memory", "{} GiB, {} CPUs", values=(round(memory), resources.get("CPU", 0)))
    if facts["shm"] is not None:
        shm = facts["shm"] / GIB
        short = shm < max(store, min(0.3 * memory, 8))
        remedy = (
            "give it a third of the memory (docker run --shm-size), else Ray uses the disk or little memory" * short
        )
        text, values = "{} GiB, and Ray's object store has {} GiB", (round(shm, 1), round(store, 1))
        yield Finding("warning" if short else "ok", "/dev/shm", text, remedy, values)
    for folder, (total, free) in facts["disks"].items():
        level = "FAIL" if free < (1 - FULL_DISK) * total else "warning" if free < 20 * GIB else "ok"
        remedy = "free some, or let `ray start --temp-dir` and TMPDIR name a larger disk" * (level != "ok")
        folder = "Ray's folder" if "session_" in folder else f"the cache's disk ({folder})"
        yield Finding(level, "disk", f"{{}} GiB free for {folder}", remedy, (round(free / GIB),))
    few = 0 < facts["open files"] < MIN_OPEN_FILES
    remedy = f"`ulimit -n {8 * MIN_OPEN_FILES}` before `ray start`" * few
    yield Finding("warning" if few else "ok", "open files", "at most {}", remedy, (facts["open files"],))
    if facts["own address"].startswith("127.") and num_hosts > 1:
        name = f"the host's name is {facts['own address']}, which others can't reach (training uses Ray's address)"
        yield Finding("ok", "hostname", name)


def check_gpus(gpus: dict, known_to_ray: int) -> Iterator[Finding]:
    names, level, remedy = gpus["names"], "FAIL", ""
    text = ", ".join(f"{names.count(name)} × {name}" for name in sorted(set(names)))
    if not names and (gpus["error"] or known_to_ray):
        text, remedy = f"nvidia-smi: {gpus['error'] or 'not found'}", "install or restart NVIDIA's driver"
    elif gpus["usable"] < len(names):
        text += f"; torch can use {gpus['usable']} ({gpus['error']})"
        remedy = "install a torch for this driver's CUDA, and end what holds the GPUs"
    elif known_to_ray < len(names):
        level, text = "warning", f"{text}; Ray knows of {known_to_ray}"
        remedy = "restart Ray without --num-gpus and CUDA_VISIBLE_DEVICES"
    elif not gpus["peers"]:
        level, text = "warning", f"{text}; not every pair has peer access"
        remedy = "NCCL goes through the host's memory; look at `nvidia-smi topo -m` and at the IOMMU's settings"
    else:
        level = "ok"
    yield Finding(level, "GPUs", text or "none", remedy)


def check_clocks(probes: dict) -> Iterator[tuple[str, Finding]]:
    def offset(probe) -> float:
        """A lower bound on the difference between the host's clock and this one, in seconds."""
        answers = []
        for _ in range(3):
            before = time.time()
            with suppress(ray.exceptions.RayError):
                there = ray.get(probe.clock.remote(), timeout=10)
                after = time.time()
                answers.append(max(abs(there - (before + after) / 2) - (after - before) / 2, 0))
        return min(answers, default=0.0)

    with ThreadPoolExecutor(32) as pool:
        for host, seconds in zip(probes, pool.map(offset, probes.values()), strict=True):
            level = "FAIL" if seconds > 300 else "warning" if seconds > 1 else "ok"
            remedy = "synchronize it (chrony); object stores refuse requests that are minutes off" * (level != "ok")
            yield host, Finding(level, "clock", "{} s off this host's", remedy, (round(seconds, 3),))


def check_home(probes: dict, home: str) -> Iterator[tuple[str, Finding]]:
    """Each host writes a small file, and every host reads all of them."""
    files = {f"{os.getpid()}-{number}": host for number, host in enumerate(probes)}
    errors = ask(probes, "write_file", {host: [name] for name, host in files.items()})
    written = [name for name, host in files.items() if not errors[host]]
    for host in probes:
        if errors[host]:
            text = f"{home} can't be written: {errors[host]}"
            remedy = "check NANOCHAT_RAY_HOME, its permissions and, of a bucket, the credentials there"
            yield host, Finding("FAIL", "home", text, remedy)
    read = ask(probes, "read_files", {host: [written] for host in probes})
    seen = defaultdict(list)  # hosts by the hosts whose files they see
    for host, names in read.items():
        seen[frozenset(files[name] for name in names) if isinstance(names, set) else frozenset()].append(host)
    ask(probes, "remove_files")
    if set(seen) != {frozenset(files[name] for name in written)}:
        groups = "; ".join(f"{listed(of)} can read files of {listed(list(by)) or 'no host'}" for by, of in seen.items())
        remedy = "let NANOCHAT_RAY_HOME be a bucket or a folder that all hosts mount"
        yield "", Finding("FAIL", "home", f"{home} is not shared: {groups}", remedy)
    elif len(written) == len(probes):
        yield "", Finding("ok", "home", f"{home} is written and read" + " by every host" * (len(probes) > 1))


def check_token() -> Finding:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        return Finding("ok", "token", "Ray asks for one")
    remedy = "start Ray with RAY_AUTH_MODE=token on every host; `ray get-auth-token --generate` makes one"
    return Finding("warning", "token", "anyone who reaches Ray's ports can run code on the hosts", remedy)


def check_network(probes: dict, addresses: dict[str, str]) -> Iterator[tuple[str, Finding]]:
    """Check ports between all pairs. Then measure bandwidth and latency along a ring of hosts, all links at once."""
    ports = ask(probes, "listen")
    places = {host: (addresses[host], port) for host, port in ports.items() if isinstance(port, int)}
    others = {host: [[place for other, place in places.items() if other != host]] for host in probes}
    closed = {host: error for host, error in ports.items() if host not in places}
    closed |= {host: missed for host, missed in ask(probes, "unreachable", others).items() if missed}
    hosts_of = {place: host for host, place in places.items()}
    for host, missed in closed.items():
        what = listed([hosts_of[place] for place in missed]) if isinstance(missed, list) else f"others ({missed})"
        remedy = "open all TCP ports between the hosts, because NCCL may choose any"
        yield host, Finding("FAIL", "ports", f"no connection to ports of {what}", remedy)
    if closed:
        return
    yield "", Finding("ok", "ports", f"each of {len(places)} hosts connects to all others")
    ring = list(places)
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    measured = ask(probes, "measure", {host: [places[following[host]]] for host in ring})
    rates = {host: result for host, result in measured.items() if not isinstance(result, Exception)}
    median = statistics.median([rate for rate, _ in rates.values()]) if rates else 0
    for host in ring:
        link = f"{host} -> {following[host]}"
        if host not in rates:
            remedy = "look for packet loss or a wrong MTU between them"
            yield "", Finding("FAIL", "network", f"{link}: broken off ({measured[host]})", remedy)
            continue
        rate, trip = rates[host]
        if rate < max(SLOW_NETWORK, median / 2):
            text = f"{link}: {rate / 1e6:,.0f} Mbit/s, round trip {1e3 * trip:.2f} ms"
            remedy = "a step waits for the slowest link: `nanochat-ray plan --nodes --network` shows the cost"
            yield "", Finding("warning", "network", text, remedy)
        else:
            values = (round(rate / 1e9, 1), round(1e3 * trip, 2))
            yield host, Finding("ok", "network", "{} Gbit/s in one stream to the next, round trip {} ms", "", values)
