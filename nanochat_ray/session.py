"""Shared by all commands: connecting to Ray or starting it, and errors as one line."""

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps

from nanochat_ray import machine, measuring

MAX_FOLDER_BYTES = 36  # of the path of Ray's folder: Unix allows 107 bytes for a socket's path, and Ray adds 71


def one_line_errors(command: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a command's main function: an error that the user can fix becomes one line, with exit code 1.

    These are ValueError, OSError and ImportError, and at the end measurements that failed. A stop by Ctrl-C or SIGTERM
    gives exit code 130.
    """

    @wraps(command)
    def wrapped() -> None:
        measuring.failed.clear()
        try:
            command()
            if measuring.failed:
                sys.exit(f"error: everything else is done, but {'; '.join(measuring.failed)}")
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped", file=sys.stderr)
            sys.exit(130)

    return wrapped


def start_ray() -> None:
    """Connect to Ray and check that all hosts run the same versions. Raises ValueError that names hosts that don't."""
    from nanochat_ray import versions

    connect()
    versions.check()


def connect() -> None:
    """Connect to the cluster at RAY_ADDRESS, which is set in a job. Without it, start a local Ray for this process."""
    import ray
    import ray.data

    # Pass "local" explicitly: without an address, Ray would join any cluster that runs on this machine.
    address = os.environ.get("RAY_ADDRESS", "local")
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:  # check the port first, because Ray would retry silently for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error}): check the head's address") from error
    own = local_ray() if address == "local" else {}
    if own:
        # This Ray listens on all addresses of the machine, and asks for a token. Without one in the environment, Ray
        # writes a token into a file, which other users of the machine can read.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Supervisors send SIGTERM to all processes of a job at once. Ray's processes inherit this mask and ignore the
    # signal, so that only the driver reacts: it lets the workers save, and then kills them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False, **own)
    except Exception as error:  # of many types: the cluster has another version, this machine is too busy, …
        raise ValueError(f"no connection to Ray at {address}: {' '.join(str(error).split())}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # act as on Ctrl-C; Ray's own handler aborts
    if own:
        node = ray._private.worker._global_node
        node.kill_all_processes = partial(_kill_at_once, node.kill_all_processes, node)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the stages print their own, shorter progress
    ray.data.DataContext.get_current().enable_progress_bars = False


def _kill_at_once(kill: Callable, node, **options) -> None:
    """Replaces a node's kill_all_processes. Also kills grandchildren, which would run on for minutes."""
    import psutil  # a dependency of Ray

    started = []
    for process in psutil.Process().children():
        if process.pid in {info.process.pid for infos in node.all_processes.values() for info in infos}:
            started += process.children(recursive=True)
    kill(**options | {"allow_graceful": False})
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def local_ray() -> dict:
    """Options of ray.init for a local Ray: the CPUs and memory that it may use, and a folder for its sockets.

    Raises ValueError if the folder's path is too long.
    """
    from ray._common.utils import get_system_memory

    options: dict = {"num_cpus": machine.available_cpus()}
    memory = machine.available_memory()
    if memory < get_system_memory():  # Ray sees the limits of a container, but not those of systemd or Slurm
        options |= {"object_store_memory": int(0.3 * memory), "_memory": int(0.7 * memory)}
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(folder)) > MAX_FOLDER_BYTES:
        if "RAY_TMPDIR" in os.environ or not os.access("/tmp", os.W_OK | os.X_OK):
            raise ValueError(
                f"the path {folder} is too long for Ray's sockets: set RAY_TMPDIR to a folder of at most "
                f"{MAX_FOLDER_BYTES} characters"
            )
        options["_temp_dir"] = "/tmp/ray"
    return options


def check_once(option: str, args: list[str]) -> None:
    """Raises ValueError if an option with several values is repeated, because the parser would take only the last."""
    if sum(arg.partition("=")[0] == option for arg in args) > 1:
        raise ValueError(f"{option} is given twice: name all values after one, {option} A B")


def bpb(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
