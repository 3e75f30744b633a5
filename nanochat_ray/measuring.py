"""What observes a run must not cost it: measurements, samples, logs, reports.

One that fails is a line at once. It is kept in `failed`, and the command ends with it, when all else is done, by exit
status 1 (session.one_line_errors).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_SECONDS = 30.0  # between two lines of what takes long

failed: list[str] = []  # of this process, in turn


def note(line: str) -> None:
    failed.append(line)
    print(f"warning: {line}", flush=True)


@contextmanager
def measuring(what: str, note: Callable[[str], None] = note) -> Iterator[None]:
    """A block whose failure is noted and does not go on."""
    try:
        yield
    except Exception as error:
        note(f"{what} failed: {one_line(error)}")


@contextmanager
def patiently(what: str) -> Iterator[None]:
    """A block that says every QUIET_SECONDS that it is under way still."""
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(QUIET_SECONDS):
            print(f"{what}: {time.monotonic() - began:.0f} s so far", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def one_line(error: BaseException) -> str:
    """FileNotFoundError: core.yaml is missing"""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
