"""Finds data files below a folder, by a pattern or in a list, and their format, split and compression.

If a folder has tables (parquet, arrow, json, csv), its txt files are not used. A licence, a README or a checksum is not
data. Folders and names such as train/ and validation-00000-of-00001 are splits.
"""

import bz2
import codecs
import io
import lzma
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import zstandard

from nanochat_ray import storage

KINDS = {"parquet": "parquet", "arrow": "arrow", "feather": "arrow", "ipc": "arrow", "csv": "csv", "tsv": "csv"}
KINDS |= {"jsonl": "json", "ndjson": "json", "json": "json", "txt": "txt", "text": "txt"}
CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "xz": "xz"}
READABLE = ".parquet, .jsonl, .ndjson, .json, .arrow, .csv, .tsv or .txt file (text also as .gz, .zst, .bz2 or .xz)"
REMEDY = "name a folder or file that does, pydocs, climbmix, or hub:OWNER/NAME"
# For a name without an ending, or whose ending is a number, the content decides the format.
WITHOUT_ENDING = re.compile(r"[^.]+(?:\.c?\d+)?", re.S)
# Never data: hidden files, files that Spark and the Hub put beside data, and the documents of a repository.
HIDDEN = re.compile(r"[._].*|dataset_infos?\.json", re.I | re.S)
REPOSITORY_DOCS = re.compile(
    r"(?:licen[cs]e|readme|copying).*"
    r"|(?:requirements.*|notice|authors|change(?:s|log)|contributing|citation|makefile|dockerfile)(?:\.txt)?",
    re.I | re.S,
)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "val")
WORD = "|".join(SPLITS)
NUMBER = r"(?:[-_. ]\d+)?(?:[-_.]of[-_.]\d+)?(?:-[0-9a-f]{16})?"
# Matches "train", "wiki.valid", "corpus-test-3", and the Hub's "train_sft-00000-of-00002".
SPLIT_NAME = re.compile(rf"(?:.*[-_. ])?({WORD}){NUMBER}|({WORD})_\w+-\d+-of-\d+(?:-[0-9a-f]{{16}})?", re.I | re.S)
TXT_BESIDE_TABLES = "txt beside tables"
HEAD_BYTES = 64 << 10  # bytes to compare of a file and its compressed copy, or to detect a format
ZSTD_WINDOW = 2**31  # bytes; zstd --long=31 writes no larger window
UNICODE_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, because it begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class Unreadable(ValueError):
    """The file is damaged, or its content does not match its name."""


@dataclass(frozen=True)
class DataFile:
    uri: str
    name: str  # the path below the folder that was searched
    kind: str  # parquet, arrow, json, csv or txt
    size: int


@dataclass
class Found:
    """The data files of a folder, a pattern or a list, in order."""

    files: list[DataFile] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # {name: reason} of other files beside them
    is_lone: bool = False  # the files were named one by one
    is_pattern: bool = False


def shown(text: str) -> str:
    """The text in printable form. File names may hold bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


# Finding


def find(source: str) -> list[Found]:
    """The data files of a file, a folder, a pattern (data/**/*.parquet), or several of these joined by commas.

    Returns one Found per folder and per pattern, and one for all files that are named one by one.
    Raises FileNotFoundError if something does not exist or holds no data."""
    uri = storage.absolute(source)
    if storage.exists(uri):
        found = _choose(uri, storage.walk(uri)) if storage.is_folder(uri) else _lone(uri)
    elif "," in source:
        parts = [found for part in source.split(",") if part.strip() for found in find(part.strip())]
        lone = [file for found in parts if found.is_lone for file in found.files]
        return [found for found in parts if not found.is_lone] + ([Found(lone, is_lone=True)] if lone else [])
    elif re.search(r"[*?\[]", source):
        found = _matching(uri)
        found.is_pattern = True
    else:
        raise FileNotFoundError(f"{shown(uri)} does not exist: {REMEDY}")
    if not found.files:
        others = f"; it has {some(list(found.left_out))}" if found.left_out else ""
        raise FileNotFoundError(f"{shown(uri)} holds no {READABLE}{others}")
    return [found]


def _lone(uri: str) -> Found:
    """A file that the user names is data, unless it has the ending of an unsupported format."""
    name = storage.name(uri)
    kind = by_ending(name)[0] or (kind_of(uri) if WITHOUT_ENDING.fullmatch(_without_codec(name)) else None)
    return Found([DataFile(uri, name, kind, storage.size(uri))] if kind else [], is_lone=True)


def _matching(pattern: str) -> Found:
    """The files that match a pattern: * and ? match within a name, ** matches any folders."""
    folder = re.match(r"[^*?\[]*/", pattern)[0].rstrip("/") or "/"  # ty: ignore[not-subscriptable]
    rest = re.split(r"(\*\*/|\*|\?|\[[^]]*\])", pattern[len(folder) :].lstrip("/"))
    meaning = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(meaning.get(part, part if part.startswith("[") else re.escape(part)) for part in rest)
    return _choose(folder, [(name, size) for name, size in storage.walk(folder) if re.fullmatch(regex, name, re.S)])


def _choose(folder: str, names: list[tuple[str, int]]) -> Found:
    found, links = Found(), set()
    for name, size in names:
        base = storage.name(name)
        kind, _ = by_ending(base)
        uri = storage.join(folder, name)
        if any(HIDDEN.fullmatch(part) for part in name.split("/")):
            if not base.startswith("."):
                found.left_out[name] = "not data"
        elif size < 0:
            found.left_out[name] = "a broken link"
        elif kind in (None, "txt") and REPOSITORY_DOCS.fullmatch(base):
            found.left_out[name] = "not data"
        elif (place := storage.real(uri)) in links:
            found.left_out[name] = "a link to another of these files"
        elif kind or (WITHOUT_ENDING.fullmatch(_without_codec(base)) and (kind := kind_of(uri))):
            links.add(place)
            found.files.append(DataFile(uri, name, kind, size))
        else:
            found.left_out[name] = "not a supported format"
    tables = [file for file in found.files if file.kind != "txt"]
    if tables:
        found.left_out |= {f.name: TXT_BESIDE_TABLES for f in found.files if f.kind == "txt"}
    found.files = _without_copies(tables or found.files, found.left_out)
    return found


def _without_copies(files: list[DataFile], left_out: dict[str, str]) -> list[DataFile]:
    """Leave out a.jsonl.gz if a.jsonl begins with the same bytes."""
    kept = {}
    for file in sorted(files, key=lambda file: len(file.name)):
        first = kept.setdefault(_without_codec(file.name), file)
        if first is not file and _beginning(first) == _beginning(file):
            left_out[file.name] = f"the same as {shown(first.name)}"
    return [file for file in files if file.name not in left_out]


def _beginning(file: DataFile) -> bytes:
    try:
        with opened(file.uri) as f:
            return f.read(HEAD_BYTES)
    except Unreadable:
        return file.name.encode(errors="surrogateescape")  # unique, so that it equals no other file's


def _without_codec(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    return stem if ending.lower() in CODECS and stem else name


def stem(name: str) -> str:
    """The name without the endings for format and compression."""
    plain = _without_codec(name)
    stem, _, ending = plain.rpartition(".")
    return stem if stem and ending.lower() in KINDS else plain


def by_ending(name: str) -> tuple[str | None, str | None]:
    """(kind, codec) by the ending of a name. kind is None for compressed parquet and arrow, which we can't read."""
    plain = _without_codec(name)
    codec = CODECS[name.rpartition(".")[2].lower()] if plain != name else None
    kind = KINDS.get(plain.rpartition(".")[2].lower()) if "." in plain else None
    return (None if codec and kind in ("parquet", "arrow") else kind), codec


def kind_of(uri: str) -> str | None:
    """The format by the name's ending, else by the content. None for an unsupported format."""
    kind, _ = by_ending(storage.name(uri))
    if kind:
        return kind
    try:
        with opened(uri) as f:
            head = f.read(HEAD_BYTES)
    except Unreadable:
        return None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    mark, encoding = unicode_mark(head)
    text = head[len(mark) :].decode(encoding, "ignore")
    if re.match(r"\s*(?:\{\s*[\"}]|\[\s*[\[{])", text):
        return "json"
    return None if "\0" in text or head.startswith(b"%PDF") else "txt"


# Splits


def splits(found: Found, place: str) -> tuple[dict[str, list[DataFile]], dict[str, str]]:
    """({"train": files, "val": files}, {name: why a file is left out}), by names of splits in folders and file names.

    Without val, test is val. Without train or any other split, all files are train and there is no "val": the caller
    holds some out. Raises ValueError if a folder holds several data sets, each with its own splits."""
    files, labels, sets = found.files, {}, set()
    for file in files:
        *folders, base = file.name.split("/")
        at = next((i for i, part in enumerate(folders) if part.lower() in SPLITS), None)
        if at is not None:
            labels[file], below = SPLITS[folders[at].lower()], folders[:at]
        elif match := SPLIT_NAME.fullmatch(stem(base)):
            labels[file], below = SPLITS[(match[1] or match[2]).lower()], folders
        else:
            continue
        sets.add("/".join(below))
    if len(sets) > 1 and not found.is_pattern:
        raise ValueError(
            f"{shown(place)} holds {len(sets)} data sets, {some(sorted(name or '.' for name in sets))}: name the "
            "folder of one, or several joined by commas, or a pattern"
        )
    by_label = {label: [f for f in files if labels.get(f) == label] for label in ("train", "val", "test", None)}
    train = by_label["train"] or by_label[None]
    val = by_label["val"] or by_label["test"]
    if not train or not val:
        return {"train": files}, {}
    rest = set(files) - set(train) - set(val)
    return {"train": train, "val": val}, {f.name: "the test split" if f in labels else "in no split" for f in rest}


# Opening


@contextmanager
def naming(uri: str) -> Generator[None]:
    """Turn the errors of a damaged file into Unreadable, one line that names it. Network errors stay as they are."""
    try:
        yield
    except (Unreadable, ConnectionError, TimeoutError):
        raise
    except (OSError, ValueError, EOFError, lzma.LZMAError, zstandard.ZstdError, pa.ArrowException) as error:
        raise Unreadable(f"cannot read {shown(uri)}: {shown(' '.join(str(error).split()))}") from error


@contextmanager
def opened(uri: str) -> Generator[io.BufferedReader]:
    """The file's bytes as a decompressed stream. It reads all members, and raises Unreadable if one is cut off."""
    with naming(uri), storage.reading(uri) as f:
        # Each read from an object store is a request, so make few large ones.
        raw = io.BufferedReader(f, 8 << 20) if storage.is_remote(uri) else f
        codec = by_ending(storage.name(uri))[1] or _codec_of(raw.peek(6)[:6])
        streams = {"gzip": _gzip, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile, "zstd": ZstdStream}
        yield io.BufferedReader(streams[codec](raw), 1 << 20) if codec else raw


def _gzip(raw: io.BufferedReader) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(raw, "gzip")


def _codec_of(head: bytes) -> str | None:
    """The codec by the first bytes, for a compressed file without its ending."""
    marks = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
    return next((codec for mark, codec in marks.items() if head.startswith(mark)), None)


class ZstdStream(io.RawIOBase):
    """Decompresses all frames of a file. The libraries' streams refuse windows above 2^27, or miss a cut frame."""

    def __init__(self, raw: io.BufferedReader):
        self.raw, self.ready, self.frame, self.input = raw, memoryview(b""), None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            self.input = self.input or self.raw.read(1 << 14)
            if not self.input:
                if self.frame:
                    raise EOFError("the file is cut off within a zstd frame")
                return 0
            if not self.frame:
                self.frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            self.ready = memoryview(self.frame.decompress(self.input))
            self.input = b""
            if self.frame.eof:
                self.input, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


# Text


def unicode_mark(head: bytes) -> tuple[bytes, str]:
    """(byte order mark, encoding) by the first bytes; (b"", "utf-8") if there is no mark."""
    return next(((mark, name) for mark, name in UNICODE_MARKS.items() if head.startswith(mark)), (b"", "utf-8"))


def text_chunks(uri: str) -> Iterator[str]:
    """The text without its byte order mark, about 1 MiB at a time. Raises Unreadable that names line and encoding."""
    with opened(uri) as f:
        data = f.read(1 << 20)
        mark, encoding = unicode_mark(data)
        data, lines = data[len(mark) :], 1
        if not mark and (looks := _utf16_without_mark(data[:4096])):
            raise Unreadable(f"cannot read {shown(uri)}: it looks like {looks} without its mark; save it as UTF-8")
        decoder = codecs.getincrementaldecoder(encoding)()
        while True:
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].decode(encoding, "ignore").count("\n")
                looks = "" if mark else _looks_like(error.object)
                raise Unreadable(f"cannot read {shown(uri)}: line {line} is not {encoding.upper()}{looks}") from error
            lines += text.count("\n")
            yield text
            if not data:
                return
            data = f.read(1 << 20)


def _utf16_without_mark(head: bytes) -> str | None:
    """Detect UTF-16 by a NUL at every other byte. NULs are valid UTF-8, so decoding would not fail."""
    for place, name in ((1, "UTF-16-LE"), (0, "UTF-16-BE")):
        if len(head) > 3 and head[place::2].count(0) > 0.4 * len(head[place::2]) and head[1 - place :: 2].count(0) == 0:
            return name
    return None


def _looks_like(data: bytes) -> str:
    import charset_normalizer  # comes with requests

    best = charset_normalizer.from_bytes(data[: 1 << 16]).best()
    return f": it looks like {best.encoding}; save it as UTF-8" if best else ": save it as UTF-8"


def text_lines(uri: str) -> Iterator[str]:
    """The lines with their line ends. A line takes time linear in its length, however many chunks it spans."""
    rest: list[str] = []
    for chunk in text_chunks(uri):
        *lines, last = chunk.split("\n")
        for line in lines:
            rest.append(line)
            yield "".join(rest) + "\n"
            rest = []
        rest.append(last)
    if line := "".join(rest):
        yield line
