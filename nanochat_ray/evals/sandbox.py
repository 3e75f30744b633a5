"""Runs a program that a model wrote where it can do no harm: a process of its own, locked up by jail.py.

A program is imported as a module, not run as __main__. It is killed after 5 s, has 256 MB, no network, no other process
or thread, an empty folder as the only place to write to, and nothing of this process's environment or descriptors.
Limits are kept everywhere; three more layers are put on where the kernel has them, and the result says which are in
force:
- namespaces: it sees no process but itself, no network, and of the disk only Python and the system's libraries.
- landlock, where namespaces are refused (containers mostly do): the same of the disk.
- seccomp: no sockets, no new processes, no signals or ptrace to others, no mounts, no shared memory, locks or leases;
  of fcntl, ioctl and prctl only the commands that a program on its own needs.
With neither of the first two it may read and write files as this user may (started by root, as nobody if nobody may
read Python's library). This guards the machine, not the score: a program that is out to deceive shares its process with
its tests.
"""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LAYERS = ("namespaces", "landlock", "seccomp")
START_SECONDS = 60  # a busy machine may need long to start Python
JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True)
class SandboxResult:
    passed: bool  # the program came to its end
    error: str  # why it did not: "AssertionError: …", "timed out after 5 s", "killed by signal 11"
    output: str  # the first 64 KiB of stdout and stderr
    protection: str  # the layers in force, such as "namespaces seccomp limits"


def run_program(
    code: str, timeout: float = 5.0, memory_mb: int = 256, layers: tuple[str, ...] = LAYERS
) -> SandboxResult:
    """Run Python code; whatever it does is in the result.

    layers: those to put on if the kernel can; leave some out to see what the others hold. Raises OSError when the
    sandbox itself does not work on this machine.
    """
    folder = tempfile.mkdtemp(prefix="sandbox_")
    command = [sys.executable, "-I", "-S", str(JAIL), folder, str(timeout), str(memory_mb), ",".join(layers)]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env={}, start_new_session=True
        )
        try:  # the jail ends the program in time: beyond it, only its start can take long
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
