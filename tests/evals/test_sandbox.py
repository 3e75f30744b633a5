"""Programs that try to break out: each is contained and reported, and this process does not notice."""

import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from nanochat_ray.evals import sandbox
from nanochat_ray.evals.sandbox import LAYERS, SandboxResult, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have none of the layers")


def refuses_namespaces() -> bool:
    """Whether this is another system than Linux, or a container whose kernel refuses new namespaces."""
    if not shutil.which("unshare"):
        return True
    as_root = [] if os.geteuid() == 0 else ["--user"]
    unshare = ["unshare", *as_root, "--mount", "--pid", "--net", "--fork", "true"]
    return subprocess.run(unshare, capture_output=True).returncode != 0


# Which layers are tried, and with them in force, what protection says.
CONTAINER = (("landlock", "seccomp"), "landlock seccomp limits")
EVERYTHING = (LAYERS, "namespaces seccomp limits")
ALONE = (("namespaces",), "namespaces limits")
REFUSES_NAMESPACES = refuses_namespaces()
NAMESPACES = pytest.mark.skipif(REFUSES_NAMESPACES, reason="this kernel refuses namespaces, as in most containers")
SEPARATE = [pytest.param(EVERYTHING, marks=NAMESPACES), CONTAINER, pytest.param(ALONE, marks=NAMESPACES)]
STRONGEST = CONTAINER if REFUSES_NAMESPACES else EVERYTHING


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the sandbox makes its folders: none is left, and no process that was started with one."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


@functools.cache
def layers_in_force(layers: tuple[str, ...]) -> str:
    return run_program("", layers=layers).protection


def run(code: str, layers_and_protection=STRONGEST, timeout: float = 5.0) -> SandboxResult:
    """Run the code with these layers, which are checked first: without them it may signal all processes of the user."""
    layers, protection = layers_and_protection
    assert layers_in_force(layers) == protection, "this kernel refuses a layer that these tests are about"
    result = run_program(code, timeout=timeout, layers=layers)
    assert result.protection == protection
    assert result.passed == (result.error == "")
    return result


each_layer = pytest.mark.parametrize("layers", SEPARATE, ids=lambda layers: layers[1].replace(" ", "-"))


@each_layer
def test_a_program_runs_with_its_output(layers):
    code = "import hashlib, math, random, re, sys, typing\nprint(math.pi, 'é')\nprint('to stderr', file=sys.stderr)"
    result = run(code, layers)
    assert result.passed
    assert sorted(result.output.splitlines()) == ["3.141592653589793 é", "to stderr"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert 1 + 1 == 3, 'sums'", "AssertionError: sums"),
        ("def f(:", "SyntaxError: "),
        ("f()", "NameError: name 'f' is not defined"),
        ("def f(): f()\nf()", "RecursionError: "),
        ("import numpy", "ModuleNotFoundError: "),
        # what leaves before the tests have run has not passed them
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit: "),
        ("import os; os._exit(0)", "exited with code 0 before its end"),
        ("import os; os.closerange(0, 99); os._exit(0)", "exited with code 0 before its end"),
        ("import os; os.write(3, b'\\0'); os._exit(0)", " "),
        ("import os; os.write(3, b'passed'); os._exit(0)", "passed"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit(0)\nraise E", "exited with code 0 before its end"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
    ],
)
def test_a_failure_is_named(code, error):
    result = run(code)
    assert not result.passed
    assert result.error.startswith(error)


def test_what_a_program_says_does_not_change_the_verdict():
    assert run("print('\\0'.join('namespaces x y'.split()))").passed
    assert run("import sys; sys.stdout.buffer.write(bytes(range(256)))").passed
    assert run("import sys; sys.stdout = None").passed
    assert run("import sys; sys.stdout.close()").passed
    assert not run("import os; os.write(1, b'\\0\\0'); raise ValueError('\\0')").passed


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "10 ** 10 ** 8",  # in C, where no signal is looked at
        "import time\nwhile True: time.sleep(9)",
        "import signal, time\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
        "time.sleep(9)",
        "import os, time; os.closerange(0, 99); time.sleep(9)",
        "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(9)",
        "import sys; sys.stdin.read()\nwhile True:\n  try: raise KeyboardInterrupt\n  except BaseException: pass",
    ],
)
def test_time_is_up(code):
    began = time.monotonic()
    assert run(code, timeout=0.5).error == "timed out after 0.5 s"
    assert 0.5 <= time.monotonic() - began < 5


def test_five_seconds_by_default():
    began = time.monotonic()
    assert run_program("while True: pass").error == "timed out after 5 s"
    assert 5 <= time.monotonic() - began < 10


@each_layer
@pytest.mark.parametrize(
    "code",
    [
        "'a' * 10**9",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "import mmap; mmap.mmap(-1, 2**30)",
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
        "while libc.malloc(2**20): pass\nraise MemoryError",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); 'a' * 10**9",
        "import os\nfor i in range(99):\n  fd = os.memfd_create('m')\n  for _ in range(15): os.write(fd, bytes(2**20))",
        "for i in range(99):\n  with open(f'f{i}', 'wb') as f: f.truncate(2**20); f.write(bytes(2**24))\n"
        "  if i == 1: raise OSError",
    ],
)
def test_memory_bombs(layers, code):
    result = run(code, layers)
    assert not result.passed
    assert result.error.split(":")[0].split(" ")[0] in ("MemoryError", "OSError", "ValueError", "PermissionError")


@each_layer
@pytest.mark.parametrize(
    ("code", "errors"),
    [
        ("import os\nwhile True: os.fork()", {"PermissionError", "BlockingIOError"}),
        ("import os\nfor _ in range(10**4):\n  try: os.fork()\n  except OSError: pass", set()),
        ("import threading\nwhile True: threading.Thread(target=input).start()", {"RuntimeError"}),
        ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", {"PermissionError", "BlockingIOError"}),
        ("import ctypes\nlibc = ctypes.CDLL(None)\nfor call in (57, 58): assert libc.syscall(call) == -1", set()),
    ],
)
def test_fork_bombs(layers, code, errors):
    result = run(code, layers)
    assert result.error.split(":")[0] in (errors or {""})


def test_a_program_is_not_replaced_by_another():
    assert run("import os; os.execv('/usr/bin/env', ['env'])").error.startswith("PermissionError")


@each_layer
def test_endless_output_is_cut(layers):
    result = run("while True: print('x' * 1000)", layers, timeout=0.5)
    assert result.error == "timed out after 0.5 s"
    assert len(result.output) == 64 * 1024
    assert run("print('x' * 10**7)", layers).passed


@each_layer
def test_files_of_others_can_neither_be_read_nor_changed(layers, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a key")
    program = """
import os
for attempt in ATTEMPTS:
    try: eval(attempt)
    except OSError: continue
    raise SystemExit(attempt)
"""
    attempts = [
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"os.listdir({str(tmp_path)!r})",
        f"os.unlink({str(secret)!r})",
        f"os.chmod({str(secret)!r}, 0)",
        f"os.utime({str(secret)!r})",
        f"os.link({str(secret)!r}, 'here')",
        f"os.rename({str(secret)!r}, 'here')",
        f"os.mkdir({str(tmp_path / 'new')!r})",
        f"os.listdir({str(Path.home())!r} + '/.ssh')",
        f"os.listdir({os.path.dirname(os.getcwd())!r})",
        "open('/etc/passwd')",
        "os.listdir('/proc')",
        f"open('/proc/{os.getpid()}/environ')",
        "open('/proc/self/mem', 'wb')",
        "open('../outside', 'w')",
        "open('/usr/lib/outside', 'w')",
        f"open({str(Path(sys.base_prefix) / 'outside')!r}, 'w')",
        "os.chroot('.')",
        "os.mknod('disk', 0o60600, os.makedev(8, 0)) or open('disk')",
    ]
    before = os.stat(secret)
    result = run(program.replace("ATTEMPTS", repr(attempts)), layers)
    assert result.passed, result.error
    assert os.stat(secret) == before  # before it is read here, which sets its time of access
    assert secret.read_text() == "a key"


@each_layer
def test_an_empty_folder_of_its_own_is_writable(layers):
    program = """
import os, tempfile
assert os.listdir() == []
with open("f", "w") as f: f.write("x")
assert open("f").read() == "x"
os.mkdir("d")
os.rename("f", "d/f")
os.remove("d/f")
with tempfile.TemporaryFile() as f: f.write(b"x")
"""
    result = run(program, layers)
    assert result.passed, result.error


def test_any_heap_of_folders_is_removed():
    run("import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\nos.mkdir('e', 0)", CONTAINER)


@each_layer
def test_signals_reach_nobody(layers):
    victim = subprocess.Popen(["sleep", "60"])  # what it may signal if it is of the same user
    program = f"""
import os, signal
for pid in ({os.getpid()}, {victim.pid}, os.getppid(), -1, -{os.getpgid(0)}, 0):
    try: os.kill(pid, signal.SIGTERM)
    except OSError: pass
"""
    run(program, layers)
    assert victim.poll() is None
    victim.kill()
    victim.wait()


ATTEMPTS = {
    "owner of a pipe": "fcntl.fcntl(1, fcntl.F_SETOWN, VICTIM)",
    "signal of a pipe": "fcntl.fcntl(1, fcntl.F_SETSIG, 9)",
    "owner of a pipe by thread": "call(72, 1, 15, struct.pack('ii', 0, VICTIM))",
    "signals when a pipe is ready": "fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_ASYNC)",
    "changes of a folder": "fcntl.fcntl(os.open('.', os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_CREATE)",
    "lease": "fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "lock of a file": "fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX)",
    "lock of a part": "fcntl.lockf(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)",
    "FIOASYNC": "fcntl.ioctl(1, 0x5452, struct.pack('i', 1))",
    "FIOSETOWN": "fcntl.ioctl(1, 0x8901, struct.pack('i', VICTIM))",
    "SIOCSPGRP": "fcntl.ioctl(1, 0x8902, struct.pack('i', VICTIM))",
    "TIOCSTI": "fcntl.ioctl(1, 0x5412, b'x')",
    "timer for a thread": "call(222, 1, struct.pack('qiii', 0, 9, 4, VICTIM) + bytes(64), bytes(8))",
    "mq_notify": "call(244, 0, struct.pack('qiii', 0, 9, 0, 0) + bytes(64))",
    "shared memory": "call(29, 1, 4096, 0o1666)",
    "shared memory of another": "call(30, 0, 0, 0)",
    "message to a queue of another": "call(69, 0, bytes(16), 1, 0)",
    "semaphore of another": "call(65, 0, bytes(6), 1)",
    "abstract socket": "socket.socket(socket.AF_UNIX)",
    "pair of sockets": "socket.socketpair()",
    "pidfd": "os.pidfd_open(VICTIM)",
    "pidfd_send_signal": "call(424, 1, 9, 0, 0)",
    "pidfd_getfd": "call(438, 1, 0, 0)",
    "queued signal": "call(129, VICTIM, 9, bytes(128))",
    "thread's signal": "call(234, VICTIM, VICTIM, 9)",
    "tkill": "call(200, VICTIM, 9)",
    "life beyond the guard's": "call(157, 1, 0, 0, 0, 0)",
    "tracer": "call(157, 0x59616D61, VICTIM, 0, 0, 0)",
    "ptrace": "call(101, 16, VICTIM, 0, 0)",
    "process_vm_readv": "call(310, VICTIM, 0, 0, 0, 0, 0)",
    "kcmp": "call(312, VICTIM, VICTIM, 0, 0, 0)",
    "io_uring": "call(425, 1, bytes(120))",
    "keys": "call(250, 0, -3, 0)",
    "userfaultfd": "call(323, 1)",
    "perf": "call(298, bytes(128), VICTIM, -1, -1, 0)",
    "inotify": "call(294, 0)",
    "group of processes": "os.setpgid(0, 0)",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by number")
@pytest.mark.parametrize("layers", SEPARATE[:2], ids=["everything", "container"])
def test_the_kernel_is_not_made_to_reach_others(layers):
    """Each call that could make it is refused. Those that a program needs are not."""
    victim = subprocess.Popen(["sleep", "60"])
    program = f"""
import ctypes, fcntl, os, socket, struct
VICTIM, libc = {victim.pid}, ctypes.CDLL(None, use_errno=True)
def call(*args):
    if libc.syscall(*args) == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
for name, attempt in {ATTEMPTS!r}.items():
    try: eval(attempt)
    except OSError as error: assert error.errno == 1, (name, error)
    else: raise SystemExit(name)
copy = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 10)
os.set_inheritable(copy, True)
os.set_blocking(copy, False)
assert not os.isatty(copy) and not os.get_blocking(copy)
"""
    result = run(program, layers)
    assert result.passed, result.error
    assert victim.poll() is None
    victim.kill()
    victim.wait()


def test_what_a_program_does_as_main_is_left_out():
    demo = "if __name__ == '__main__':\n    import sys\n    sys.exit(input())\n    while True: pass"
    assert run(
        f"import dataclasses, pickle\n@dataclasses.dataclass\nclass A: x: int\npickle.loads(pickle.dumps(A(1)))\n{demo}"
    ).passed


@each_layer
def test_other_processes_cannot_be_traced(layers):
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for pid in ({os.getpid()}, {os.getppid()}, 1):
    assert libc.ptrace(16, pid, 0, 0) == -1
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
    remote = (ctypes.c_uint64 * 2)(id(libc), 8)
    assert pid == 1 or libc.process_vm_readv(pid, local, 1, remote, 1, 0) == -1
"""
    result = run(program, layers)
    assert result.passed, result.error


@each_layer
def test_the_network_is_out_of_reach(layers):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0nanochat_ray_test_sandbox")
        local.listen()
        server.settimeout(0.2)
        program = f"""
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})),
                        (socket.AF_INET, ("8.8.8.8", 53)),
                        (socket.AF_UNIX, "\\0nanochat_ray_test_sandbox")):
    try: socket.socket(family, socket.SOCK_STREAM).connect(address)
    except OSError: continue
    raise SystemExit(address)
"""
        result = run(program, layers)
        assert result.passed, result.error
        with pytest.raises(TimeoutError):
            server.accept()


@each_layer
def test_ctypes_gives_no_rights(layers):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for attempt in (
    lambda: libc.unshare(0x10000000),
    lambda: libc.unshare(0x00020000),
    lambda: libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None),
    lambda: libc.mount(b"proc", b".", b"proc", 0, None),
    lambda: libc.setns(0, 0),
    lambda: libc.chroot(b"/"),
    lambda: libc.umount2(b"/tmp", 2),
    lambda: libc.sethostname(b"mine", 4),
    lambda: libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(1 << 21, 1 << 21)),
):
    assert attempt() == -1
for change in (lambda: os.setuid(0), lambda: os.setgroups([0])):
    if os.getuid() != 0:
        try: change()
        except OSError: continue
        raise SystemExit("other rights")
"""
    result = run(program, layers)
    assert result.passed, result.error


@each_layer
def test_nothing_is_inherited(layers, tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "a key")
    (tmp_path / "open.txt").write_text("a key")
    descriptor = os.open(tmp_path / "open.txt", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    program = """
import os, sys
assert "API_KEY" not in os.environ and len(os.environ) < 5, os.environ
assert os.read(0, 1) == b""
for fd in range(4, 1024):
    try: os.fstat(fd)
    except OSError: continue
    raise SystemExit(fd)
assert not [m for m in sys.modules if "nanochat" in m or m == "jail"]
assert sorted(name for name in vars(sys.modules["__main__"]) if name[:2] != "__") == ["fd", "os", "sys"]
"""
    result = run(program, layers)
    os.close(descriptor)
    assert result.passed, result.error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("layers", [*SEPARATE, ((), "limits")], ids=lambda layers: layers[1].replace(" ", "-"))
def test_it_needs_no_root(layers, tmp_path_factory):
    """The same as an ordinary user, whom limits alone hold too."""
    if not shutil.which("setpriv") or not os.path.exists("/usr/bin/python3"):
        pytest.skip("no setpriv, or no Python that another user may run")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, 12345, 12345)
        jail = shutil.copy(sandbox.JAIL, folder)
        victim = subprocess.Popen(["setpriv", "--reuid=12345", "--clear-groups", "sleep", "60"])
        user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
        program = f"""
import os
print(os.getuid(), os.listdir())
for attempt in (os.fork, lambda: os.kill({victim.pid}, 9)) [:{2 if layers[0] else 1}]:
    try: attempt()
    except OSError: continue
    raise SystemExit("broke out")
"""
        command = [*user, "/usr/bin/python3", "-I", "-S", jail, folder, "5", "256", ",".join(layers[0])]
        shown = subprocess.run(command, input=program.encode(), capture_output=True, cwd="/", check=False)
        protection, error, output = shown.stdout.decode().split("\0")
        assert (protection, error) == (layers[1], "")
        assert output.split()[0] == ("65534" if "namespaces" in protection else "12345")
        assert victim.poll() is None
        victim.kill()
        victim.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="limits hold everyone but root")
def test_root_is_not_left_to_limits_alone(monkeypatch):
    readable = subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", "test", "-r", os.__file__], check=False)
    if readable.returncode == 0:
        assert run_program("pass", layers=()).protection == "limits"
    else:
        with pytest.raises(OSError, match="run as another user"):
            run_program("pass", layers=())


def test_a_sandbox_that_cannot_start_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "missing.py")
    with pytest.raises(OSError, match=r"the sandbox did not start: .*missing\.py"):
        run_program("pass")


def test_a_sandbox_that_takes_too_long_to_start_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "START_SECONDS", 0)
    with pytest.raises(OSError, match="did not start within 0 s"):
        run_program("pass", timeout=0.001)
