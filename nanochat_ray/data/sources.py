"""Sources of documents: docstrings of this environment, ClimbMix, any data set of the Hub, or your own files."""

import importlib.metadata
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate

from nanochat_ray import storage
from nanochat_ray.data import docstrings, files, hub, tables
from nanochat_ray.data.download import fetch_all
from nanochat_ray.data.files import DataFile, Unreadable, shown

TXT_SEPARATOR = "<|endoftext|>"
VAL_EVERY = 20  # every 20th document is validation if no file can be held out
# Hold out the last files: enough for this share of all bytes, or for this many bytes if that is less.
VAL_SHARE, VAL_BYTES = 0.01, 1e6
# Don't hold out files if the last one, or the last several, would be a larger share of the text than this.
MAX_VAL_SHARE_ONE, MAX_VAL_SHARE_SEVERAL = 0.8, 0.2
MAX_UNREADABLE_SHARE = 0.01  # of the files
# If a source has more than FEW_FILES, small files share a shard, up to these limits.
FEW_FILES, GROUP_FILES, GROUP_BYTES = 64, 1000, 8 << 20
THREADS = 16
READING_VERSION = "2"  # increase it when the rules above start to give other documents

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # number of the last shard, which is validation
CLIMBMIX_TEXT_BYTES, CLIMBMIX_ROW_BYTES = 98_000_000, 93_000_000  # disk space per shard
CLIMBMIX_TOKENS = 34_000_000  # per shard, about: 250 million characters, 4.8 per token, a third of them cropped


@dataclass(frozen=True)
class Shard:
    """One file of documents, or several small ones."""

    uri: str
    text_column: str | None  # a column or a path to the text, see tables.choose; None for txt
    part: str = "all"  # "train" or "val" if the two splits share the file
    version: str = ""  # changes with the content
    size: int = 0  # bytes
    more: tuple[str, ...] = ()  # further files, read after the first
    offset: int = 0  # number of the first document, where every VAL_EVERY-th document is validation

    @property
    def fingerprint(self) -> str:
        more = [storage.name(uri) for uri in self.more] + [self.offset] * (self.offset > 0)
        return storage.fingerprint(storage.name(self.uri), self.text_column, self.part, self.version, *more)


@dataclass(frozen=True)
class Source:
    """Documents in order, some of them held out for validation."""

    name: str
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    fingerprint: str  # changes with the content
    files: int = 0  # number of files in the shards and in the next two lists
    unreadable: tuple[str, ...] = ()  # one message per damaged file
    empty: tuple[str, ...] = ()  # names of files without documents
    most: int | None = None  # training shards that exist, if `train` may be only the first of them


@dataclass
class Reading:
    """What a reader found besides documents."""

    blank: int = 0  # rows without text
    unreadable: list[str] = field(default_factory=list)  # one message per damaged file


WEIGHT = re.compile(r"(.+)=(\d+\.?\d*|\.\d+)", re.S)


def parse(text: str) -> tuple[str, float | None]:
    """Split NAME=0.7 into (source, weight). The weight is None without "=", or if a file has the whole name.

    Raises FileNotFoundError if neither the text nor the part before "=" exists, and ValueError for a weight of 0."""
    match = WEIGHT.fullmatch(text)
    if not match:
        return text, None
    if not is_named(match[1]) and not re.search(r"[,*?\[]", match[1]):
        if storage.exists(storage.absolute(text)):
            return text, None
        if not storage.exists(storage.absolute(match[1])):
            raise FileNotFoundError(f"neither {shown(text)} nor {shown(match[1])} exists: {files.REMEDY}")
    if not float(match[2]):
        raise ValueError(f"{shown(text)}: a weight must be above 0")
    return match[1], float(match[2])


def is_named(source: str) -> bool:
    """Whether the source is made or downloaded, so that it is not a path."""
    return source in ("pydocs", "climbmix") or source.startswith("hub:")


def resolve(source: str, *, text_column: str | None = None, shards: int = 8) -> Source:
    """Find a source's files. Makes pydocs, and downloads files of climbmix and the Hub, if they are missing.

    source: "pydocs", "climbmix", "hub:REPOSITORY", "hub:REPOSITORY:CONFIG", "hub:REPOSITORY:CONFIG:SPLIT", or a path as
    in files.find. text_column: see tables.choose. shards: training files of climbmix or the Hub; validation files are
    taken in addition.
    Raises FileNotFoundError for missing files and ValueError for files that can't be used. Messages name the file."""
    if source == "pydocs":
        return pydocs()
    if source == "climbmix":
        return climbmix(shards)
    if source.startswith("hub:"):
        return of_hub(source, text_column, shards)
    return folder(source, text_column)


def folder(source: str, text_column: str | None = None) -> Source:
    """The source of a folder with subfolders, a pattern, a list or one file. Prints which files it uses.

    Validation is the split of that name, else the last files. If these are too large a share, it is every VAL_EVERY-th
    document."""
    found = files.find(source)
    place = shown(storage.absolute(source) if len(found) == 1 else source)
    splits, left_out = {"train": [], "val": []}, {}
    for part in found:
        of_part, others = files.splits(part, place)
        left_out |= part.left_out | others
        for split, of_split in of_part.items():
            splits[split] += of_split
    return _of_files(_name(source), place, splits, left_out, text_column)


def of_hub(source: str, text_column: str | None, shards: int) -> Source:
    """The first `shards` files of a split of a data set of the Hub, by default of train.

    Validation is the split validation, else test, of the same config, else the last file. Raises OSError with one line
    if files can't be downloaded, and ValueError if they can't be used."""
    _, repository, config, split, *more = [*source.split(":"), None, None, None][: max(4, source.count(":") + 1)]
    if more or not repository:
        raise ValueError(
            f"{source}: name a data set of the Hub as hub:OWNER/NAME, then :CONFIG and :SPLIT if it has several"
        )
    if shards < 1:
        raise ValueError(f"{source} needs at least one file to train on, not {shards}: change --shards")
    by_split, split = hub.splits(repository, config or None), split or "train"
    if not by_split.get(split):
        raise ValueError(f"{source}: there is no split {split}, only {', '.join(by_split)}")
    of_split, val = by_split[split], (by_split.get("validation") or by_split.get("test") or []) * (split == "train")
    first = min(shards, len(of_split) if val else max(1, len(of_split) - 1))
    train = of_split[:first] if val else [*of_split[:first], *of_split[first:][-1:]]
    if odd := [file.path for file in (*train, *val[:shards]) if not files.by_ending(file.path)[0]]:
        raise ValueError(f"{source}: a file must be a {files.READABLE}, but there are {files.some(odd)}")
    hub.download(repository, [*train, *val[:shards]])
    copies, versions = {}, {}
    for name, listed in (("train", train), ("val", val[:shards])):
        copies[name] = []
        for file in listed:
            kind, _ = files.by_ending(file.path)
            assert kind
            copies[name].append(DataFile(file.copy(repository), file.path, kind, file.size))
            versions[copies[name][-1]] = file.size, file.blob
    name = "-".join(filter(None, (repository.rpartition("/")[2], config, split if split != "train" else None)))
    most = len(of_split) - (not val)
    if first < most:
        print(f"source: {source}: using the first {first:,} of {most:,} files; --shards sets how many", flush=True)
    return replace(_of_files(name, source, copies, {}, text_column, versions), most=most)


def _of_files(
    name: str,
    place: str,
    splits: dict[str, list[DataFile]],
    left_out: dict[str, str],
    text_column: str | None,
    versions: dict[DataFile, tuple] | None = None,
) -> Source:
    """splits: files of "train" and "val". left_out: {name: why it is not used}. versions: of the content, if known."""
    chosen = [*splits["train"], *splits["val"]]
    try:
        look = _look(chosen, text_column, place)
    except ValueError as error:
        if txt := sum(why == files.TXT_BESIDE_TABLES for why in left_out.values()):
            raise ValueError(f"{error}; to read its {txt:,} txt files, name {place}/**/*.txt") from None
        raise
    check_unreadable(len(chosen), list(look.unreadable.values()))
    left_out |= {file.name: f"no text in a column {look.column}" for file in look.without}
    out = {*look.unreadable, *look.empty, *look.without}
    splits = {split: [file for file in of_split if file not in out] for split, of_split in splits.items()}
    if not splits["train"]:
        raise ValueError(f"{place} has no documents, these files are empty: {files.some([f.name for f in look.empty])}")
    (train, val), part, how = _hold_out(**splits)
    if versions is None:
        with ThreadPoolExecutor(THREADS) as pool:  # a request to an object store is a round trip
            versions = dict(zip(chosen, pool.map(lambda file: storage.version(file.uri), chosen), strict=True))
    shards = [_shards(files, look.column, part[i], versions) for i, files in enumerate((train, val))]
    if look.column or train is val:
        _check_documents(place, len(chosen), *shards)
    _print_files(place, train, val, look.column, how, left_out)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "source"
    contents = [(file.name, look.column, *versions[file]) for file in chosen if file not in out]
    return Source(
        name,
        *map(tuple, shards),
        storage.fingerprint(READING_VERSION, how, contents),
        files=len(chosen),
        unreadable=tuple(look.unreadable.values()),
        empty=tuple(file.name for file in look.empty),
    )


def _check_documents(place: str, num_files: int, train: list[Shard], val: list[Shard]) -> None:
    """Raises ValueError if there is no document to train on."""

    def some(shards: list[Shard], reading: Reading) -> bool:
        return any(True for shard in shards for _ in read_documents(shard, reading))

    reading = Reading()
    if not some(train, reading):
        check_unreadable(num_files, reading.unreadable)
        if some(val, reading):
            raise ValueError(f"{place} has only one document: add another, because validation needs one")
        raise ValueError(f"{place} has no documents: the text column is empty in all rows")


def _name(source: str) -> str:
    uri = storage.absolute(source)
    base = storage.name(uri)
    return base if storage.exists(uri) and storage.is_folder(uri) else files.stem(base)


@dataclass(frozen=True)
class Look:
    """What a first look into all files found."""

    column: str | None  # the text column; None for txt
    unreadable: dict[DataFile, str]  # damaged files, and what is wrong with them
    empty: list[DataFile]
    without: list[DataFile]  # files without the text column


def _look(chosen: list[DataFile], wanted: str | None, place: str) -> Look:
    def look(file: DataFile) -> tables.Schema | str | None:
        """The file's columns, or what is wrong with it, or None if it is empty."""
        try:
            if file.size == 0:
                return None
            if file.kind != "txt":
                return tables.schema(file.uri) or None
            return {} if any(chunk.strip() for chunk in files.text_chunks(file.uri)) else None
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        looks = dict(zip(chosen, pool.map(look, chosen), strict=True))
    schemas = {file: look for file, look in looks.items() if isinstance(look, dict) and file.kind != "txt"}
    column = tables.choose(list(schemas.values()), wanted, place) if schemas else None
    return Look(
        column,
        {file: look for file, look in looks.items() if isinstance(look, str)},
        [file for file, look in looks.items() if look is None],
        [file for file, schema in schemas.items() if column and not tables.has_text(schema, column)],
    )


def check_unreadable(num_files: int, unreadable: list[str]) -> None:
    """Raises ValueError with the first messages if too large a share of the files is unreadable."""
    if len(unreadable) > MAX_UNREADABLE_SHARE * num_files:
        of = f" ({len(unreadable):,} of {num_files:,} files can't be read)" if num_files > 1 else ""
        raise ValueError("; ".join(unreadable[:3]) + of)


def _hold_out(
    train: list[DataFile], val: list[DataFile]
) -> tuple[tuple[list[DataFile], list[DataFile]], tuple[str, str], str]:
    """((training files, validation files), (part of each), text that says what validation is)."""
    if val:
        return (train, val), ("all", "all"), "the split of that name"
    total, sizes = sum(file.size for file in train), [file.size for file in reversed(train)]
    held = list(accumulate(sizes))
    count = next(i for i, size in enumerate(held, 1) if size >= min(VAL_BYTES, VAL_SHARE * total))
    if held[count - 1] > (MAX_VAL_SHARE_ONE if count == 1 else MAX_VAL_SHARE_SEVERAL) * total:
        return (train, train), ("train", "val"), f"every {VAL_EVERY}th document"
    how = "the last file" if count == 1 else f"the last {count} files"
    return (train[:-count], train[-count:]), ("all", "all"), how


def _shards(chosen: list[DataFile], column: str | None, part: str, versions: dict) -> list[Shard]:
    """One shard per file. If there are many files, small ones share a shard, because a shard's last row is lost."""
    groups, size = [], GROUP_BYTES
    for file in chosen:
        if len(chosen) <= FEW_FILES or size >= GROUP_BYTES or len(groups[-1]) == GROUP_FILES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [
        Shard(
            first.uri,
            None if first.kind == "txt" else column,
            part,
            storage.fingerprint(READING_VERSION, *(versions[file] for file in (first, *more))),
            sum(file.size for file in (first, *more)),
            tuple(file.uri for file in more),
            0 if part == "all" else index,  # without an offset, the first document of each file would be validation
        )
        for index, (first, *more) in enumerate(groups)
    ]


def _print_files(
    place: str, train: list[DataFile], val: list[DataFile], column: str | None, how: str, left_out: dict
) -> None:
    """Print which files are used, and which are not and why."""

    def sizes(chosen: list[DataFile]) -> str:
        kinds = "/".join(sorted({file.kind for file in chosen}))
        size = sum(file.size for file in chosen)
        return f"{len(chosen):,} {kinds} file{'s' * (len(chosen) > 1)} of {size / 1e6:,.1f} MB"

    said = f"source: {place}: {sizes(train)}" + (f", column {column}" if column else "")
    held_out = how if train is val else f"{how}, {files.some([file.name for file in val], 2)}, {sizes(val)}"
    print(f"{said}; validation is {held_out}", flush=True)
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        print(f"source: {len(names):,} left out, {shown(why)}: {files.some(names, 10)}", flush=True)


def read_documents(shard: Shard, reading: Reading | None = None) -> Iterator[str]:
    """Stream the documents that are not empty.

    A txt file is split at <|endoftext|> if it has one, else at blank lines. A damaged file raises Unreadable that names
    the file and line; with `reading`, the message is added there and reading continues with the next file."""
    index = shard.offset
    for uri in (shard.uri, *shard.more):
        try:
            for text in _texts(uri, shard.text_column):
                if not text.strip():
                    if reading:
                        reading.blank += 1
                    continue
                if shard.part == "all" or (shard.part == "val") == (index % VAL_EVERY == 0):
                    yield text
                index += 1
        except Unreadable as error:
            if reading is None:
                raise
            reading.unreadable.append(str(error))


def _texts(uri: str, column: str | None) -> Iterator[str]:
    if column is None:
        marked = _has(files.text_chunks(uri), TXT_SEPARATOR)
        yield from _split_at_marks(uri) if marked else _split_at_blank_lines(uri)
        return
    for text in tables.texts(uri, column):
        yield text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, but UTF-8 can't


def _has(chunks: Iterator[str], mark: str) -> bool:
    end = ""
    for chunk in chunks:
        if mark in end + chunk:
            return True
        end = (end + chunk)[-len(mark) + 1 :]
    return False


def _split_at_marks(uri: str) -> Iterator[str]:
    document, end = [], ""  # `end`: the last characters read, which may be the beginning of a mark
    for chunk in files.text_chunks(uri):
        *ended, rest = (end + chunk).split(TXT_SEPARATOR)
        for text in ended:
            yield "".join([*document, text]).strip()
            document = []
        cut = max(0, len(rest) - len(TXT_SEPARATOR) + 1)
        document.append(rest[:cut])
        end = rest[cut:]
    yield "".join([*document, end]).strip()


def _split_at_blank_lines(uri: str) -> Iterator[str]:
    document = []
    for line in files.text_lines(uri):
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).strip()
            document = []
    yield "".join(document).strip()


def climbmix(shards: int) -> Source:
    """The first `shards` files of ClimbMix and its last one. Downloads those that are missing from the Hub.

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
    found = [Shard(storage.join(place, name), "text", version=CLIMBMIX, size=CLIMBMIX_TEXT_BYTES) for name in names]
    contents = storage.fingerprint(CLIMBMIX, names)
    return Source("climbmix", tuple(found[:-1]), tuple(found[-1:]), contents, len(names), most=CLIMBMIX_LAST)


def check_climbmix_room(shards: int) -> None:
    """Raises OSError if the disk has too little space for the missing ones of so many shards and their rows."""
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
    """(folder, names of the training shards and the last one, names of those that are missing)."""
    names = [f"shard_{i:05d}.parquet" for i in (*range(shards), CLIMBMIX_LAST)]
    place = storage.join(storage.home(), "sources", "climbmix")
    present = set(storage.listdir(place))
    return place, names, [name for name in names if name not in present]


def pydocs(roots: Sequence[str] | None = None) -> Source:
    """Docstrings of the standard library and the installed packages, as parquet with columns text and name.

    roots: folders to search, by default those of this environment. Shards of the same packages are reused."""
    roots = roots or sorted({sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")})
    packages = sorted({(d.name, d.version) for d in importlib.metadata.distributions(path=list(roots)) if d.name})
    print_of = storage.fingerprint(packages, platform.python_version(), docstrings.MIN_CHARS, docstrings.SHARDS)
    place = storage.join(storage.home(), "sources", f"pydocs-{print_of}")
    if not storage.exists(storage.join(place, "manifest.json")):
        docstrings.write_docstrings(roots, place)
    names = [f"shard_{i:05d}.parquet" for i in range(docstrings.SHARDS)]
    shards = [Shard(storage.join(place, name), "text", version=print_of) for name in names]
    return Source("pydocs", tuple(shards[:-1]), tuple(shards[-1:]), print_of, len(shards))
