"""The object stores that hold files: pyarrow's filesystems, requests that are tried again, errors of one line.

storage.py is how the rest of the code reads and writes; this is what it needs for URIs like s3://bucket/path.
"""

import ctypes
import io
import os
import posixpath
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from typing import BinaryIO
from urllib.parse import parse_qsl

from pyarrow import fs as pafs

ATTEMPTS = 8  # of one request to S3, with growing pauses between them
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 15.0  # without a byte, after which a request is tried again
CALL_SECONDS = 180.0  # upper bound on a call with all its attempts
PIECE_BYTES = 8 * 2**20  # of one request when large files are copied
UNSENT_BYTES = 16 * PIECE_BYTES  # an upload keeps at most this much in memory
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


def is_remote(uri: str) -> bool:
    return "://" in str(uri)


def split_query(uri: str) -> tuple[str, str]:
    """(path, query with its question mark). Local names may hold a question mark: they have no query."""
    path, mark, query = str(uri).partition("?") if is_remote(uri) else (str(uri), "", "")
    return path, mark + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """(pyarrow filesystem, path in it), as Ray's storage_filesystem and storage_path take them.

    Raises ValueError for a query that the scheme does not know, ImportError for a scheme without its package."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(uri)
    path, query = split_query(uri)
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


class S3(pafs.S3FileSystem):
    """S3 without folder markers. A pickled one is built anew where it is used, as pyarrow forgets the retries."""

    def create_dir(self, path, *, recursive=True) -> None:
        """Nothing: a folder exists when a file is under it. Ray makes folders before it writes into them."""

    def __reduce__(self):
        return _s3, self.made_from


@lru_cache
def _s3(bucket: str, query: str, environment: tuple, attempts: int | None = None) -> S3:
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
    made = S3(
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


def call(uri: str, function: Callable, *args):
    """function(*args), which asks the store of `uri`. Raises OSError of one line."""
    with _clear_errors(uri):
        return _within(CALL_SECONDS, function, *args) if is_remote(uri) else function(*args)


def call_again(uri: str, function: Callable, *args):
    """As call, tried ATTEMPTS times while the store fails or can't be reached, at most CALL_SECONDS long."""
    end = time.monotonic() + CALL_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call(uri, function, *args)
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


def open_file(uri: str) -> BinaryIO:
    """A remote file to read from any position. Raises FileNotFoundError, and OSError when it can't be read."""
    fs, path = filesystem(uri)
    if isinstance(fs, S3):
        fs = _s3(*fs.made_from, attempts=1)
    source = call_again(uri, fs.open_input_file, path)
    return source if isinstance(fs, pafs.PyFileSystem) else RemoteFile(source, uri)


class RemoteFile(io.RawIOBase):
    """A remote file whose reads are tried again here.

    When a connection is cut in the middle of an answer, pyarrow's own attempts go on with a buffer that is half full,
    and fail. Only a new read has a new buffer, so pyarrow is told to try once.
    """

    def __init__(self, source, uri: str):
        self.source, self.uri, self.position = source, uri, 0

    def read_at(self, size: int, offset: int) -> bytes:
        return call_again(self.uri, self.source.read_at, size, offset)

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

    def close(self) -> None:
        self.source.close()
        super().close()

    def size(self) -> int:
        return self.source.size()

    def metadata(self) -> dict:
        return self.source.metadata()


def upload(pieces: Iterator[bytes], uri: str) -> None:
    """Write a remote file. pyarrow sends large ones in parts, several at once, and the last call completes them.

    A stream that failed is never freed: pyarrow would complete the upload then, and half a file would be seen. The
    bucket's rule for incomplete uploads deletes its parts.
    """
    fs, path = filesystem(uri)
    sink = call(uri, fs.open_output_stream, path)
    try:
        unsent = 0
        for piece in pieces:
            call(uri, sink.write, piece)
            unsent += len(piece)
            if unsent >= UNSENT_BYTES:
                call(uri, sink.flush)  # waits for the parts that are under way
                unsent = 0
        call(uri, sink.close)
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
        raise
