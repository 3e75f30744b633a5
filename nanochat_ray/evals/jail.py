"""The process that sandbox.py starts: reads a program from stdin, runs it in isolation, writes the outcome to stdout.

Usage: `python -I -S jail.py FOLDER TIMEOUT MEMORY_MB LAYERS`. This process forks a child, which drops its privileges
and then runs the program. The parent is out of the program's reach. It reads the child's output and kills it at the
deadline. Only light modules of the standard library are imported, because most of the time of a run is its start.
"""

import ctypes
import os
import resource
import select
import sys
import time
from types import ModuleType

NOBODY = 65534
MAX_SCRATCH_BYTES = 16 * 2**20  # bytes of the program's files
MAX_OUTPUT_BYTES = 64 * 2**10  # bytes of output to keep; the rest is dropped
MAX_STATUS_BYTES = 4 * 2**10
SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix)  # Python needs them to run

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_ATTR_READ_ONLY_NOSUID_NODEV, AT_FDCWD, AT_RECURSIVE = 1 | 2 | 4, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
LANDLOCK_READ_FILE, LANDLOCK_READ = 0b0101, 0b1101  # execute and read files; the second also lists folders
SIGKILL = 9

# Denied system calls: their numbers on x86_64 and aarch64.
DENIED = {
    # the network
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # new processes and programs
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    # effects on other processes
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "get_robust_list": (274, 100),
    "setpgid": (109, 154),
    "timer_create": (222, 107),
    "personality": (135, 92),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # owners, modes and times of files, because landlock does not restrict them
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # watching the file accesses of other processes, and locks that they wait for
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "flock": (73, 32),
    # memory that RLIMIT_AS does not count, and the shared memory, queues and semaphores of others
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    # kernel interfaces with a large attack surface
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "syslog": (103, 116),
}
# System calls with many commands: (numbers, index of the argument with the command, allowed commands). Other commands
# can make the kernel signal another process, or lock a file that it uses.
ALLOWED_COMMANDS = {
    "fcntl": ((72, 25), 1, {"F_DUPFD": 0, "F_GETFD": 1, "F_SETFD": 2, "F_GETFL": 3, "F_DUPFD_CLOEXEC": 1030}),
    "ioctl": (
        (16, 29),
        1,
        {"TCGETS": 0x5401, "TIOCGWINSZ": 0x5413, "FIONREAD": 0x541B, "FIONBIO": 0x5421, "FIONCLEX": 0x5450}
        | {"FIOCLEX": 0x5451, "TCGETS2": 0x802C542A},
    ),
    "prctl": ((157, 167), 0, {"PR_SET_NAME": 15, "PR_GET_NAME": 16}),
}
F_SETFL, O_ASYNC = 4, 0x2000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    folder, timeout, memory_mb = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    layers = sys.argv[4].split(",") if sys.platform == "linux" else []
    code = sys.stdin.buffer.read()
    protection = []
    if "namespaces" in layers and attempt(enter_namespaces, folder):
        protection.append("namespaces")
    token = os.urandom(16).hex().encode()
    output, stdout = os.pipe()
    status, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        confine(folder, timeout, memory_mb, layers, protection, stdout, report)
        run(code, token)
    os.close(stdout)
    os.close(report)
    ready = os.read(status, MAX_STATUS_BYTES)  # wait until the child is confined: the timeout begins here
    printed, reported, ended = watch(pid, output, status, time.monotonic() + timeout)
    names, _, verdict = (ready + reported).partition(b"\n")
    if verdict == token:
        error = b""
    elif ended is None:
        error = b"timed out after %g s" % timeout
    elif os.WIFSIGNALED(ended):
        error = b"killed by signal %d" % os.WTERMSIG(ended)
    else:
        error = verdict or b"exited with code %d before its end" % os.WEXITSTATUS(ended)
    sys.stdout.buffer.write(b"\0".join([names, error.replace(b"\0", b" "), printed]))


def attempt(function, *args) -> bool:
    """Call function(*args). Return False if the system refuses it."""
    try:
        function(*args)
    except (OSError, ValueError, AttributeError):  # refused, or not Linux
        return False
    return True


def call(function: str, *args) -> int:
    """Call a function of libc and return its result. Raises OSError if it is -1."""
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    if (result := getattr(libc, function)(*args)) == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def enter_namespaces(folder: str) -> None:
    """Enter new namespaces of processes, network, IPC, host name and mounts; without root's rights also of users.

    Mount a file system in `folder` that has the system folders, read-only, and an empty /tmp."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    try:
        call("unshare", spaces)
    except PermissionError:
        call("unshare", spaces | CLONE_NEWUSER)
        for file, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as f:
                f.write(line)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    mount_tmpfs(folder, 2**20, "mode=755")
    os.mkdir(f"{folder}/tmp")
    for path in filter(os.path.exists, SYSTEM_PATHS):
        inside = folder + path
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            open(inside, "w").close()
        call("mount", path.encode(), inside.encode(), None, MS_BIND | MS_REC, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_READ_ONLY_NOSUID_NODEV)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, folder.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    mount_tmpfs(f"{folder}/tmp", MAX_SCRATCH_BYTES, f"nr_inodes=1024,mode=700,uid={NOBODY},gid={NOBODY}")


def mount_tmpfs(folder: str, size: int, options: str) -> None:
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, f"size={size},{options}".encode())


def confine(folder: str, timeout: float, memory_mb: int, layers, protection: list[str], stdout: int, report: int):
    """Drop everything that the program does not need, and write the names of the layers in effect to `report`."""
    os.setsid()  # leave the process group: kill(0) would reach its other members, even in another namespace
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stdout, 2)
    os.dup2(report, 3)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if "namespaces" in protection:
        os.chroot(folder)  # also forbids new user namespaces
        folder = "/tmp"
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    attempt(become_nobody, folder)
    attempt(call, "capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # no capabilities
    attempt(call, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    attempt(call, "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # after the change of user, which would reset it
    if "namespaces" not in protection and "landlock" in layers and attempt(restrict_files, folder):
        protection.append("landlock")
    limits = {
        "AS": memory_mb * 2**20,
        "CPU": int(timeout) + 1,
        "FSIZE": MAX_SCRATCH_BYTES,
        "NOFILE": 64,
        "NPROC": 0,  # no other process or thread, so that the memory limit covers everything
        "CORE": 0,
    }
    for name, limit in limits.items():
        attempt(resource.setrlimit, getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if "seccomp" in layers and attempt(deny_system_calls):
        protection.append("seccomp")
    if os.geteuid() == 0 and "seccomp" not in protection:
        raise OSError("the process limit does not apply to root, and this kernel has no seccomp: run as another user")
    os.write(3, " ".join([*protection, "limits"]).encode() + b"\n")


def become_nobody(folder: str) -> None:
    """As root, change to the user nobody, who owns only the folder, if that user can read Python's library."""
    if os.geteuid() != 0:
        return
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    if readable:
        os.chown(folder, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def restrict_files(folder: str) -> None:
    """Apply Landlock (docs.kernel.org/userspace-api/landlock.html): read what Python needs, write only in folder."""
    version = call("syscall", SYS_LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)
    rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # rights on files; each version added some
    tcp, scopes = [0b11] * (version >= 4), [0b11] * (version >= 6)  # TCP; abstract sockets and signals to outside
    handled = (ctypes.c_uint64 * (1 + len(tcp + scopes)))(rights, *tcp, *scopes)
    ruleset = call("syscall", SYS_LANDLOCK_CREATE, handled, ctypes.sizeof(handled), 0)
    for path in filter(os.path.exists, (*SYSTEM_PATHS, folder)):
        allowed = rights if path == folder else LANDLOCK_READ if os.path.isdir(path) else LANDLOCK_READ_FILE
        parent = os.open(path, os.O_PATH)
        beneath = allowed.to_bytes(8, sys.byteorder) + parent.to_bytes(4, sys.byteorder)  # a packed struct
        call("syscall", SYS_LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, beneath, 0)
        os.close(parent)
    call("syscall", SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def deny_system_calls() -> None:
    """Install a seccomp filter. DENIED calls, and commands that are not in ALLOWED_COMMANDS, fail with EPERM.

    A call of another architecture kills the process."""
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        raise OSError(f"no system call numbers for {machine}")
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06  # opcodes of classic BPF on 32-bit words
    kill_process, fail_with_eperm, allow = 0x80000000, 0x00050001, 0x7FFF0000
    column = list(AUDIT_ARCH).index(machine)
    program: list[tuple] = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (result, 0, 0, kill_process)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (result, 0, 0, fail_with_eperm)]  # the x32 calls
    for numbers in DENIED.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column]), (result, 0, 0, fail_with_eperm)]
    for numbers, argument, commands in ALLOWED_COMMANDS.values():
        block = [(load, 0, 0, 16 + 8 * argument)]  # the lower half of 64 bits
        for command in commands.values():
            block += [(equal, 0, 1, command), (result, 0, 0, allow)]
        if numbers == ALLOWED_COMMANDS["fcntl"][0]:  # set a file's flags, except O_ASYNC, which requests signals
            block += [(equal, 0, 3, F_SETFL), (load, 0, 0, 32), (any_bit, 1, 0, O_ASYNC), (result, 0, 0, allow)]
        block.append((result, 0, 0, fail_with_eperm))
        program += [(equal, 0, len(block), numbers[column]), *block]
    program.append((result, 0, 0, allow))
    instructions = b"".join(
        op.to_bytes(2, sys.byteorder) + bytes([if_true, if_false]) + k.to_bytes(4, sys.byteorder)
        for op, if_true, if_false, k in program
    )
    filters = ctypes.create_string_buffer(instructions)
    length_and_pointer = (ctypes.c_uint64 * 2)(len(program), ctypes.addressof(filters))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, length_and_pointer, 0, 0)


def run(code: bytes, token: bytes):
    """Run the program as a module named "program". Code for __main__, such as a demo, does not run.

    Only a program that runs to its end writes the token. It cannot see the names in this file."""
    module = sys.modules["program"] = sys.modules["__main__"] = ModuleType("program")
    try:
        exec(compile(code, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"[:MAX_STATUS_BYTES]
        attempt(lambda: sys.stdout.flush())
        os.write(3, verdict.encode(errors="replace"))
        os._exit(1)
    attempt(lambda: sys.stdout.flush())  # the program may have closed or replaced it
    os.write(3, token)
    os._exit(0)


def watch(pid: int, output: int, status: int, deadline: float) -> tuple[bytes, bytes, int | None]:
    """Read the child's output and status until it ends. Kill it at the deadline.

    Returns the output, the status, and the wait status, which is None if the child was killed here."""
    kept = {output: b"", status: b""}
    limits = {output: MAX_OUTPUT_BYTES, status: MAX_STATUS_BYTES}
    open_pipes, ended = {output, status}, None
    while ended is None and (left := deadline - time.monotonic()) > 0:
        if not open_pipes:  # the child has ended, or has closed its files and goes on
            time.sleep(min(left, 0.001))
        for pipe in select.select(open_pipes, [], [], left)[0] if open_pipes else []:
            data = os.read(pipe, 2**16)
            kept[pipe] = (kept[pipe] + data)[: limits[pipe]]
            if not data:
                open_pipes.remove(pipe)
        if not open_pipes:
            done, wait_status = os.waitpid(pid, os.WNOHANG)
            ended = wait_status if done else None
    if ended is None:
        os.kill(pid, SIGKILL)  # with the first process of a namespace, all others are killed
        os.waitpid(pid, 0)
    return kept[output], kept[status], ended


if __name__ == "__main__":
    main()
