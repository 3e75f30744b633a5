"""Who writes into a run's folder: one process at a time, on any host that sees the folder.

The holder's holder.json says who it is, and the holder touches it every few seconds. One that died is known by its
process on this host, by its job on this cluster, and elsewhere by a file that stays as it is. No clocks are compared.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import ray

from nanochat_ray import storage

BEAT_SECONDS = 4.0
SILENT_SECONDS = 20.0  # of the file, after which the holder counts as dead, wherever it was
LOOK_SECONDS = 0.5

_held: dict[str, int] = {}  # folders that this process holds, by the thread that may hold them again


class Lease(threading.Thread):
    """Keeps a folder while it runs."""

    def __init__(self, folder: str):
        super().__init__(daemon=True, name="lease")
        self.folder, self.uri = folder, storage.join(folder, "holder.json")
        self.me = {"token": uuid.uuid4().hex, "since": f"{datetime.now(UTC):%F %T} UTC"} | process(os.getpid()) | job()
        self.ended = threading.Event()
        self.taken_by: str | None = None

    def run(self) -> None:
        pause = 1.0  # the first look is soon: two may have started at once, and the last that wrote has it
        while not self.ended.wait(pause):
            pause = BEAT_SECONDS
            with suppress(OSError, ValueError):  # a disk that is full or away: the run may go on
                self.beat()

    def beat(self) -> None:
        holder = read(self.uri)
        if holder and holder["token"] != self.me["token"]:
            self.taken_by = describe(self.folder, holder)
            self.ended.set()
        elif holder and not storage.is_remote(self.uri):
            os.utime(self.uri)  # a full disk takes this, too
        else:
            self.write()

    def write(self) -> None:
        storage.write_json(self.uri, self.me)

    def check(self) -> None:
        """Raises ValueError when another process has taken the folder."""
        if self.taken_by:
            raise ValueError(self.taken_by)


@contextmanager
def hold(folder: str) -> Iterator[Lease]:
    """Hold a folder; the same thread may do so again. Raises ValueError saying who holds it.

    A holder on another host that died without a word is waited for, at most SILENT_SECONDS.
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
    """Until nobody holds the folder. Raises ValueError when somebody does."""
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
    """The holder, and when it was last heard of by the file's own clock; None without one."""
    try:
        return (holder, storage.modified(uri)) if (holder := read(uri)) else None
    except FileNotFoundError:
        return None


def read(uri: str) -> dict | None:
    """None for no file, and for one that is none of ours."""
    try:
        holder = storage.read_json(uri)
        return holder if isinstance(holder, dict) and "token" in holder else None
    except (FileNotFoundError, ValueError):
        return None


def describe(folder: str, holder: dict) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    return f"{folder} is held by {who}: wait for it or stop it, or take another name"


def process(pid: int) -> dict:
    """What tells a process from all others: its host, the namespace that its pid is in, and when it began."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        began = None if fields[0] == "Z" else fields[19]  # a zombie does nothing any more
        where = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        began, where = None, None
    return {"host": socket.gethostname(), "pid": pid, "where": where, "began": began}


def job() -> dict:
    """This process's job of Ray."""
    context = ray.get_runtime_context()
    return {"session": ray._private.worker.global_worker.node.session_name, "job": context.get_job_id()}


def is_alive(holder: dict) -> bool | None:
    """None when it can't be known from here."""
    here = process(os.getpid())
    if here["where"] and holder.get("where") == here["where"]:
        return process(holder["pid"])["began"] == holder["began"]
    ended = {entry["JobID"] for entry in ray._private.state.jobs() if entry["IsDead"]}
    return False if holder.get("session") == job()["session"] and holder.get("job") in ended else None
