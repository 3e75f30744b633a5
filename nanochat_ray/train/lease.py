"""A lease on a run's folder: only one process writes to it, on all hosts that see the folder.

The file holder.json names the holder, which updates it every few seconds. A dead holder is recognized by its process on
the same host, by its job on the same cluster, and else by a file that does not change. Clocks are never compared.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import ray

from nanochat_ray import storage

BEAT_SECONDS = 4.0
SILENT_SECONDS = 20.0  # if the file does not change for so long, the holder is dead
LOOK_SECONDS = 0.5

_held: dict[str, int] = {}  # {folder that this process holds: id of the thread that may hold it again}


class Lease(threading.Thread):
    """A thread that holds a folder while it runs."""

    def __init__(self, folder: str):
        super().__init__(daemon=True, name="lease")
        self.folder, self.uri = folder, storage.join(folder, "holder.json")
        self.me = {"token": uuid.uuid4().hex, "since": f"{datetime.now(UTC):%F %T} UTC"} | process(os.getpid()) | job()
        self.ended = threading.Event()
        self.taken_by: str | None = None

    def run(self) -> None:
        pause = 1.0  # check soon: if two processes started together, the one that wrote last holds the folder
        while not self.ended.wait(pause):
            pause = BEAT_SECONDS
            with suppress(OSError, ValueError):  # continue with a full or unreachable disk
                self.beat()

    def beat(self) -> None:
        holder = read(self.uri)
        if holder and holder["token"] != self.me["token"]:
            self.taken_by = describe(self.folder, holder)
            self.ended.set()
        elif holder and not storage.is_remote(self.uri):
            os.utime(self.uri)  # works on a full disk, too
        else:
            self.write()

    def write(self) -> None:
        storage.write_json(self.uri, self.me)

    def check(self) -> None:
        """Raises ValueError if another process has taken the folder."""
        if self.taken_by:
            raise ValueError(self.taken_by)


@contextmanager
def hold(folder: str) -> Generator[Lease]:
    """Hold a folder. The same thread may hold it again. Raises ValueError that names another holder.

    If the holder may have died on another host, this waits for a sign of it, at most SILENT_SECONDS.
    """
    lease = Lease(folder)
    if _held.get(folder) == threading.get_ident():
        yield lease
        return
    wait_for(folder, lease.uri)
    lease.write()
    lease.start()
    _held[folder] = threading.get_ident()
    try:
        yield lease
    finally:
        del _held[folder]
        lease.ended.set()
        lease.join(BEAT_SECONDS)
        with suppress(OSError, ValueError):
            if (read(lease.uri) or {}).get("token") == lease.me["token"]:
                storage.remove(lease.uri)


def wait_for(folder: str, uri: str) -> None:
    """Wait until no other process holds the folder. Raises ValueError if one does."""
    first, said = state(uri), False
    deadline = time.monotonic() + SILENT_SECONDS
    while (now := state(uri)) is not None and time.monotonic() < deadline:
        alive = is_alive(now[0])
        if alive is False:
            return
        if alive or now != first:
            raise ValueError(describe(folder, now[0]))
        if not said:
            print(f"waiting at most {SILENT_SECONDS:.0f} s for a sign of life: {describe(folder, now[0])}", flush=True)
            said = True
        time.sleep(LOOK_SECONDS)


def state(uri: str) -> tuple[dict, datetime] | None:
    """(holder, modification time of its file); None without a holder."""
    try:
        return (holder, storage.modified(uri)) if (holder := read(uri)) else None
    except FileNotFoundError:
        return None


def read(uri: str) -> dict | None:
    """The content of a holder.json. None if there is no valid one."""
    try:
        holder = storage.read_json(uri)
        return holder if isinstance(holder, dict) and "token" in holder else None
    except (FileNotFoundError, ValueError):
        return None


def describe(folder: str, holder: dict) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    return f"{folder} is held by {who}: wait for it or stop it, or take another name"


def process(pid: int) -> dict:
    """What identifies a process: its host, pid, pid namespace and start time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        began = None if fields[0] == "Z" else fields[19]  # a zombie counts as dead
        where = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        began, where = None, None
    return {"host": socket.gethostname(), "pid": pid, "where": where, "began": began}


def job() -> dict:
    """The Ray session and job of this process."""
    context = ray.get_runtime_context()
    return {"session": ray._private.worker.global_worker.node.session_name, "job": context.get_job_id()}


def is_alive(holder: dict) -> bool | None:
    """Whether a holder is alive. None if this host can't know."""
    here = process(os.getpid())
    if here["where"] and holder.get("where") == here["where"]:
        return process(holder["pid"])["began"] == holder["began"]
    ended = {entry["JobID"] for entry in ray._private.state.jobs() if entry["IsDead"]}
    return False if holder.get("session") == job()["session"] and holder.get("job") in ended else None
