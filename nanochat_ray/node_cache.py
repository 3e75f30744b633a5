"""A bounded cache of remote files on this node's disk, so that they can be mapped into memory."""

import fcntl
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs as pafs

from nanochat_ray import storage
from nanochat_ray.object_store import PIECE_BYTES

TRANSFERS = 8  # parallel requests when a file is downloaded
CACHE_SHARE = 0.5  # of the disk; NANOCHAT_RAY_CACHE_GB sets another limit
CACHE_GRACE_SECONDS = 600.0  # a copy used so recently is kept, because a caller may not have opened it yet


def localize(uri: str) -> Path:
    """The path of a local file, or of a copy of a remote file in this node's cache.

    The cache is bounded, so map or open the copy within CACHE_GRACE_SECONDS. Raises FileNotFoundError, and OSError if
    the file can't be read or the disk is full.
    """
    if not storage.is_remote(uri):
        return Path(uri)
    cache = Path(tempfile.gettempdir()) / "nanochat_ray_cache"
    cache.mkdir(parents=True, exist_ok=True)
    stamp = storage.version(uri)
    copy = cache / f"{storage.fingerprint(str(uri), stamp)}-{storage.name(uri)}"
    partial = copy.with_name(f"{copy.name}.partial")
    if not _touch(copy):
        with open(partial, "ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)  # only one process downloads
            if not _touch(copy):
                _make_room(cache, stamp[0])
                f.truncate(0)
                _download(uri, f, stamp[0])
                os.replace(partial, copy)
    return copy


def _touch(file: Path) -> bool:
    """Mark a copy as used now. Returns False if it does not exist."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


def _download(uri: str, file: BinaryIO, size: int) -> None:
    """Download a file in pieces. Pieces are fetched in parallel if the filesystem is pyarrow's own."""
    fs, _ = storage.filesystem(uri)
    at_once = 1 if isinstance(fs, pafs.PyFileSystem) else TRANSFERS
    with storage.reading(uri) as source, ThreadPoolExecutor(at_once) as pool, open(file.name, "r+b") as target:

        def fetch(offset: int) -> int:
            return os.pwrite(target.fileno(), source.read_at(PIECE_BYTES, offset), offset)

        arrived = sum(pool.map(fetch, range(0, size, PIECE_BYTES)))
    if arrived != size:
        raise OSError(f"{uri}: only {arrived:,} of {size:,} bytes arrived: run again")


def _make_room(cache: Path, needed: int) -> None:
    """Delete the least recently used copies until `needed` bytes fit below the limit.

    Mapped and recently used files are kept, even if the cache then exceeds the limit.
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
    """Names of cached files that some process has mapped. Empty without /proc."""
    names = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended or belongs to another user
            names.update(re.findall(rf"{re.escape(str(cache))}/(\S+)", maps.read_text()))
    return names
