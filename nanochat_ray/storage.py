"""Files and folders by URI: local paths, and object stores through pyarrow.fs (s3://, gs://, abfss://).

The home is NANOCHAT_RAY_HOME. Credentials, region and endpoint come from the clouds' own environment variables
(AWS_ENDPOINT_URL and so on) or from the URI's query: s3://bucket/x?endpoint_override=host:9000&scheme=http&region=r.
Schemes that pyarrow lacks (memory://, hf://) go through fsspec.

Object stores have no folders and cannot append or rename. A folder exists there while a file is under it, and a file
is seen whole or not at all. Whatever goes wrong with a store is raised as an OSError of one line with the remedy.
"""

import ctypes
import fcntl
import hashlib
import io
import json
import os
import posixpath
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

from pyarrow import fs as pafs

ATTEMPTS = 8  # of one request to S3, with growing pauses between them
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 15.0  # without a byte, after which a request is tried again
CALL_SECONDS = 180.0  # upper bound on a call with all its attempts
PIECE_BYTES = 8 * 2**20  # of one request when large files are copied
UNSENT_BYTES = 16 * PIECE_BYTES  # that an upload keeps in memory at most
TRANSFERS = 8  # requests in flight when a file is downloaded
CACHE_SHARE = 0.5  # of the disk that copies of remote files may fill, unless NANOCHAT_RAY_CACHE_GB says how much
CACHE_GRACE_SECONDS = 600.0  # a copy used so recently is kept: its path may have been handed out and not opened yet
AWS_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("AWS_REGION", "AWS_DEFAULT_REGION")

# What a store's error says, what is raised for it, and the remedy.
REMEDIES = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|Bucket '.*' not found",
        FileNotFoundError,
        "no such bucket: create it or correct the name",
    ),
    (
        r"(?i)expired|invalid_?(client)?_?token|access_?key_?id|signature|missing_auth|credentials|status 40[01]",
        PermissionError,
        "the credentials are expired or wrong: renew them, and check the region",
    ),
    (
        r"(?i)access_?denied|access denied|forbidden|status 403|permission_denied|not authorized",
        PermissionError,
        "no permission: allow these credentials to list, read, write and delete there",
    ),
    (
        r"(?i)slow_?down|service_?unavailable|internal_?failure|internal_?error|status 5\d\d|status 429",
        ConnectionError,
        "the store is overloaded or fails: run again later",
    ),
    (
        r"(?i)network_connection|curl|connect|resolve host|timed? ?out",
        ConnectionError,
        "the endpoint can't be reached: check the network and AWS_ENDPOINT_URL",
    ),
)


def home() -> str:
    """The root of everything written: NANOCHAT_RAY_HOME, by default ~/.cache/nanochat_ray."""
    return absolute(os.environ.get("NANOCHAT_RAY_HOME") or "~/.cache/nanochat_ray")


def absolute(uri: str) -> str:
    """A local path in full, as Ray's workers have another working directory; a URI without a slash at its end."""
    uri = uri.removeprefix("file://")
    if not is_remote(uri):
        return os.path.abspath(os.path.expanduser(uri))
    path, query = _split(uri)
    return path.rstrip("/") + query


def is_remote(uri: str) -> bool:
    return "://" in str(uri)


def join(uri: str, *parts: str) -> str:
    """A path or URI of something below `uri`. A URI's query stays at its end."""
    path, query = _split(uri)
    return posixpath.join(path, *parts) + query


def parent(uri: str) -> str:
    path, query = _split(uri)
    return posixpath.dirname(path.rstrip("/")) + query


def name(uri: str) -> str:
    """The last part of the path, without a URI's query."""
    return posixpath.basename(_split(uri)[0].rstrip("/"))


def _split(uri: str) -> tuple[str, str]:
    """(path, query with its question mark). Local names may hold a question mark: they have no query."""
    path, mark, query = str(uri).partition("?") if is_remote(uri) else (str(uri), "", "")
    return path, mark + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """(pyarrow filesystem, path in it), as Ray's storage_filesystem and storage_path take them.

    Raises ValueError for a query that the scheme does not know, ImportError for a scheme without its package."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(uri)
    path, query = _split(uri)
    scheme, _, path = path.partition("://")
    if scheme == "s3":
        return _s3(path.partition("/")[0], query, _aws_environment()), path.rstrip("/")
    if scheme in ("gs", "gcs", "abfs", "abfss"):
        place, _, path = path.partition("/")
        if scheme.startswith("g") and "retry_limit_seconds" not in query:
            query += f"{'&' if query else '?'}retry_limit_seconds={CALL_SECONDS / 2:.0f}"
        filesystem, container = pafs.FileSystem.from_uri(f"{scheme}://{place}{query}")
        return filesystem, posixpath.join(container, path).rstrip("/")
    import fsspec  # pyarrow's own wrapper takes the other schemes

    filesystem, path = fsspec.core.url_to_fs(str(uri))
    filesystem.invalidate_cache()
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path.rstrip("/")


class _S3(pafs.S3FileSystem):
    """S3 without folder markers. A pickled one is built anew where it is used, as pyarrow forgets the retries."""

    def create_dir(self, path, *, recursive=True) -> None:
        """Nothing: a folder exists when a file is under it. Ray makes folders before it writes into them."""

    def __reduce__(self):
        return _s3, self.made_from


@lru_cache
def _s3(bucket: str, query: str, environment: tuple, attempts: int | None = None) -> _S3:
    """One client per bucket, so that connections are used again. New credentials in the environment make a new one."""
    options = dict(parse_qsl(query.removeprefix("?")))
    if unknown := set(options) - {"region", "scheme", "endpoint_override"}:
        raise ValueError(f"s3://{bucket}{query}: unknown {', '.join(sorted(unknown))} in the query")
    environment_of = dict(environment)
    endpoint, region = (next(filter(None, map(environment_of.get, names)), None) for names in AWS_VARIABLES)
    endpoint = options.get("endpoint_override") or endpoint
    region = options.get("region") or (region or "us-east-1" if endpoint else None)
    if region is None:
        with _clear_errors(f"s3://{bucket}"):
            region = _within(CALL_SECONDS, pafs.resolve_s3_region, bucket)
    made = _S3(
        region=region,
        scheme=options.get("scheme", "https"),
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENCE_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts or ATTEMPTS),
        allow_delayed_open=True,  # small files take one request
    )
    made.made_from = bucket, query, environment
    return made


def _aws_environment() -> tuple:
    """What decides where requests go and who sends them."""
    return tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))


def _call(uri: str, function: Callable, *args):
    """function(*args), which asks the store of `uri`. Raises OSError of one line."""
    with _clear_errors(uri):
        return _within(CALL_SECONDS, function, *args) if is_remote(uri) else function(*args)


def _again(uri: str, function: Callable, *args):
    """As _call, tried ATTEMPTS times while the store fails or can't be reached, at most CALL_SECONDS long."""
    end = time.monotonic() + CALL_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _call(uri, function, *args)
        except ConnectionError:
            if attempt == ATTEMPTS or time.monotonic() > end:
                raise
            time.sleep(random.random() * min(20.0, 0.5 * 2**attempt))


def _within(seconds: float, function: Callable, *args):
    """The result of a call, or TimeoutError. A call of pyarrow can't be stopped: its thread is left behind."""
    result = Future()

    def work() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True, name="storage").start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"connection timed out: no answer in {seconds:.0f} s") from None


@contextmanager
def _clear_errors(uri: str):
    """Turn a store's error into one line: the URI, the remedy, and what the store said."""
    try:
        yield
    except OSError as error:
        if not is_remote(uri) or str(error).startswith(str(uri)):  # said already
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{uri} does not exist") from None
        said = " ".join(str(error).split())
        kind, remedy = next(((kind, r) for pattern, kind, r in REMEDIES if re.search(pattern, said)), (OSError, ""))
        said = re.sub(r"^When .*?: (?=AWS Error)|\s*\(Request ID: .*?\)", "", said)
        raise kind(f"{uri}: {remedy or 'failed'} ({said[:200]})") from None


def _info(uri: str) -> pafs.FileInfo:
    fs, path = filesystem(uri)
    return _call(uri, fs.get_file_info, path)


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
        return _call(uri, fs.handler.fs.modified, path)
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
            if tag := metadata.get("ETag"):
                return f.size(), tag.decode()
    return size(uri), str(modified(uri))


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
    if not is_remote(uri):
        return sorted(os.listdir(uri)) if os.path.isdir(uri) else []
    return sorted(info.base_name for info in _list(uri))


def _list(uri: str) -> list[pafs.FileInfo]:
    fs, path = filesystem(uri)
    return _call(uri, fs.get_file_info, pafs.FileSelector(path, allow_not_found=True))


def files(uri: str) -> list[str]:
    """Sorted names of the files in a folder, without its folders. Raises OSError when it can't be listed."""
    if not is_remote(uri):
        return [name for name in listdir(uri) if os.path.isfile(join(uri, name))]
    return sorted(info.base_name for info in _list(uri) if info.type == pafs.FileType.File)


@contextmanager
def reading(uri: str) -> Iterator[BinaryIO]:
    """A file to read from any position. Raises FileNotFoundError, and OSError when it can't be read."""
    if not is_remote(uri):
        with open(uri, "rb") as f:
            yield f
        return
    fs, path = filesystem(uri)
    if isinstance(fs, _S3):
        fs = _s3(*fs.made_from, attempts=1)
    with _again(uri, fs.open_input_file, path) as f:
        yield f if isinstance(fs, pafs.PyFileSystem) else _Reader(f, uri)


class _Reader(io.RawIOBase):
    """A remote file whose reads are tried again here.

    When a connection is cut in the middle of an answer, pyarrow's own attempts go on with a buffer that is half full,
    and fail. Only a new read has a new buffer, so pyarrow is told to try once.
    """

    def __init__(self, source, uri: str):
        self.source, self.uri, self.position = source, uri, 0

    def read_at(self, size: int, offset: int) -> bytes:
        return _again(self.uri, self.source.read_at, size, offset)

    def readinto(self, buffer) -> int:
        data = self.read_at(len(buffer), self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = self.read_at(self.size() - self.position, self.position)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size())[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self.source.size()

    def metadata(self) -> dict:
        return self.source.metadata()


def read_bytes(uri: str) -> bytes:
    """Raises FileNotFoundError, and OSError when it can't be read."""
    with reading(uri) as f:
        return f.read()


def read_text(uri: str) -> str:
    """Raises FileNotFoundError, OSError when it can't be read, and UnicodeDecodeError."""
    return read_bytes(uri).decode()


def read_json(uri: str):
    """Raises FileNotFoundError, OSError when it can't be read, and ValueError for what is no JSON."""
    return json.loads(read_text(uri))


def write_json(uri: str, value) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it. Raises OSError."""
    write_bytes(uri, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    if is_remote(uri):
        _upload(iter([data]), uri)
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
    shutil.move(str(local_file), staged)
    os.replace(staged, uri)


def _upload_file(local_file: str | Path, uri: str) -> None:
    with open(local_file, "rb") as source:
        _upload(iter(lambda: source.read(PIECE_BYTES), b""), uri)


def _upload(pieces: Iterator[bytes], uri: str) -> None:
    """Write a remote file. pyarrow sends large ones in parts, several at once, and the last call completes them.

    A stream that failed is never freed: pyarrow would complete the upload then, and half a file would be seen. The
    bucket's rule for incomplete uploads deletes its parts.
    """
    fs, path = filesystem(uri)
    sink = _call(uri, fs.open_output_stream, path)
    try:
        unsent = 0
        for piece in pieces:
            _call(uri, sink.write, piece)
            unsent += len(piece)
            if unsent >= UNSENT_BYTES:
                _call(uri, sink.flush)  # waits for the parts that are under way
                unsent = 0
        _call(uri, sink.close)
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
        raise


def remove(uri: str) -> None:
    """Delete a file, or a folder with all that is in it. Raises FileNotFoundError, or OSError if it can't be done."""
    fs, path = filesystem(uri)
    found = _info(uri).type
    if found == pafs.FileType.NotFound:
        raise FileNotFoundError(f"{uri} does not exist")
    _call(uri, fs.delete_dir if found == pafs.FileType.Directory else fs.delete_file, path)


def localize(uri: str) -> Path:
    """A local path with the file's content, to map into memory: the file itself, or a copy in this node's cache.

    The cache is bounded, see _make_room: map or open the copy soon. Raises FileNotFoundError, and OSError when the
    file can't be read or the disk is full.
    """
    if not is_remote(uri):
        return Path(uri)
    cache = Path(tempfile.gettempdir()) / "nanochat_ray_cache"
    cache.mkdir(parents=True, exist_ok=True)
    stamp = version(uri)
    copy = cache / f"{fingerprint(str(uri), stamp)}-{name(uri)}"
    partial = copy.with_name(f"{copy.name}.partial")
    if not _touch(copy):
        with open(partial, "ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # of several processes one downloads
            if not _touch(copy):
                _make_room(cache, stamp[0])
                f.truncate(0)
                _download(uri, f, stamp[0])
                os.replace(partial, copy)
    return copy


def _touch(file: Path) -> bool:
    """Note that a copy is used now. False: there is none."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


def _download(uri: str, file: BinaryIO, size: int) -> None:
    """Fetch a file by pieces, several at once where the filesystem is pyarrow's own."""
    fs, _ = filesystem(uri)
    at_once = 1 if isinstance(fs, pafs.PyFileSystem) else TRANSFERS
    with reading(uri) as source, ThreadPoolExecutor(at_once) as pool, open(file.name, "r+b") as target:

        def fetch(offset: int) -> int:
            return os.pwrite(target.fileno(), source.read_at(PIECE_BYTES, offset), offset)

        arrived = sum(pool.map(fetch, range(0, size, PIECE_BYTES)))
    if arrived != size:
        raise OSError(f"{uri}: {arrived:,} bytes arrived of {size:,}: run again")


def _make_room(cache: Path, needed: int) -> None:
    """Delete the least recently used copies until `needed` bytes fit below the limit.

    Files that a process has mapped or that were asked for a moment ago stay, so the limit may be passed by those.
    """
    gigabytes = os.environ.get("NANOCHAT_RAY_CACHE_GB")
    limit = float(gigabytes) * 2**30 if gigabytes else CACHE_SHARE * shutil.disk_usage(cache).total
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = {}
        for file in cache.iterdir():
            with suppress(FileNotFoundError):
                files[file] = file.stat()
        used = sum(stat.st_size for stat in files.values())
        if used + needed <= limit:
            return
        mapped, recent = _mapped_files(cache), time.time() - CACHE_GRACE_SECONDS
        for file in sorted(files, key=lambda file: files[file].st_mtime):
            if used + needed > limit and file.name not in mapped and files[file].st_mtime < recent:
                file.unlink()
                used -= files[file].st_size


def _mapped_files(cache: Path) -> set[str]:
    """Names in the cache that a process of this machine has mapped. Empty where there is no /proc."""
    names = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process ended, or is another user's
            names.update(re.findall(rf"{re.escape(str(cache))}/(\S+)", maps.read_text()))
    return names


def fingerprint(*parts) -> str:
    """16 hex digits of a sha256 over the parts' JSON: the same inputs give the same name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
