"""Files and folders by URI: local paths, and object stores through pyarrow.fs (s3://, gs://, abfss://).

The home is NANOCHAT_RAY_HOME. Credentials, region and endpoint come from the clouds' own environment variables
(AWS_ENDPOINT_URL and so on) or from the URI's query: s3://bucket/x?endpoint_override=host:9000&scheme=http&region=r.
Schemes that pyarrow lacks (memory://, hf://) go through fsspec.

Object stores have no folders and cannot append or rename. A folder exists there while a file is under it, and readers
never see half a file. Every error of a store is raised as an OSError with one line and the remedy.
"""

import hashlib
import json
import math
import os
import posixpath
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs as pafs

from nanochat_ray.object_store import PIECE_BYTES, call, filesystem, is_remote, open_file, split_query, upload


def home() -> str:
    """The folder for all output: NANOCHAT_RAY_HOME, by default ~/.cache/nanochat_ray."""
    return absolute(os.environ.get("NANOCHAT_RAY_HOME") or "~/.cache/nanochat_ray")


def absolute(uri: str) -> str:
    """The absolute local path, because Ray's workers have another working directory. A URI without its last slash."""
    uri = uri.removeprefix("file://")
    if not is_remote(uri):
        return os.path.abspath(os.path.expanduser(uri))
    path, query = split_query(uri)
    return path.rstrip("/") + query


def join(uri: str, *parts: str) -> str:
    """The path or URI of something below `uri`. A URI's query stays at the end."""
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
    return call(uri, fs.get_file_info, path if is_remote(uri) else os.fsencode(path))  # a name may not be UTF-8


def exists(uri: str) -> bool:
    """Whether a file or folder exists. On an object store, a folder exists while something is in it."""
    found = _info(uri).type
    if found == pafs.FileType.Directory and is_remote(uri):
        return bool(listdir(uri))  # pyarrow leaves an empty marker when it deletes the content of a folder
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
    fs, path = filesystem(uri)  # for S3 the time is in a header; fsspec has a method for its many names
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
    """(bytes, an object store's tag of the content, or else the time of writing). Raises FileNotFoundError."""
    if is_remote(uri):
        with reading(uri) as f:
            metadata = f.metadata() or {}
            if tag := metadata.get("ETag") or metadata.get("generation"):  # Google names a generation
                return f.size(), tag.decode()
    try:
        return size(uri), str(modified(uri))
    except NotImplementedError:  # a web server without modification times: use everything that it says
        fs, path = filesystem(uri)
        return size(uri), fingerprint(call(uri, fs.handler.fs.info, path))


def free_bytes(uri: str) -> int | None:
    """Free bytes on the disk of a folder, which may not exist yet. None for an object store."""
    return None if is_remote(uri) else shutil.disk_usage(_mount(uri)).free


def _mount(path: str) -> Path:
    mount = Path(path)
    while not mount.is_mount():
        mount = mount.parent
    return mount


def disk(uri: str) -> str:
    """The mount point of a folder and its free space, for a message."""
    if is_remote(uri):
        return uri
    mount = _mount(uri)
    usage = shutil.disk_usage(mount)
    return f"{mount}: {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MB free"


def listdir(uri: str) -> list[str]:
    """Sorted names in a folder; empty if the folder does not exist. The listing is never cached."""
    if not is_remote(uri):
        return sorted(os.listdir(uri)) if os.path.isdir(uri) else []
    return sorted(info.base_name for info in _list(uri))


def _list(uri: str) -> list[pafs.FileInfo]:
    fs, path = filesystem(uri)
    return call(uri, fs.get_file_info, pafs.FileSelector(path, allow_not_found=True))


def walk(uri: str) -> list[tuple[str, int]]:
    """(path below the folder, bytes) of all files below it, sorted. A broken link has −1 bytes.

    Follows links to folders, but enters each folder once. Raises OSError if a folder can't be listed."""
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
    """The path with links resolved. A URI is returned as it is."""
    return uri if is_remote(uri) else os.path.realpath(uri)


@contextmanager
def reading(uri: str) -> Generator[Any]:
    """Open a file for reading, with seek: a BufferedReader, or for a remote file what open_file returns.

    Raises FileNotFoundError, and OSError if it can't be read."""
    if not is_remote(uri):
        with open(uri, "rb") as f:
            yield f
        return
    with open_file(uri) as f:
        yield f


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises FileNotFoundError, and OSError if it can't be read."""
    with reading(uri) as f:
        return f.read()


def read_text(uri: str) -> str:
    """The text of a UTF-8 file without a byte order mark. Raises UnicodeDecodeError, and what read_bytes raises."""
    return read_bytes(uri).decode("utf-8-sig")


def read_json(uri: str):
    """The value in a JSON file. Raises ValueError if it is not JSON, and what read_bytes raises."""
    return json.loads(read_text(uri))


def write_json(uri: str, value) -> None:
    """Write JSON. A reader finds the old file or the new one, never half a file. Raises OSError."""
    write_bytes(uri, (to_json(value, indent=2) + "\n").encode())


def to_json(value, **options) -> str:
    """Valid JSON, with null for NaN and Infinity, which JSON can't express."""
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
    """Write a whole file, or none if it fails. Raises OSError."""
    if is_remote(uri):
        upload(iter([data]), uri)
        return
    with writing(uri) as f:
        f.write(data)


@contextmanager
def writing(uri: str) -> Generator[BinaryIO]:
    """Open a file for writing. It appears at `uri` when the block ends, and not at all after an error.

    A remote file is uploaded from a temporary file after the block, because pyarrow can't abort an upload
    (apache/arrow#40502). OSErrors name the file.
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
                os.fsync(f.fileno())  # some disks report only now that they are full
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
    """Move a finished local file to `uri`. Readers never see half a file. Raises OSError."""
    if is_remote(uri):
        _upload_file(local_file, uri)
        os.unlink(local_file)
        return
    os.makedirs(os.path.dirname(uri), exist_ok=True)
    staged = uri + ".tmp"  # the source may be on another disk, so copy it beside the target, then rename
    try:
        shutil.move(str(local_file), staged)
        os.replace(staged, uri)
    except OSError:  # delete half a copy, which would fill the disk
        if os.path.exists(local_file):
            Path(staged).unlink(missing_ok=True)
        raise


def _upload_file(local_file: str | Path, uri: str) -> None:
    with open(local_file, "rb") as source:
        upload(iter(lambda: source.read(PIECE_BYTES), b""), uri)


def remove(uri: str) -> None:
    """Delete a file, or a folder with its content. Raises FileNotFoundError, and OSError if that fails."""
    fs, path = filesystem(uri)
    found = _info(uri).type
    if found == pafs.FileType.NotFound:
        raise FileNotFoundError(f"{uri} does not exist")
    call(uri, fs.delete_dir if found == pafs.FileType.Directory else fs.delete_file, path)


def fingerprint(*parts) -> str:
    """16 hex digits of the sha256 of the parts' JSON. Equal inputs give equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
