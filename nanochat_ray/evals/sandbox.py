"""Runs a program that a model wrote in a process of its own, which jail.py isolates from the machine.

A program is imported as a module, not run as __main__. It is killed after 5 s. It gets 256 MB, no other process or
thread, an empty working folder, and neither the environment nor the file descriptors of this process. These limits
always apply. Three more layers apply where the kernel supports them, and the result names the layers in effect:
- namespaces: the program sees no other process, no network, and of the disk only Python and the system's libraries. It
  can write only to its folder.
- landlock, if namespaces are refused, as in most containers: the same restriction of the disk.
- seccomp: no sockets, no new processes, no signals or ptrace to others, no mounts, no shared memory, locks or leases;
  of fcntl, ioctl and prctl only the commands that a program needs for itself.
Without the first two, the program may read and write files as this user may. If root starts it, it runs as nobody,
provided that nobody may read Python's library. The sandbox protects the machine, not the score: a program that wants
to cheat shares its process with its tests.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LAYERS = ("namespaces", "landlock", "seccomp")
START_SECONDS = 60  # at most, to start Python on a busy machine
JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class SandboxResult:
    passed: bool  # the program ran to its end
    error: str  # why it did not, such as "AssertionError: …", "timed out after 5 s", "killed by signal 11"
    output: str  # the first 64 KiB of stdout and stderr
    protection: str  # the layers in effect, such as "namespaces seccomp limits"


def run_program(
    code: str, timeout: float = 5.0, memory_mb: int = 256, layers: tuple[str, ...] = LAYERS
) -> SandboxResult:
    """Run Python code and return its outcome. timeout is in seconds.

    layers: the layers to apply if the kernel supports them. Tests leave some out to check the others. Raises OSError if
    the sandbox itself does not work on this machine.
    """
    folder = tempfile.mkdtemp(prefix="sandbox_")
    command = [sys.executable, "-I", "-S", str(JAIL), folder, str(timeout), str(memory_mb), ",".join(layers)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env={}, start_new_session=True
        )
        try:  # the jail enforces the timeout; only its start can take longer
            answer, trouble = process.communicate(code.encode(errors="replace"), timeout + START_SECONDS)
        except subprocess.TimeoutExpired:
            raise OSError(f"the sandbox did not start within {START_SECONDS} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    finally:
        remove(folder)
    protection, *rest = answer.decode(errors="replace").split("\0", maxsplit=2)
    if process.returncode or not protection:
        lines = (trouble.decode(errors="replace") + "".join(rest)).strip().splitlines()
        raise OSError(f"the sandbox did not start: {lines[-1] if lines else f'exit code {process.returncode}'}")
    error, output = rest
    return SandboxResult(not error, error, output, protection)


def remove(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError:  # a program can nest folders deeper than shutil.rmtree goes
        subprocess.run(["rm", "-rf", folder], check=False)
