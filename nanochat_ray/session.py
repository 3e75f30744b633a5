"""What commands share: a Ray of their own or that of a cluster, and errors of one line."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps

from nanochat_ray import machine, measuring

SOCKETS_LONGEST = 36  # characters of a folder for Ray's files: Unix allows 107 for a socket's path, and Ray adds 71


def one_line_errors(command: Callable[[], None]) -> Callable[[], None]:
    """What a user can mend is one line on stderr and exit code 1, as are measurements that failed, at the end.

    A stop that was asked for, by Ctrl-C or SIGTERM, is exit code 130.
    """

    @wraps(command)
    def wrapped() -> None:
        measuring.failed.clear()
        try:
            command()
            if measuring.failed:
                sys.exit(f"error: all else is done, but {'; '.join(measuring.failed)}")
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped", file=sys.stderr)
            sys.exit(130)

    return wrapped


def start_ray() -> None:
    """connect, and see that all hosts run the same versions. Raises ValueError naming the hosts that don't."""
    from nanochat_ray import versions

    connect()
    versions.check()


def connect() -> None:
    """To the cluster that RAY_ADDRESS names, as in a job; else to a local Ray of this process."""
    import ray
    import ray.data

    # Without an address Ray would look for a cluster that someone has started, or left, on this machine.
    address = os.environ.get("RAY_ADDRESS", "local")
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:  # Ray itself would try for minutes, and not say so
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error}): is it the head's address?") from error
    own = local_ray() if address == "local" else {}
    # Supervisors send SIGTERM to all processes of a job at once. Those of Ray, which inherit this, leave it to the
    # driver: it has the workers save, and then kills them, as a SIGTERM would be waited for in vain.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **own)
    except Exception as error:  # of many kinds: the cluster has another version, or this machine is too busy for Ray
        raise ValueError(f"no connection to Ray at {address}: {' '.join(str(error).split())}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does; Ray's own handler aborts
    if own:
        node = ray._private.worker._global_node
        node.kill_all_processes = partial(_kill_at_once, node.kill_all_processes, node)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the stages print progress of their own, in less
    ray.data.DataContext.get_current().enable_progress_bars = False


def _kill_at_once(kill: Callable, node, **options) -> None:
    """In place of a node's kill_all_processes. Those that its processes started would look for them for minutes."""
    import psutil  # Ray brings it

    started = []
    for process in psutil.Process().children():
        if process.pid in {info.process.pid for infos in node.all_processes.values() for info in infos}:
            started += process.children(recursive=True)
    kill(**options | {"allow_graceful": False})
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def local_ray() -> dict:
    """What a Ray of this process's own is started with: what it may use of the machine, and a folder for its sockets.

    Raises ValueError when the folder's path is too long.
    """
    from ray._common.utils import get_system_memory

    options, memory = {"num_cpus": machine.available_cpus()}, machine.available_memory()
    if memory < get_system_memory():  # Ray looks at the limits of a container, but not at those of systemd or Slurm
        options |= {"object_store_memory": int(0.3 * memory), "_memory": int(0.7 * memory)}
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(folder)) > SOCKETS_LONGEST:
        if "RAY_TMPDIR" in os.environ or not os.access("/tmp", os.W_OK | os.X_OK):
            raise ValueError(
                f"the path {folder} is too long for Ray's sockets: set RAY_TMPDIR to a folder of at most "
                f"{SOCKETS_LONGEST} characters"
            )
        options["_temp_dir"] = "/tmp/ray"
    return options


def check_once(option: str, args: list[str]) -> None:
    """Raises ValueError for an option of several values that is repeated: of them the parser would take the last."""
    if sum(arg.partition("=")[0] == option for arg in args) > 1:
        raise ValueError(f"{option} is there twice: name all after one, {option} A B")


def bpb(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
