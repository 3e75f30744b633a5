"""Downloads over HTTP: parallel, resumable, verified. A file has its final name only when it is complete."""

import email.utils
import errno
import fcntl
import hashlib
import os
import queue
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import ray
import requests
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray import storage

TRANSFERS = 8  # parallel downloads per node; servers limit the rate of one address
ATTEMPTS = 8  # failed requests in a row without a new byte
CONTENT_ATTEMPTS = 2  # downloads of a whole file whose content is wrong or that can't be resumed
MAX_WAIT = 3600.0  # seconds that a server may make us wait between two new bytes
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds between attempts; the delay doubles
TIMEOUT = (10, 60)  # seconds to connect, and seconds to wait for the next byte
TRANSIENT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Busy(requests.ConnectionError):
    """The server says after how many seconds to try again."""

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


class WrongContent(requests.ConnectionError):
    """The server sent a wrong file, or broke off a file that can't be resumed. Only CONTENT_ATTEMPTS are made."""


class Pause:
    """How long to send no requests, because the server said so. All transfers of a process share it."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.until, self.lock = say, 0.0, threading.Lock()

    def extend(self, seconds: float, why: Busy) -> None:
        with self.lock:
            if (until := time.monotonic() + seconds) > self.until + 1:
                self.say(f"download: {why}")
            self.until = max(self.until, until)

    def wait(self) -> None:
        while (left := self.until - time.monotonic()) > 0:
            time.sleep(left * random.uniform(1.0, 1.1))  # jitter, so that transfers don't restart together


def fetch_all(files: list[tuple[str, str]], token: str | None = None) -> None:
    """Download (url, uri) pairs on all nodes of the cluster. The first permanent error stops all of them."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = ([node for node in alive if node["Resources"].get("CPU")] or alive)[: len(files)]
    shares = {}  # files done, by generator
    for index, node in enumerate(nodes):
        # Soft affinity: if a node is lost, another one downloads its files.
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        shares[_fetch_share.options(scheduling_strategy=on_node).remote(files[index :: len(nodes)], token)] = 0
    running = list(shares)
    try:
        while running:
            [share], _ = ray.wait(running)
            try:
                done, line, error = ray.get(next(share))
            except StopIteration:
                running.remove(share)
                continue
            if error:
                raise error
            shares[share] = done
            print(line or f"downloaded {sum(shares.values())}/{len(files)} files", flush=True)
    finally:
        for share in running:
            ray.cancel(share, force=True)


@ray.remote(num_cpus=0)
def _fetch_share(files: list[tuple[str, str]], token: str | None) -> Iterator[tuple[int, str | None, Exception | None]]:
    """Download files in threads. Yields (files done, a line to print, an error). Only the caller stops it on errors."""
    events, done = queue.SimpleQueue(), 0
    pause = Pause(events.put)

    def fetch_one(file: tuple[str, str]) -> None:
        try:
            events.put(fetch(*file, token, pause))
        except Exception as error:  # raised again by the caller
            events.put(error)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        for file in files:
            pool.submit(fetch_one, file)
        while done < len(files):
            event = events.get()
            done += event is None
            yield done, event if isinstance(event, str) else None, event if isinstance(event, Exception) else None


def fetch(url: str, uri: str, token: str | None = None, pause: Pause | None = None) -> None:
    """Download one file. An incomplete file is kept under a hidden name, so a later call asks only for the rest.

    Connection errors, short bodies, 408, 429 and 5xx are retried with exponential backoff and jitter. If the server
    says how long to wait, all transfers that share the pause wait, and it does not count as a failure.
    Raises FileNotFoundError on 404, PermissionError on 401 and 403, ConnectionError when retries are used up, and
    OSError with the free space when the disk is full."""
    partial = _partial_path(uri)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(partial) as file:  # two runs may download the same file
            if not storage.exists(uri):
                _fetch_with_retries(url, file, token, pause or Pause(print))
                storage.publish(partial, uri)
            else:
                partial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = storage.disk(str(partial.parent))
        raise OSError(error.errno, f"{error.strerror} ({where}); run again to continue", uri) from None


@contextmanager
def _locked(partial: Path) -> Generator[BinaryIO]:
    """Open the incomplete file for one process at a time. It is removed afterwards if it is empty."""
    while True:
        with open(partial, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat())):
                continue  # the process that had the lock has deleted or moved the file
            try:
                yield file
            finally:
                if partial.exists() and not partial.stat().st_size:
                    partial.unlink()
            return


def _partial_path(uri: str) -> Path:
    if storage.is_remote(uri):
        return Path(tempfile.gettempdir()) / "nanochat_ray_downloads" / storage.fingerprint(uri)
    return Path(uri).with_name(f".{Path(uri).name}.partial")


def _fetch_with_retries(url: str, file: BinaryIO, token: str | None, pause: Pause) -> None:
    tries, failures, mismatches, arrived, last_byte = 0, 0, 0, file.tell(), time.monotonic()
    while True:
        pause.wait()
        try:
            return _fetch_rest(url, file, token)
        except TRANSIENT as error:
            file.flush()
            if file.tell() > arrived:
                tries, failures, last_byte = 0, 0, time.monotonic()
            tries, arrived, mismatches = tries + 1, file.tell(), mismatches + isinstance(error, WrongContent)
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (tries - 1)) * random.uniform(0.5, 1.5)
            if isinstance(error, Busy) and time.monotonic() - last_byte + error.seconds < MAX_WAIT:
                pause.extend(max(error.seconds, delay), error)
                continue
            failures += 1
            if failures >= ATTEMPTS or mismatches >= CONTENT_ATTEMPTS or isinstance(error, Busy):
                kept = f"{arrived:,} bytes are kept, run again to continue" if arrived else "run again later"
                times = f"tried {tries} time{'s' * (tries > 1)}"
                raise ConnectionError(f"cannot download {url}: {error} ({times}; {kept})") from error
        time.sleep(delay)


def _fetch_rest(url: str, file: BinaryIO, token: str | None) -> None:
    """Send one request for the missing bytes and append them to `file`. Raises if the file is then not complete.

    It is complete if it has the length and sha256 that the server names; without a length, when the stream ends."""
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    start = file.seek(0, os.SEEK_END)
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        _raise_for_status(url, response)
        # A proxy may compress the body although we asked for identity. Lengths and ranges then count other bytes.
        encoded = response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity")
        span, total = _span_and_total(response, encoded)
        if response.status_code == 206 and (encoded or not span.startswith(f"bytes {start}-")):
            if encoded:
                _empty(file)
            raise requests.ConnectionError(f"the server sent {span!r} for {headers.get('Range')!r}")
        if response.status_code == 416 and total is None:
            _empty(file)
            raise requests.ConnectionError(f"the server has nothing after {start:,} bytes and names no length")
        if response.status_code == 200:
            _empty(file)  # the server ignored the range and sends the whole file
        if response.status_code != 416:
            try:
                for chunk in response.iter_content(1 << 16):
                    file.write(chunk)
            except (*TRANSIENT, requests.exceptions.ContentDecodingError) as error:
                if encoded:
                    _empty(file)
                if response.status_code == 200 and total is None:
                    raise WrongContent(f"it broke off, and the server names no length: {error}") from error
                raise
        file.flush()
        if total is not None and (size := file.tell()) != total:
            if size > total:
                _empty(file)  # the bytes kept were of another file
            raise requests.ConnectionError(f"{size:,} bytes arrived, the server says {total:,}")
        _verify(file, response, url)


def _span_and_total(response: requests.Response, encoded: bool) -> tuple[str, int | None]:
    """(range of the response's bytes, length of the file or None if the server does not name it)."""
    # Content-Range is "bytes 0-99/200", or "bytes */200" if the server has nothing after `start`.
    span, _, total = response.headers.get("Content-Range", "").partition("/")
    linked = [r.headers.get("X-Linked-Size", "") for r in [*response.history, response]]  # the Hub's header
    length = "" if encoded or response.status_code != 200 else response.headers.get("Content-Length", "")
    return span, next((int(text) for text in (total, *linked, length) if text.isdigit()), None)


def _raise_for_status(url: str, response: requests.Response) -> None:
    status = response.status_code
    if status in (408, 429) or status >= 500:
        said = f"{urlsplit(response.url).netloc} answered {status} {response.reason}"
        if status in (429, 503) and (seconds := _seconds_to_wait(response)) is not None:
            raise Busy(f"{said} and asks to wait {seconds:,.0f} s", seconds)
        raise requests.ConnectionError(said)
    if status == 404:
        raise FileNotFoundError(f"{url} does not exist (404): check HF_ENDPOINT and the number of shards")
    if status in (401, 403):
        raise PermissionError(f"{url} is not allowed ({status}): set HF_TOKEN to a token that may read it")
    if status not in (200, 206, 416):
        raise ValueError(f"{url}: unexpected answer {status} {response.reason}: check HF_ENDPOINT")


def _seconds_to_wait(response: requests.Response) -> float | None:
    """Seconds from Retry-After (seconds or a date) or from RateLimit ("api";r=0;t=55). None without either."""
    after = response.headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if date := email.utils.parsedate_tz(after):
        return max(0.0, email.utils.mktime_tz(date) - time.time())
    limit = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _empty(file: BinaryIO) -> None:
    file.truncate(0)
    file.seek(0)


def _verify(file: BinaryIO, response: requests.Response, url: str) -> None:
    """Check the sha256 that the Hub names for large files: a file may have changed before it was resumed.

    Without a sha256, check that a parquet file ends as it should: a stream may end too early without an error."""
    tags = [r.headers.get("X-Linked-ETag", "").strip('"') for r in [*response.history, response]]
    expected = next((tag for tag in tags if len(tag) == 64), None)
    with open(file.name, "rb") as copy:
        if expected is None:
            copy.seek(max(0, file.tell() - 4))
            if url.endswith(".parquet") and copy.read() != b"PAR1":
                _empty(file)
                raise WrongContent(f"it ends after {copy.tell():,} bytes, before the end of a parquet file")
            return
        actual = hashlib.file_digest(copy, "sha256").hexdigest()
    if actual != expected:
        _empty(file)
        raise WrongContent(f"sha256 is {actual}, the server says {expected}")
