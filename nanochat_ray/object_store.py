"""Access to object stores: pyarrow's filesystems, retries, and errors as one line.

The rest of the code reads and writes through storage.py, which uses this module for URIs like s3://bucket/path.
"""

import ctypes
import io
import os
import posixpath
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

ATTEMPTS = 8  # per request, with growing pauses
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 15.0  # a request without a new byte for so long is retried
CALL_SECONDS = 180.0  # upper bound for a call with all its attempts
PIECE_BYTES = 8 * 2**20  # per request when large files are copied
UNSENT_BYTES = 16 * PIECE_BYTES  # an upload holds at most this much in memory
AWS_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("AWS_REGION", "AWS_DEFAULT_REGION")

# (pattern in a store's error, exception to raise, remedy)
REMEDIES = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|Bucket '.*' not found"
        r"|ContainerNotFound|NOT_FOUND.*CreateResumableUpload",
        FileNotFoundError,
        "no such bucket: create it or correct the name",
    ),
    (
        r"(?i)expired|invalid_?(client)?_?token|access_?key_?id|signature|missing_auth|credential|status 40[01]"
        r"|authenticat",
        PermissionError,
        "the credentials are missing, expired or wrong: renew them, and check the region",
    ),
    (
        r"(?i)access_?denied|access denied|forbidden|status 403|permission_?(denied|mismatch)|not authorized",
        PermissionError,
        "no permission: allow these credentials to list, read, write and delete there",
    ),
    (
        r"(?i)slow_?down|service_?unavailable|internal_?failure|internal_?error"
        r"|(status|code)[ =:]+(5\d\d|429)|\] 50[03]",
        ConnectionError,
        "the store is overloaded or broken: run again later",
    ),
    (
        r"(?i)network_connection|curl|connect|resolve host|timed? ?out",
        ConnectionError,
        "the endpoint can't be reached: check the network, and the endpoint in the environment or URI",
    ),
)


def is_remote(uri: str) -> bool:
    return "://" in str(uri)


def split_query(uri: str) -> tuple[str, str]:
    """(path, query with its question mark). A local path has no query, because names may hold a question mark."""
    path, mark, query = str(uri).partition("?") if is_remote(uri) else (str(uri), "", "")
    return path, mark + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """(pyarrow filesystem, path in it), for example for Ray's storage_filesystem and storage_path.

    Raises ValueError for an unknown option in the query, and ImportError if the scheme's package is missing."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(uri)
    path, query = split_query(uri)
    scheme, _, path = path.partition("://")
    if scheme in STORES:
        place, _, path = path.partition("/")
        store = _store(scheme, place, query, _environment())
        return store, posixpath.join(store.bucket, path).rstrip("/")
    import fsspec  # other schemes go through pyarrow's wrapper of fsspec

    filesystem, path = fsspec.core.url_to_fs(str(uri))
    filesystem.invalidate_cache()
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path.rstrip("/")


class _Store:
    """A store without folder markers. Unpickling builds a new one, because pyarrow's pickles lose the retries."""

    made_from: tuple  # the arguments of _store()

    def create_dir(self, path, *, recursive=True) -> None:
        """Do nothing, because folders exist implicitly. Ray calls this before it writes."""

    def __reduce__(self):
        return _store, self.made_from


class S3(_Store, pafs.S3FileSystem):
    pass


class GCS(_Store, pafs.GcsFileSystem):
    def get_file_info(self, selector):
        """Include folders. pyarrow lists only folders with a marker, so this lists everything below instead."""
        if not isinstance(selector, pafs.FileSelector) or selector.recursive:
            return super().get_file_info(selector)
        folder = selector.base_dir.rstrip("/") + "/"
        below = pafs.FileSelector(folder, allow_not_found=selector.allow_not_found, recursive=True)
        found = {}
        for info in super().get_file_info(below):
            name, _, rest = info.path.removeprefix(folder).partition("/")
            found[name] = pafs.FileInfo(folder + name, pafs.FileType.Directory) if rest else info
        return list(found.values())

    def delete_dir(self, path) -> None:
        """Delete the content. pyarrow's own method fails if the folder has no marker."""
        self.delete_dir_contents(path, missing_dir_ok=True)


class Azure(_Store, pafs.AzureFileSystem):
    """Azure shows files while they are written, so `upload` writes to a temporary name and copies the whole file."""


@lru_cache
def _store(scheme: str, place: str, query: str, environment: tuple, attempts: int | None = None) -> pafs.FileSystem:
    """One client per bucket, so that connections are reused. New credentials in the environment give a new client."""
    made, made.bucket = STORES[scheme](scheme, place, query, dict(environment), attempts or ATTEMPTS)
    made.made_from = scheme, place, query, environment
    return made


def _s3(scheme: str, bucket: str, query: str, environment: dict[str, str], attempts: int) -> tuple[S3, str]:
    options = dict(parse_qsl(query.removeprefix("?")))
    if unknown := set(options) - {"region", "scheme", "endpoint_override"}:
        raise ValueError(f"s3://{bucket}{query}: unknown {', '.join(sorted(unknown))} in the query")
    endpoint, region = (next(filter(None, map(environment.get, names)), None) for names in AWS_VARIABLES)
    endpoint = options.get("endpoint_override") or endpoint
    region = options.get("region") or (region or "us-east-1" if endpoint else None)
    if region is None:
        with _clear_errors(f"s3://{bucket}"):
            region = _within(CALL_SECONDS, pafs.resolve_s3_region, bucket)
    store = S3(
        region=region,
        scheme=options.get("scheme", "https"),
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # small files take one request
    )
    return store, bucket


def _gcs(scheme: str, place: str, query: str, environment: dict[str, str], _) -> tuple[GCS, str]:
    bucket, options = _options(scheme, place, query)
    if emulator := environment.get("STORAGE_EMULATOR_HOST"):
        emulator = emulator.removeprefix("http://").rstrip("/")
        options |= {"endpoint_override": emulator, "scheme": "http", "anonymous": True}
    options["retry_time_limit"] = timedelta(seconds=CALL_SECONDS / 2)
    return GCS(**options), bucket


def _azure(scheme: str, place: str, query: str, environment: dict[str, str], _) -> tuple[Azure, str]:
    bucket, options = _options(scheme, place, query)
    parts = environment.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";")
    said = dict(part.split("=", 1) for part in parts if part)
    keys = {
        "account_key": said.get("AccountKey") or environment.get("AZURE_STORAGE_KEY"),
        "sas_token": said.get("SharedAccessSignature") or environment.get("AZURE_STORAGE_SAS_TOKEN"),
    }
    options |= {name: key for name, key in keys.items() if key}
    if endpoint := said.get("BlobEndpoint"):
        endpoint = urlsplit(endpoint)
        host = endpoint.netloc.removeprefix(options["account_name"])  # pyarrow adds it before a "."
        for kind in ("blob", "dfs"):
            options[f"{kind}_storage_authority"] = host.replace(".blob.", f".{kind}.")
            options[f"{kind}_storage_scheme"] = endpoint.scheme
    return Azure(**options), bucket


def _options(scheme: str, place: str, query: str) -> tuple[str, dict]:
    """(bucket, options of pyarrow's filesystem) of a URI in pyarrow's form."""
    plain, bucket = pafs.FileSystem.from_uri(f"{scheme}://{place}{query}")
    return bucket, {name: value for name, value in plain.__reduce__()[1][0].items() if value}


STORES = {"s3": _s3, "gs": _gcs, "gcs": _gcs, "abfs": _azure, "abfss": _azure}


def _environment() -> tuple:
    """The environment variables that set endpoints and credentials."""
    names = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_HOST")
    return tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith(names)))


def call(uri: str, function: Callable, *args):
    """Run function(*args), which accesses the store of `uri`. Raises OSError with one line."""
    with _clear_errors(uri):
        return _within(CALL_SECONDS, function, *args) if is_remote(uri) else function(*args)


def call_again(uri: str, function: Callable, *args):
    """Like `call`, but retries while the store is broken or unreachable: ATTEMPTS times, at most CALL_SECONDS."""
    end = time.monotonic() + CALL_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call(uri, function, *args)
        except ConnectionError:
            if attempt == ATTEMPTS or time.monotonic() > end:
                raise
            time.sleep(random.random() * min(20.0, 0.5 * 2**attempt))


def _within(seconds: float, function: Callable, *args):
    """The result of function(*args), or TimeoutError. pyarrow's calls can't be stopped, so the thread keeps running."""
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
    """Turn a store's error into one line: the URI, the remedy, and the store's message."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:  # wrong Azure credentials raise an ArrowException
        if not is_remote(uri) or str(error).startswith(str(uri)):  # it is one line already
            raise
        said = " ".join(str(error).split())
        kind, remedy = next(((kind, r) for pattern, kind, r in REMEDIES if re.search(pattern, said)), (OSError, ""))
        if isinstance(error, FileNotFoundError) and kind is not FileNotFoundError:
            raise FileNotFoundError(f"{uri} does not exist") from None
        said = re.sub(r"^When .*?: (?=AWS Error)|^.*(?=Azure Error)|( error_info=|\s*\(?Request ?ID:).*", "", said)
        raise kind(f"{uri}: {remedy or 'failed'} ({said[:200]})") from None


def open_file(uri: str) -> "pa.NativeFile | RemoteFile":
    """Open a remote file for reading, with seek. Raises FileNotFoundError, and OSError if it can't be read."""
    fs, path = filesystem(uri)
    if isinstance(fs, S3):
        fs = _store(*fs.made_from, attempts=1)
    source = call_again(uri, fs.open_input_file, path)
    return source if isinstance(fs, pafs.PyFileSystem) else RemoteFile(source, uri)


class RemoteFile(io.RawIOBase):
    """A remote file that retries reads itself.

    If a connection breaks within an answer, pyarrow's own retries continue with a half full buffer and fail. A new read
    has a new buffer, so pyarrow makes one attempt per read.
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
    """Write a remote file. pyarrow sends a large file in parallel parts, and close() completes it.

    A stream that failed is never freed, because pyarrow would then complete the upload with half a file. The bucket's
    rule for incomplete uploads deletes the parts.
    """
    fs, path = filesystem(uri)
    target = path
    if isinstance(fs, Azure):
        folder = posixpath.join(posixpath.dirname(target), f".{posixpath.basename(target)}.{secrets.token_hex(4)}.tmp")
        path = f"{folder}/part"
    sink = call(uri, fs.open_output_stream, path)
    try:
        unsent = 0
        for piece in pieces:
            call(uri, sink.write, piece)
            unsent += len(piece)
            if unsent >= UNSENT_BYTES:
                call(uri, sink.flush)  # wait for the parts in flight
                unsent = 0
        call(uri, sink.close)
        if path != target:
            call(uri, fs.copy_file, path, target)  # the store copies the whole file atomically
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
        raise
    finally:
        if path != target:
            with suppress(OSError):
                call(uri, fs.delete_dir, folder)  # delete_file takes a lease and may wait 7 seconds for its end
