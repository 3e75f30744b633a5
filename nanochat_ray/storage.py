"""Where things are kept: NANOCHAT_RAY_HOME, a local folder or any fsspec URI (s3://bucket/x, gs://…)."""

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import fsspec


def home() -> str:
    """The root of everything written: NANOCHAT_RAY_HOME, by default ~/.cache/nanochat_ray."""
    return absolute(os.environ.get("NANOCHAT_RAY_HOME") or "~/.cache/nanochat_ray")


def absolute(uri: str) -> str:
    """A local path in full, as Ray's workers have another working directory; a URI as it is."""
    uri = uri.removeprefix("file://")
    return uri if is_remote(uri) else os.path.abspath(os.path.expanduser(uri))


def is_remote(uri: str) -> bool:
    return "://" in str(uri)


def join(uri: str, *parts: str) -> str:
    return posixpath.join(str(uri), *parts)


def exists(uri: str) -> bool:
    fs, path = fsspec.core.url_to_fs(str(uri))
    return fs.exists(path)


def modified(uri: str) -> datetime:
    fs, path = fsspec.core.url_to_fs(str(uri))
    return fs.modified(path)


def size(uri: str) -> int:
    fs, path = fsspec.core.url_to_fs(str(uri))
    return fs.size(path)


def disk(uri: str) -> str:
    """Where a folder is mounted and how full that is, for a message."""
    if is_remote(uri):
        return uri
    mount = Path(uri)
    while not mount.is_mount():
        mount = mount.parent
    usage = shutil.disk_usage(mount)
    return f"{mount}: {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MB free"


def listdir(uri: str) -> list[str]:
    """Sorted names in a folder; empty when there is no such folder. Never a cached listing."""
    fs, path = fsspec.core.url_to_fs(str(uri))
    fs.invalidate_cache()
    return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False)) if fs.isdir(path) else []


def read_text(uri: str) -> str:
    with fsspec.open(str(uri), "r", encoding="utf-8") as f:
        return f.read()


def read_json(uri: str):
    return json.loads(read_text(uri))


def write_json(uri: str, value) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    if is_remote(uri):  # object stores put whole objects
        fs, path = fsspec.core.url_to_fs(str(uri))
        fs.pipe_file(path, data)
        return
    with writing(uri) as f:
        f.write(data)


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """A file to write, which is at `uri` when the block ends well, and gone when it does not. OSErrors name it."""
    fs, path = fsspec.core.url_to_fs(str(uri))
    folder = None if is_remote(uri) else os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # some disks say only now that they are full
        if is_remote(uri):
            fs.put_file(temporary, path)
        else:
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def publish(local_file: str | Path, uri: str) -> None:
    """Move a finished local file to its final place, whole or not at all."""
    fs, path = fsspec.core.url_to_fs(str(uri))
    if is_remote(uri):
        fs.put_file(str(local_file), path)
        os.unlink(local_file)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    staged = path + ".tmp"  # the source may be on another disk: copy beside the target, then rename
    shutil.move(str(local_file), staged)
    os.replace(staged, path)


def remove(uri: str) -> None:
    """Delete a file or a folder with all that is in it."""
    fs, path = fsspec.core.url_to_fs(str(uri))
    fs.rm(path, recursive=True)


def localize(uri: str) -> Path:
    """A local path with the file's content, to map into memory: the file itself, or a copy in this node's cache."""
    fs, path = fsspec.core.url_to_fs(str(uri))
    if not is_remote(uri):
        return Path(path)
    cache = Path(tempfile.gettempdir()) / "nanochat_ray_cache"
    copy = cache / (fingerprint(str(uri), str(fs.checksum(path))) + "-" + posixpath.basename(path))
    if not copy.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
        fs.get_file(path, str(partial))
        os.replace(partial, copy)
    return copy


def fingerprint(*parts) -> str:
    """16 hex digits of a sha256 over the parts' JSON: the same inputs give the same name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
