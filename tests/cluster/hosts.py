"""Hosts of the tests' own on this machine: namespaces for network, mounts, processes and hostname. Needs root.

Host i has the address 10.N.0.i, where N is a number that no other run of these tests has, a hostname that /etc/hosts
maps to 127.0.1.1 as Debian and Ubuntu do, and its own /tmp, /dev/shm and HOME. Everything else is shared with this
machine: the code and its environment, and `shared`, a folder that all hosts see.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parents[2]
# What is below /tmp would be hidden by the host's own: the code and its environment are bound there again.
SETUP = """
n=0; for folder in {kept}; do n=$((n+1)); mkdir -p {root}/kept$n; mount --bind $folder {root}/kept$n; done
mount --bind {root}/tmp /tmp
n=0; for folder in {kept}; do n=$((n+1)); mkdir -p $folder; mount --bind {root}/kept$n $folder; done
mount -t tmpfs -o size=2g none /dev/shm
mount -t proc proc /proc
mount --bind {root}/hosts /etc/hosts
mount --bind {root}/resolv.conf /etc/resolv.conf
hostname {name}
exec sleep 7200
"""


def run(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True)


class Network:
    """A bridge that hosts are joined to. This machine has the address `gateway` in it."""

    def __init__(self):
        for self.number in range(78, 98):
            self.lock = os.open(f"/run/lock/nanochat-ray-hosts-{self.number}", os.O_CREAT | os.O_WRONLY)
            with suppress(BlockingIOError):
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again when this process ends
                break
            os.close(self.lock)
        else:
            raise RuntimeError("20 runs of these tests are under way")
        self.bridge, self.gateway = f"nrbridge{self.number}", self.address(254)

    def address(self, number: int) -> str:
        return f"10.{self.number}.0.{number}"

    def start(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def stop(self) -> None:
        run("ip", "link", "del", self.bridge, check=False)


class Host:
    def __init__(self, network: "Network", number: int, root: Path):
        self.network, self.address, self.name = network, network.address(number), f"nrhost{number}"
        self.root, self.namespace, self.link = root, f"nr{network.number}-{number}", f"nrv{network.number}-{number}"

    def start(self) -> None:
        for folder in ("tmp", "home"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (self.root / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once; others would be waited for
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run("ip", "link", "set", self.link, "master", self.network.bridge, "up")
        run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            run("ip", "-n", self.namespace, "link", "set", device, "up")
        run("ip", "-n", self.namespace, "route", "add", "default", "via", self.network.gateway)
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--propagation", "private"]
        kept = [str(path) for path in (REPOSITORY, Path(sys.prefix)) if path.is_relative_to("/tmp")]
        setup = SETUP.format(root=self.root, name=self.name, kept=" ".join(kept))
        self.process = subprocess.Popen(["ip", "netns", "exec", self.namespace, *unshare, "sh", "-ec", setup])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline = time.monotonic() + 10
        while not self._sleeps(children):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{self.name} did not start")
            time.sleep(0.05)

    def _sleeps(self, children: Path) -> bool:
        """Whether the host's first process has set it up."""
        pids = children.read_text().split() if children.exists() else []
        self.pid = pids[0] if pids else ""
        return bool(pids) and Path(f"/proc/{self.pid}/cmdline").read_bytes().startswith(b"sleep")

    def popen(self, *command: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        enter = ["nsenter", "--target", self.pid, "--mount", "--net", "--pid", "--uts"]
        variables = {"HOME": str(self.root / "home"), "TMPDIR": "/tmp", "PATH": f"{BIN}:{os.environ['PATH']}"}
        return subprocess.Popen([*enter, *command], env={**os.environ, **variables, **(env or {})}, **options)

    def run(self, *command: str, env: dict[str, str] | None = None, timeout: float = 120) -> str:
        """What the command printed. Raises RuntimeError with it when the command fails."""
        process = self.popen(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        if process.returncode:
            ends = said if len(said) < 4000 else f"{said[:1000]}\n…\n{said[-3000:]}"  # a cause may precede a long trace
            raise RuntimeError(f"{self.name}: {' '.join(command)} ended with {process.returncode}:\n{ends}")
        return said

    def cut_off(self) -> None:
        run("ip", "link", "set", self.link, "down")

    def heal(self) -> None:
        run("ip", "link", "set", self.link, "up")

    def power_off(self) -> None:
        """Every process of the host is killed at once."""
        for pid in self.pids():
            if str(pid) != self.pid and pid != self.process.pid:
                _kill(pid)

    def pids(self) -> list[int]:
        said = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in said.stdout.split()]

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of the host with `part` in their command line."""
        found = []
        for pid in self.pids():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                process = psutil.Process(pid)
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        for pid in self.pids():
            _kill(pid)
        if hasattr(self, "process"):
            self.process.wait(timeout=10)
        run("ip", "netns", "del", self.namespace, check=False)
        run("ip", "link", "del", self.link, check=False)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Cluster:
    """Hosts with a Ray of one CPU each, with token authentication. The first is the head."""

    def __init__(self, hosts: int):
        self.network = Network()
        self.root = Path(f"/var/tmp/nanochat-ray-hosts-{self.network.number}")
        self.shared = self.root / "shared"
        self.hosts = [Host(self.network, number, self.root / str(number)) for number in range(1, hosts + 1)]
        self.env = {"RAY_AUTH_MODE": "token", "WANDB_MODE": "disabled", "NANOCHAT_RAY_HOME": str(self.shared / "home")}

    def __enter__(self) -> "Cluster":
        try:
            self._remove()  # a run that was killed may have left hosts
            self.shared.mkdir(parents=True)
            self.network.start()
            for host in self.hosts:
                host.start()
            self.head = self.hosts[0]
            self.head.run("ray", "get-auth-token", "--generate", env=self.env)
            token = (self.head.root / "home" / ".ray" / "auth_token").read_text()
            self.env |= {"RAY_AUTH_TOKEN": token, "RAY_ADDRESS": f"{self.head.address}:6379"}
            for host in self.hosts:
                self.join(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def join(self, host: Host) -> None:
        head = self.head.address
        where = ["--head", "--dashboard-host", head] if host is self.head else ["--address", f"{head}:6379"]
        settings = dict(re.findall(r"^(RAY_\w+)=(.*)$", (REPOSITORY / "cluster" / "ray.env").read_text(), re.MULTILINE))
        settings["RAY_memory_usage_threshold"] = "0.99"  # the memory that Ray sees is that of all hosts and more
        env = settings | {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        host.run("ray", "start", *where, f"--node-ip-address={host.address}", "--num-cpus=1", env=env)

    def __exit__(self, *_) -> None:
        self._remove()

    def _remove(self) -> None:
        for host in self.hosts:
            host.stop()
        self.network.stop()
        shutil.rmtree(self.root, ignore_errors=True)
