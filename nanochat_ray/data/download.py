"""Files over HTTP: in parallel, resumed where they stopped, complete under their final name or absent."""

import fcntl
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import ray
import requests

from nanochat_ray import storage

ATTEMPTS = 8  # in a row with no new byte since the first of them
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds between attempts, doubling
TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next byte
TRANSIENT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def fetch_all(files: list[tuple[str, str]], token: str | None = None) -> None:
    """Download (url, uri) pairs on all nodes of the cluster; the first permanent error stops the rest."""
    # A download waits for the network: several share one core.
    task = ray.remote(fetch).options(num_cpus=0.25)
    waiting, done = [task.remote(url, uri, token) for url, uri in files], 0
    while waiting:
        [ready], waiting = ray.wait(waiting)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            for other in waiting:
                ray.cancel(other)
            raise error.cause from None
        done += 1
        print(f"downloaded {done}/{len(files)} files", flush=True)


def fetch(url: str, uri: str, token: str | None = None) -> None:
    """Download one file. What has arrived is kept under a hidden name, so a later call asks only for the rest.

    Connection errors, short bodies, 408, 429 and 5xx are retried with exponential backoff and jitter.
    Raises FileNotFoundError on 404, PermissionError on 401 and 403, ConnectionError when retries are used up."""
    partial = _partial_path(uri)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two runs may want the same file
        if not storage.exists(uri):
            _fetch_with_retries(url, file, token)
            storage.publish(partial, uri)
        else:
            partial.unlink(missing_ok=True)


def _partial_path(uri: str) -> Path:
    if storage.is_remote(uri):
        return Path(tempfile.gettempdir()) / "nanochat_ray_downloads" / storage.fingerprint(uri)
    return Path(uri).with_name(f".{Path(uri).name}.partial")


def _fetch_with_retries(url: str, file: BinaryIO, token: str | None) -> None:
    failures, arrived = 0, file.tell()
    while True:
        try:
            return _fetch_rest(url, file, token)
        except TRANSIENT as error:
            file.flush()
            failures = 1 if file.tell() > arrived else failures + 1
            arrived = file.tell()
            if failures >= ATTEMPTS:
                raise ConnectionError(
                    f"cannot download {url}: {error} (tried {ATTEMPTS} times; {arrived:,} bytes are kept, "
                    "run again to continue)"
                ) from error
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1))
        time.sleep(delay * random.uniform(0.5, 1.5))


def _fetch_rest(url: str, file: BinaryIO, token: str | None) -> None:
    """One request for what `file` lacks, appended to it. Returns when it is whole, else raises."""
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    start = file.seek(0, os.SEEK_END)
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        _raise_for_status(url, response)
        # "bytes 0-99/200" or, when the server has nothing after `start`, "bytes */200"
        span, _, total = response.headers.get("Content-Range", "").partition("/")
        total = int(total if total.isdigit() else response.headers.get("Content-Length", -1))
        if response.status_code == 206 and not span.startswith(f"bytes {start}-"):
            raise requests.ConnectionError(f"the server sent {span!r} for {headers.get('Range')!r}")
        if response.status_code == 200:
            file.truncate(0)  # the server sends all of it, Range or not
            file.seek(0)
        if response.status_code != 416:
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
        file.flush()
        if (size := file.tell()) != total:
            if size > total:
                file.truncate(0)  # so it was no beginning of this file
            raise requests.ConnectionError(f"{size:,} bytes arrived, the server says {total:,}")
        _verify_sha256(file, response)


def _raise_for_status(url: str, response: requests.Response) -> None:
    status = response.status_code
    if status in (408, 429) or status >= 500:
        raise requests.ConnectionError(f"the server answered {status} {response.reason}")
    if status == 404:
        raise FileNotFoundError(f"{url} does not exist (404): check HF_ENDPOINT and the number of shards")
    if status in (401, 403):
        raise PermissionError(f"{url} is not allowed ({status}): set HF_TOKEN to a token that may read it")
    if status not in (200, 206, 416):
        raise ValueError(f"{url}: unexpected answer {status} {response.reason}: check HF_ENDPOINT")


def _verify_sha256(file: BinaryIO, response: requests.Response) -> None:
    """The Hub names a large file's sha256; a resumed file that changed in between is caught by it."""
    tags = [r.headers.get("X-Linked-ETag", "").strip('"') for r in [*response.history, response]]
    expected = next((tag for tag in tags if len(tag) == 64), None)
    if expected is None:
        return
    with open(file.name, "rb") as copy:
        actual = hashlib.file_digest(copy, "sha256").hexdigest()
    if actual != expected:
        file.truncate(0)
        raise requests.ConnectionError(f"sha256 is {actual}, the server says {expected}")
