"""Where documents come from: docstrings of this environment, the ClimbMix dataset, or a folder of files."""

import importlib.metadata
import io
import json
import os
import platform
import posixpath
import re
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray import storage
from nanochat_ray.data import docstrings
from nanochat_ray.data.download import fetch_all

FILE_NAME = re.compile(r"(?P<stem>[^.].*)\.(?:(?P<parquet>parquet)|(?P<lines>jsonl?|txt)(?:\.gz|\.zst)?)", re.I | re.S)
LONE_FILE_VAL_EVERY = 20  # of a source of one file, every 20th document is validation
TXT_SEPARATOR = "<|endoftext|>"

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # the last shard: validation
CLIMBMIX_TEXT_BYTES, CLIMBMIX_ROW_BYTES = 98_000_000, 93_000_000  # of disk, for each shard
CLIMBMIX_TOKENS = 34_000_000  # in a shard's rows, about: 250 million characters at 4.8 a token, a third cropped


@dataclass(frozen=True)
class Shard:
    """A file of documents. text_column is None for txt. part is "all", or "train" or "val" for a lone file's halves."""

    uri: str
    text_column: str | None
    part: str = "all"
    version: str = ""  # another one when the content changes
    size: int = 0  # bytes

    @property
    def fingerprint(self) -> str:
        return storage.fingerprint(storage.name(self.uri), self.text_column, self.part, self.version)


@dataclass(frozen=True)
class Source:
    """Documents in order, the last file held out. The fingerprint changes when the content does."""

    name: str
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    fingerprint: str


def resolve(source: str, *, text_column: str | None = None, shards: int = 8) -> Source:
    """Find a source's files; pydocs are made and climbmix is downloaded first where missing.

    source: "pydocs", "climbmix", or a path or URI of a folder or a file. text_column: by default `text`, else the
    only string column. shards: climbmix shards to train on; the validation shard comes on top.
    Raises FileNotFoundError for what is missing and ValueError for what can't be used, naming the file."""
    if source == "pydocs":
        return pydocs()
    if source == "climbmix":
        return climbmix(shards)
    return folder(source, text_column)


def folder(uri: str, text_column: str | None = None) -> Source:
    """The parquet, jsonl, json-lines and txt files (also .gz, .zst, not parquet) of a folder, sorted, or one file."""
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri} does not exist: name pydocs, climbmix, or a folder or file that does")
    is_folder = storage.is_folder(uri)
    names = filter(FILE_NAME.fullmatch, storage.files(uri) if is_folder else [storage.name(uri)])
    uris = [storage.join(uri, name) for name in names] if is_folder else [uri for _ in names]
    if not uris:
        raise FileNotFoundError(f"{uri} holds no .parquet, .jsonl, .json or .txt file (the last three also .gz, .zst)")
    with ThreadPoolExecutor(16) as pool:  # on an object store each look takes a round trip
        versions = list(pool.map(storage.version, uris))
        shards = list(pool.map(lambda uri, version: _inspect(uri, version[0], text_column), uris, versions))
    shards = [replace(s, version=str(v), size=v[0]) for s, v in zip(shards, versions, strict=True)]
    train, val = shards[:-1], shards[-1:]
    if not train:
        train, val = [replace(shards[0], part="train")], [replace(shards[0], part="val")]
        if next(read_documents(train[0]), None) is None:
            raise ValueError(f"{uris[0]} has one document: at least two are needed, one of them for validation")
    base = storage.name(uri) if is_folder else FILE_NAME.fullmatch(storage.name(uri))["stem"]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip(".-") or "source"
    contents = [(storage.name(s.uri), s.text_column, *v) for s, v in zip(shards, versions, strict=True)]
    return Source(name, tuple(train), tuple(val), storage.fingerprint(contents))


def _inspect(uri: str, size: int, text_column: str | None) -> Shard:
    """Choose the text column and see that there is something to read."""
    if size == 0:
        raise ValueError(f"{uri} is empty: remove or replace it")
    if _kind(uri) == "parquet":
        with _naming(uri), storage.reading(uri) as f:
            file = pq.ParquetFile(f)
            columns = {field.name: _is_string(field.type) for field in file.schema_arrow}
            documents = file.metadata.num_rows
        shard = Shard(uri, _choose_column(uri, columns, text_column))
    elif _kind(uri) == "txt":
        shard = Shard(uri, None)
        documents = next(read_documents(shard), None)
    else:
        with _naming(uri):
            _, documents = next(_json_records(uri), (0, None))
        columns = {key: isinstance(value, str | None) for key, value in (documents or {}).items()}
        shard = Shard(uri, _choose_column(uri, columns, text_column) if documents else None)
    if not documents:
        raise ValueError(f"{uri} has no documents: remove or replace it")
    return shard


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _choose_column(uri: str, columns: dict[str, bool], wanted: str | None) -> str:
    strings = [name for name, is_string in columns.items() if is_string]
    choice = wanted or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if choice in strings:
        return choice
    what = f"no text column {wanted!r}" if wanted else "no column `text` and not just one string column"
    listed = ", ".join(name if is_string else f"{name} (not a string)" for name, is_string in columns.items())
    raise ValueError(f"{uri} has {what}: name one of its columns with --text-column: {listed}")


def read_documents(shard: Shard) -> Iterator[str]:
    """Stream the documents that are not empty.

    A txt file is split at <|endoftext|> when its first MiB has one, else at blank lines.
    Raises ValueError naming the file, and the line where there are lines, when it is corrupt."""
    documents = (text for text in _documents(shard) if text.strip())
    for index, text in enumerate(documents):
        if shard.part == "all" or (shard.part == "val") == (index % LONE_FILE_VAL_EVERY == 0):
            yield text


def _documents(shard: Shard) -> Iterator[str]:
    with _naming(shard.uri):
        if _kind(shard.uri) == "parquet":
            with storage.reading(shard.uri) as f:
                file = pq.ParquetFile(f, pre_buffer=False)  # buffering would hold the whole file
                for batch in file.iter_batches(256, columns=[shard.text_column]):
                    yield from (text or "" for text in batch.column(0).to_pylist())
        elif _kind(shard.uri) == "txt":
            with _open(shard.uri) as f:
                marked = TXT_SEPARATOR.encode() in f.read(1 << 20)
            yield from _split_txt(_lines(shard.uri), marked)
        else:
            for number, record in _json_records(shard.uri):
                text = record.get(shard.text_column, ...)
                if not isinstance(text, str | None):
                    raise ValueError(f"line {number} has no string {shard.text_column!r}")
                # JSON can spell half a surrogate pair, which UTF-8 can't hold.
                yield (text or "").encode(errors="replace").decode()


def _split_txt(lines: Iterator[str], marked: bool) -> Iterator[str]:
    document = []
    for line in lines:
        end, *rest = line.split(TXT_SEPARATOR) if marked else ([line] if line.strip() else ["", ""])
        document.append(end)
        for start in rest:
            yield "".join(document).strip()
            document = [start]
    yield "".join(document).strip()


def _json_records(uri: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_lines(uri), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a JSON object (a file has one object a line)")
            yield number, record


def _lines(uri: str) -> Iterator[str]:
    with _open(uri) as f:
        for number, line in enumerate(f, 1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not UTF-8: {error.reason} at byte {error.start}") from error


@contextmanager
def _open(uri: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed. Arrow's streams notice a cut file and read on after the first member."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(posixpath.splitext(storage.name(uri))[1].lower())
    with storage.reading(uri) as f:
        # Each read of an object store is a request: few large ones.
        raw = io.BufferedReader(f, 8 << 20) if storage.is_remote(uri) else f
        yield io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20) if codec else raw


@contextmanager
def _naming(uri: str):
    """Turn any failure to read into one line with the file's name."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {uri}: {' '.join(str(error).split())}") from error


def _kind(uri: str) -> str:
    match = FILE_NAME.fullmatch(storage.name(uri))
    return (match["parquet"] or match["lines"]).lower()


def climbmix(shards: int) -> Source:
    """The first `shards` files of the Hub's ClimbMix and its last one; downloads those that are not there.

    Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE."""
    if not 1 <= shards <= CLIMBMIX_LAST:
        raise ValueError(f"climbmix has 1 to {CLIMBMIX_LAST} training shards, not {shards}: change --shards")
    place, names, missing = climbmix_files(shards)
    if missing and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise FileNotFoundError(
            f"{storage.join(place, missing[0])} is missing and HF_HUB_OFFLINE is set: unset it to download "
            f"{len(missing)} of {len(names)} shards, or copy them there"
        )
    if missing:
        check_climbmix_room(shards)
        fetch_all([(climbmix_url(n), storage.join(place, n)) for n in missing], os.environ.get("HF_TOKEN"))
    files = [Shard(storage.join(place, name), "text", version=CLIMBMIX, size=CLIMBMIX_TEXT_BYTES) for name in names]
    return Source("climbmix", tuple(files[:-1]), tuple(files[-1:]), storage.fingerprint(CLIMBMIX, names))


def check_climbmix_room(shards: int) -> None:
    """Raises OSError when the disk has no room for those of so many shards that are missing, and for their rows."""
    place, _, missing = climbmix_files(shards)
    needed, free = len(missing) * (CLIMBMIX_TEXT_BYTES + CLIMBMIX_ROW_BYTES), storage.free_bytes(place)
    if free is not None and needed > free:
        raise OSError(
            f"{len(missing)} climbmix shards and their rows take {needed / 1e9:.1f} GB ({storage.disk(place)}): "
            "make room, or set NANOCHAT_RAY_HOME to a folder of another disk"
        )


def climbmix_url(name: str) -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return f"{endpoint}/datasets/{CLIMBMIX}/resolve/main/{name}"


def climbmix_files(shards: int) -> tuple[str, list[str], list[str]]:
    """(folder, names of the training shards and the last one, those that are not there)."""
    names = [f"shard_{i:05d}.parquet" for i in (*range(shards), CLIMBMIX_LAST)]
    place = storage.join(storage.home(), "sources", "climbmix")
    present = set(storage.listdir(place))
    return place, names, [name for name in names if name not in present]


def pydocs(roots: Sequence[str] | None = None) -> Source:
    """Docstrings of the standard library and the installed packages, as parquet with columns text and name.

    roots: folders to search, by default this environment's. Nothing is done when the same packages were read before."""
    roots = roots or sorted({sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")})
    packages = sorted({(d.name, d.version) for d in importlib.metadata.distributions(path=list(roots)) if d.name})
    print_of = storage.fingerprint(packages, platform.python_version(), docstrings.MIN_CHARS, docstrings.SHARDS)
    place = storage.join(storage.home(), "sources", f"pydocs-{print_of}")
    if not storage.exists(storage.join(place, "manifest.json")):
        docstrings.write_docstrings(roots, place)
    names = [f"shard_{i:05d}.parquet" for i in range(docstrings.SHARDS)]
    shards = [Shard(storage.join(place, name), "text", version=print_of) for name in names]
    return Source("pydocs", tuple(shards[:-1]), tuple(shards[-1:]), print_of)
