"""The candidates of a campaign: patches, what they may change, and what they have to pass before they are trained.

A candidate is the code that it starts from with its patch applied. It may change nanochat_ray's model/, train/ and
data/. All else is compared by hash with the code that it starts from, and so are the functions in these folders that
measure: a candidate that differs there is refused.
"""

import ast
import io
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from experiments.compare import zip_folder
from nanochat_ray import storage
from nanochat_ray.evals import sandbox

REPOSITORY = Path(__file__).resolve().parents[1]
ALLOWED = tuple(f"nanochat_ray/{folder}/" for folder in ("model", "train", "data"))
# Functions of these files measure loss, time and FLOPs. None stands for the whole file.
MEASURING = {
    "nanochat_ray/train/metrics.py": None,
    "nanochat_ray/train/loop.py": (
        "train",
        "train_step",
        "metrics_of",
        "observe",
        "attempt",
        "measure_bpb",
        "evaluate",
    ),
    "nanochat_ray/data/loader.py": ("evaluation_batches",),
}
CHECK_SECONDS = 1800.0  # for lint and tests
PROPOSER_SECONDS, PROPOSER_MB = 300.0, 1024


def unzip(code: bytes) -> dict[str, bytes]:
    """Path in the checkout -> content, of a zip that compare.archive made."""
    with zipfile.ZipFile(io.BytesIO(code)) as packed:
        return {name.removeprefix("code/"): packed.read(name) for name in packed.namelist()}


def changeable(code: bytes) -> dict[str, str]:
    """Path -> text of what a candidate may change."""
    return {path: content.decode() for path, content in unzip(code).items() if path.startswith(ALLOWED)}


def apply(code: bytes, patch: str) -> bytes:
    """The code with a patch applied. Raises ValueError for a patch that does not apply, changes nothing, or changes
    what a candidate may not."""
    with tempfile.TemporaryDirectory() as folder:
        for path, content in unzip(code).items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        # Without a repository above it, git would take paths from there. It refuses those that lead out of the folder.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        done = subprocess.run(command, input=patch, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"the patch does not apply: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
        if links := [f.relative_to(folder).as_posix() for f in Path(folder).rglob("*") if f.is_symlink()]:
            raise ValueError(f"it makes links: {', '.join(links)}")
        changed = zip_folder(Path(folder))
        outside = [f.relative_to(folder).as_posix() for f in Path(folder).rglob("*") if f.is_file()]
    check_pinned(code, changed, outside)
    return changed


def check_pinned(code: bytes, changed: bytes, files: list[str]) -> None:
    """Raises ValueError when `changed` differs from `code` in anything that a candidate may not change.

    files: all that is there after the patch, also what no zip of the code would hold."""
    before, after = pins(code), pins(changed)
    new = {path for path in files if path not in unzip(code) and not path.startswith(ALLOWED)}
    differing = sorted({key for key in before | after if before.get(key) != after.get(key)} | new)
    if differing:
        raise ValueError(f"it changes {', '.join(differing)}: a candidate may not, as the baseline's are what measures")
    if unzip(code) == unzip(changed):
        raise ValueError("it changes no code")


def pins(code: bytes) -> dict[str, str]:
    """Hashes of all that a candidate may not change: files, and functions as path:name.

    A function is hashed without its comments and its layout. Code that does not parse raises ValueError."""
    found = {}
    for path, content in unzip(code).items():
        if not path.startswith(ALLOWED) or (path in MEASURING and MEASURING[path] is None):
            found[path] = storage.fingerprint(content.hex())
        elif measuring := MEASURING.get(path):
            try:
                parsed = ast.parse(content)
            except SyntaxError as error:
                raise ValueError(f"{path} is no Python: {error}") from None
            for node in ast.walk(parsed):
                if isinstance(node, ast.FunctionDef) and node.name in measuring:
                    key = f"{path}:{node.name}"
                    found[key] = storage.fingerprint(found.get(key), ast.dump(node))
    return found


def check(code: bytes, tests: list[str]) -> None:
    """Lint, and those fast tests of this checkout, with the candidate's code. Raises ValueError with what fails."""
    with tempfile.TemporaryDirectory() as folder:
        for name in [f.name for f in REPOSITORY.iterdir() if f.name not in ("nanochat_ray", ".git")]:
            Path(folder, name).symlink_to(REPOSITORY / name)
        for path, content in unzip(code).items():
            file = Path(folder, path)
            if file.is_symlink():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        commands = [["-m", "compileall", "-q", "nanochat_ray"], ["-m", "ruff", "check", "-q", "nanochat_ray"]]
        if tests:
            fast = ["-p", "no:cacheprovider", "-m", "not slow and not cluster"]
            commands.append(["-m", "pytest", "-x", "-q", "--tb=line", *fast, *tests])
        for command in commands:
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=folder,
                    env=os.environ | {"PYTHONPATH": folder},
                    capture_output=True,
                    text=True,
                    timeout=CHECK_SECONDS,
                )
            except subprocess.TimeoutExpired:
                raise ValueError(f"{command[1]} takes more than {CHECK_SECONDS:.0f} s") from None
            if done.returncode:
                lines = (done.stdout + done.stderr).strip().splitlines()
                failed = [line for line in lines if line.startswith(("FAILED", "E  "))] or lines[-1:]
                raise ValueError(f"{command[1]} fails: {' '.join(failed[:1])}")


def propose(command: str, ledger: str, network: bool) -> str:
    """The patch that a proposer prints; it reads the ledger on stdin. Empty: it has no further idea.

    Without network it is a Python file, which runs in the sandbox. Raises ValueError when it fails.
    """
    if network:
        done = subprocess.run(
            shlex.split(command), input=ledger, capture_output=True, text=True, timeout=PROPOSER_SECONDS
        )
        if done.returncode:
            raise ValueError(f"the proposer failed: {done.stderr.strip()[-300:]}")
        return done.stdout
    if not command.endswith(".py"):
        raise ValueError("--proposer without --network takes a Python file, which runs in the sandbox")
    program = f"import io, sys\nsys.stdin = io.StringIO({ledger!r})\n{Path(command).read_text()}"
    done = sandbox.run_program(program, PROPOSER_SECONDS, PROPOSER_MB)
    if not done.passed:
        raise ValueError(f"the proposer failed: {done.error}")
    return done.output
