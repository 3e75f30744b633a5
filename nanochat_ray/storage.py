"""Files and folders by URI: local paths, and object stores through pyarrow.fs (s3://, gs://, abfss://).

The home is NANOCHAT_RAY_HOME. Credentials, region and endpoint come from the clouds' own environment variables
(AWS_ENDPOINT_URL and so on) or from the URI's query: s3://bucket/x?endpoint_override=host:9000&scheme=http&region=r.
Schemes that pyarrow lacks (memory://, hf://) go through fsspec.

Object stores have no folders and cannot append or rename. A folder exists there while a file is under it, and a file
is seen whole or not at all. Whatever goes wrong with a store is raised as an OSError of one line with the remedy.
"""

import hashlib
import json
import math
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs as pafs

from nanochat_ray.object_store import PIECE_BYTES, call, filesystem, is_remote, open_file, split_query, upload


def home() -> str:
    """The root of everything written: NANOCHAT_RAY_HOME, by default ~/.cache/nanochat_ray."""
    return absolute(os.environ.get("NANOCHAT_RAY_HOME") or "~/.cache/nanochat_ray")


def absolute(uri: str) -> str:
    """A local path in full, as Ray's workers have another working directory; a URI without a slash at its end."""
    uri = uri.removeprefix("file://")
    if not is_remote(uri):
        return os.path.abspath(os.path.expanduser(uri))
    path, query = split_query(uri)
    return path.rstrip("/") + query


def join(uri: str, *parts: str) -> str:
    """A path or URI of something below `uri`. A URI's query stays at its end."""
    path, query = split_query(uri)
    return posixpath.join(path, *parts) + query


def parent(uri: str) -> str:
    path, query = split_query(uri)
    return posixpath.dirname(path.rstrip("/")) + query


def name(uri: str) -> str:
    """The last part of the path, without a URI's query."""
    return posixpath.basename(split_query(uri)[0].rstrip("/"))


def _info(uri: str) -> pafs.FileInfo:
    fs, path = filesystem(uri)
    return call(uri, fs.get_file_info, path if is_remote(uri) else os.fsencode(path))  # a name may be no UTF-8


def exists(uri: str) -> bool:
    """Whether there is a file or a folder. On an object store a folder exists while something is in it."""
    found = _info(uri).type
    if found == pafs.FileType.Directory and is_remote(uri):
        return bool(listdir(uri))  # pyarrow leaves an empty marker of a folder when it deletes what was in it
    return found != pafs.FileType.NotFound


def is_folder(uri: str) -> bool:
    return _info(uri).type == pafs.FileType.Directory


def modified(uri: str) -> datetime:
    """When a file was written, in UTC. Raises FileNotFoundError."""
    info = _info(uri)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(f"{uri} does not exist")
    if info.mtime is not None:
        return info.mtime
    fs, path = filesystem(uri)  # a HEAD request of S3 has the time in its headers, and fsspec under many names
    if isinstance(fs, pafs.PyFileSystem):
        return call(uri, fs.handler.fs.modified, path)
    with reading(uri) as f:
        return datetime.strptime(f.metadata()["Last-Modified"].decode(), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    info = _info(uri)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(f"{uri} does not exist")
    return info.size


def version(uri: str) -> tuple[int, str]:
    """Size, and an object store's tag of the content or else the time of writing. Raises FileNotFoundError."""
    if is_remote(uri):
        with reading(uri) as f:
            metadata = f.metadata() or {}
            if tag := metadata.get("ETag") or metadata.get("generation"):  # of Google
                return f.size(), tag.decode()
    try:
        return size(uri), str(modified(uri))
    except NotImplementedError:  # a web server says what it says
        fs, path = filesystem(uri)
        return size(uri), fingerprint(call(uri, fs.handler.fs.info, path))


def free_bytes(uri: str) -> int | None:
    """Room on the disk of a folder that need not be there yet; None for an object store."""
    return None if is_remote(uri) else shutil.disk_usage(_mount(uri)).free


def _mount(path: str) -> Path:
    mount = Path(path)
    while not mount.is_mount():
        mount = mount.parent
    return mount


def disk(uri: str) -> str:
    """Where a folder is mounted and how full that is, for a message."""
    if is_remote(uri):
        return uri
    mount = _mount(uri)
    usage = shutil.disk_usage(mount)
    return f"{mount}: {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MB free"


def listdir(uri: str) -> list[str]:
    """Sorted names in a folder; empty when there is no such folder. Never a cached listing."""
    if not is_remote(uri):
        return sorted(os.listdir(uri)) if os.path.isdir(uri) else []
    return sorted(info.base_name for info in _list(uri))


def _list(uri: str) -> list[pafs.FileInfo]:
    fs, path = filesystem(uri)
    return call(uri, fs.get_file_info, pafs.FileSelector(path, allow_not_found=True))


def walk(uri: str) -> list[tuple[str, int]]:
    """(path below the folder, bytes) of all files below it, sorted; −1 bytes for a link to nothing.

    Links to folders are followed, into each folder once. Raises OSError when a folder can't be listed."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        below = call(uri, fs.get_file_info, pafs.FileSelector(path, recursive=True))
        start = len(path.rstrip("/")) + 1
        return sorted((info.path[start:], info.size or 0) for info in below if info.type == pafs.FileType.File)
    found, seen = [], set()

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(uri, followlinks=True, onerror=fail):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isfile(path):
                found.append((os.path.relpath(path, uri), os.path.getsize(path)))
            elif not os.path.lexists(os.path.realpath(path)):
                found.append((os.path.relpath(path, uri), -1))
    return sorted(found)


def real(uri: str) -> str:
    """The path without links; a URI is itself."""
    return uri if is_remote(uri) else os.path.realpath(uri)


@contextmanager
def reading(uri: str) -> Iterator[BinaryIO]:
    """A file to read from any position. Raises FileNotFoundError, and OSError when it can't be read."""
    if not is_remote(uri):
        with open(uri, "rb") as f:
            yield f
        return
    with open_file(uri) as f:
        yield f


def read_bytes(uri: str) -> bytes:
    """Raises FileNotFoundError, and OSError when it can't be read."""
    with reading(uri) as f:
        return f.read()


def read_text(uri: str) -> str:
    """Raises FileNotFoundError, OSError when it can't be read, and UnicodeDecodeError."""
    return read_bytes(uri).decode("utf-8-sig")  # a byte order mark is no text


def read_json(uri: str):
    """Raises FileNotFoundError, OSError when it can't be read, and ValueError for what is no JSON."""
    return json.loads(read_text(uri))


def write_json(uri: str, value) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it. Raises OSError."""
    write_bytes(uri, (to_json(value, indent=2) + "\n").encode())


def to_json(value, **options) -> str:
    """JSON that every reader takes: null for NaN and Infinity, which JSON has no words for."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    if is_remote(uri):
        upload(iter([data]), uri)
        return
    with writing(uri) as f:
        f.write(data)


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """A file to write, which is at `uri` when the block ends well, and gone when it does not. OSErrors name it.

    A remote file is uploaded from a temporary one when the block has ended well, so that an error in the block leaves
    nothing: pyarrow can't abort an upload (apache/arrow#40502).
    """
    folder = None if is_remote(uri) else os.path.dirname(uri)
    if folder:
        os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as f:
            yield f
            f.flush()
            if not is_remote(uri):
                os.fsync(f.fileno())  # some disks say only now that they are full
        if is_remote(uri):
            _upload_file(temporary, uri)
        else:
            os.chmod(temporary, 0o644)
            os.replace(temporary, uri)
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, uri) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def publish(local_file: str | Path, uri: str) -> None:
    """Move a finished local file to its final place, whole or not at all. Raises OSError."""
    if is_remote(uri):
        _upload_file(local_file, uri)
        os.unlink(local_file)
        return
    os.makedirs(os.path.dirname(uri), exist_ok=True)
    staged = uri + ".tmp"  # the source may be on another disk: copy beside the target, then rename
    try:
        shutil.move(str(local_file), staged)
        os.replace(staged, uri)
    except OSError:  # half a copy would keep a full disk full
        if os.path.exists(local_file):
            Path(staged).unlink(missing_ok=True)
        raise


def _upload_file(local_file: str | Path, uri: str) -> None:
    with open(local_file, "rb") as source:
        upload(iter(lambda: source.read(PIECE_BYTES), b""), uri)


def remove(uri: str) -> None:
    """Delete a file, or a folder with all that is in it. Raises FileNotFoundError, or OSError if it can't be done."""
    fs, path = filesystem(uri)
    found = _info(uri).type
    if found == pafs.FileType.NotFound:
        raise FileNotFoundError(f"{uri} does not exist")
    call(uri, fs.delete_dir if found == pafs.FileType.Directory else fs.delete_file, path)


def fingerprint(*parts) -> str:
    """16 hex digits of a sha256 over the parts' JSON: the same inputs give the same name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
