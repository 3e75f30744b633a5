"""Failures of measurements, samples, logs and reports, which must not stop a run.

A failure is printed at once and kept in `failed`. When everything else is done, the command ends with these lines and
exit code 1 (session.one_line_errors).
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

PROGRESS_SECONDS = 30.0  # between two lines of progress

failed: list[str] = []  # messages of this process's failures, in order


def note(line: str) -> None:
    failed.append(line)
    print(f"warning: {line}", flush=True)


@contextmanager
def measuring(what: str, note: Callable[[str], None] = note) -> Generator[None]:
    """Run a block. If it fails, report that with `note` and continue after the block."""
    try:
        yield
    except Exception as error:
        note(f"{what} failed: {one_line(error)}")


@contextmanager
def patiently(what: str) -> Generator[None]:
    """Print every PROGRESS_SECONDS that the block is still running."""
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(PROGRESS_SECONDS):
            print(f"{what}: {time.monotonic() - began:.0f} s so far", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def one_line(error: BaseException) -> str:
    """The type and first line of an error, such as "FileNotFoundError: core.yaml is missing"."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
