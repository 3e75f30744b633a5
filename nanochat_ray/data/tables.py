"""Columns of data files: their types, the choice of the text column, and its values as a stream."""

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray import storage
from nanochat_ray.data.files import Unreadable, kind_of, naming, shown, text_chunks, text_lines

TEXT_COLUMNS = ("text", "content", "document", "body")  # the first that exists is the default
JOINT = "\n\n"  # between the strings of a list
SAMPLE_RECORDS = 20  # records of a JSON file that are read to find its columns
BATCH_ROWS = 256
DELIMITERS = ",\t;|"
NO_OBJECT = "is not a JSON object (a row is one object)"
FIRST_LINES = 3  # a file is JSON lines if one of its first lines is JSON
# Matches a file that is one JSON array of messages, or has one such array per line.
LISTS_OF_MESSAGES = re.compile(r'\s*\[\s*\{(?:\s*"(?:content|value)"|[^{}\[\]]*"(?:role|from)")\s*:')
SPACES, COMMAS = re.compile(r"\s*"), re.compile(r"[\s,]*")

Schema = dict[str, pa.DataType]


# Choosing a column


def choose(schemas: list[Schema], wanted: str | None, place: str) -> str:
    """The text column of a data set: `wanted`, else the first of TEXT_COLUMNS that exists.

    A column is a name or a path: body.text is a field of a struct, parts[] the joined strings of a list.
    Raises ValueError that lists the columns with their types."""
    merged: Schema = {}
    for schema in schemas:
        merged = {**merged, **{name: merge(merged.get(name, pa.null()), kind) for name, kind in schema.items()}}
    candidates = [wanted] if wanted else [name for name in TEXT_COLUMNS if name in merged]
    if candidates and any(is_text(type_at(schema, candidates[0]), bool(wanted)) for schema in schemas):
        return candidates[0]
    listed = ", ".join(f"{name} ({kind})" for name, kind in merged.items())
    paths = [path for name, kind in merged.items() for path in text_paths(name, kind)]
    try_paths = f"; try {' or '.join(paths[:4])}" if paths else ""
    if candidates:
        kind = type_at(merged, candidates[0])
        what = f"no column {candidates[0]}" if kind is None else f"a column {candidates[0]} that is not text ({kind})"
    else:
        what = f"no column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}"
    raise ValueError(shown(f"{place} has {what}: name the text column with --text-column: {listed}{try_paths}"))


def has_text(schema: Schema, column: str) -> bool:
    return is_text(type_at(schema, column), True)


def is_text(kind: pa.DataType | None, or_bytes: bool = False) -> bool:
    """Whether values are strings or null. or_bytes: accept bytes, too."""
    if kind is None:
        return False
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type, or_bytes)
    strings = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null
    binary = pa.types.is_binary, pa.types.is_large_binary
    return any(check(kind) for check in (*strings, *(binary if or_bytes else ())))


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def steps(path: str) -> list[str]:
    """The steps of a path: a.parts[] -> ["a", "parts", "[]"]."""
    return re.findall(r"\[\]|[^.\[\]]+", path)


def type_at(schema: Schema, path: str) -> pa.DataType | None:
    """The type of a column, or of the values that a path selects; None if the path selects nothing."""
    if path in schema:
        return schema[path]
    name, *rest = steps(path) or [path]
    kind = schema.get(name)
    for step in rest:
        if kind is None:
            return None
        if step == "[]":
            kind = kind.value_type if is_list(kind) else None
        else:
            index = kind.get_field_index(step) if pa.types.is_struct(kind) else -1
            kind = kind.field(index).type if index >= 0 else None
    return kind


def text_paths(name: str, kind: pa.DataType) -> list[str]:
    """The paths below a struct or list column that select strings."""
    if is_list(kind):
        below = {f"{name}[]": kind.value_type}
    elif pa.types.is_struct(kind):
        below = {f"{name}.{kind.field(i).name}": kind.field(i).type for i in range(kind.num_fields)}
    else:
        return []
    return [path for key, value in below.items() for path in ([key] if is_text(value) else text_paths(key, value))]


def text_at(value, path: list[str]) -> str:
    """The text that a path selects within a value; "" for null. Raises TypeError if it is not text."""
    if value is None:
        return ""
    if not path:
        if isinstance(value, bytes):
            return value.decode()
        if not isinstance(value, str):
            raise TypeError
        return value
    step, *rest = path
    if step == "[]":
        if not isinstance(value, list):
            raise TypeError
        return JOINT.join(filter(None, (text_at(item, rest) for item in value)))
    if not isinstance(value, dict):
        raise TypeError
    return text_at(value.get(step), rest)


# Schemas


def schema(uri: str) -> Schema:
    """The columns of a parquet, arrow, csv or JSON file. JSON's come from the first records. Empty without rows.

    Raises Unreadable if even these can't be read."""
    kind = kind_of(uri)
    if kind in ("parquet", "arrow"):
        with naming(uri), storage.reading(uri) as f:
            file = pq.ParquetFile(f) if kind == "parquet" else None
            arrow = file.schema_arrow if file else _arrow_reader(f).schema
            empty = file is not None and not file.metadata.num_rows
        return {} if empty else {field.name: field.type for field in arrow}
    if kind == "csv":
        return {name: pa.string() for name in _csv_header(uri)}
    sampled: Schema = {}
    found = 0
    try:
        for line, record in json_values(uri):
            if not isinstance(record, dict):
                raise Unreadable(f"cannot read {shown(uri)}: line {line} {NO_OBJECT}")
            sampled = {**sampled, **{k: merge(sampled.get(k, pa.null()), json_type(v)) for k, v in record.items()}}
            if (found := found + 1) == SAMPLE_RECORDS:
                break
    except Unreadable:  # reading the whole file will find the error again and count it
        if not found:
            raise
    return sampled


def json_type(value) -> pa.DataType:
    if isinstance(value, dict):
        return pa.struct([(key, json_type(item)) for key, item in value.items()])
    if isinstance(value, list):
        kind = pa.null()
        for item in value[:SAMPLE_RECORDS]:
            kind = merge(kind, json_type(item))
        return pa.list_(kind)
    if value is None:
        return pa.null()
    return {str: pa.string(), bool: pa.bool_(), int: pa.int64()}.get(type(value), pa.float64())


def merge(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """A common type: text if one of them is text, a struct with the fields of both."""
    if pa.types.is_null(a) or a == b:
        return b
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {a.field(i).name: a.field(i).type for i in range(a.num_fields)}
        for i in range(b.num_fields):
            fields[b.field(i).name] = merge(fields.get(b.field(i).name, pa.null()), b.field(i).type)
        return pa.struct(list(fields.items()))
    if is_list(a) and is_list(b):
        return pa.list_(merge(a.value_type, b.value_type))
    return b if is_text(b) and not pa.types.is_null(b) else a


# Values


def texts(uri: str, column: str) -> Iterator[str]:
    """The text of each row; "" for null. Raises Unreadable that names the file and the line or row."""
    path = steps(column)
    for where, name, value in values(uri, column):
        try:
            yield text_at(value, [] if name == column else path[1:])
        except TypeError:
            raise Unreadable(f"cannot read {shown(uri)}: {where} has no string {column!r}") from None
        except UnicodeDecodeError:
            raise Unreadable(f"cannot read {shown(uri)}: {where} of {column!r} is not UTF-8") from None


def values(uri: str, column: str) -> Iterator[tuple[str, str, object]]:
    """(line or row, column name, value) of each row. column: a column, or a path that begins with one."""
    kind = kind_of(uri)
    first = (steps(column) or [column])[0]
    if kind in ("parquet", "arrow"):
        yield from _arrow_values(uri, kind, column, first)
        return
    if kind == "csv":
        records = _csv_records(uri)
    else:
        records = ((f"line {number}", record) for number, record in json_values(uri))
    for where, record in records:
        if not isinstance(record, dict):
            raise Unreadable(f"cannot read {shown(uri)}: {where} {NO_OBJECT}")
        name = column if column in record else first
        if name not in record:
            raise Unreadable(f"cannot read {shown(uri)}: {where} has no string {column!r}")
        yield where, name, record[name]


def records(uri: str, columns: Sequence[str]) -> Iterator[tuple[str, object]]:
    """(line or row, {column: value}) of each row, with the columns that exist. For JSON: (line, whole value).

    If a line of JSON lines is not JSON, its value is an Unreadable. A JSON file that is one array of messages is one
    value; of any other array, each element is a value."""
    kind = kind_of(uri)
    if kind == "csv":
        yield from _csv_records(uri)
    elif kind == "json":
        lone = LISTS_OF_MESSAGES.match(next(text_chunks(uri), "")) is not None
        for number, value in json_values(uri, split_arrays=not lone, keep_errors=True):
            yield f"line {number}", value
    else:
        batches = _arrow_batches_of(uri, kind, columns)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"row {row}", record) for row, record in enumerate(rows, 1))


def _arrow_values(uri: str, kind: str, column: str, first: str) -> Iterator[tuple[str, str, object]]:
    row = 0
    for batch in _arrow_batches_of(uri, kind, (column, first)):
        name = column if column in batch.schema.names else first
        for value in batch.column(name).to_pylist():
            row += 1
            yield f"row {row}", name, value


def _arrow_batches_of(uri: str, kind: str | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches with the columns that exist. Raises Unreadable that lists the file's columns if none exists."""
    with naming(uri), storage.reading(uri) as f:
        # pre_buffer would read the whole file into memory.
        file = pq.ParquetFile(f, pre_buffer=False) if kind == "parquet" else _arrow_reader(f)
        schema = file.schema_arrow if kind == "parquet" else file.schema
        if not (there := [name for name in dict.fromkeys(columns) if name in schema.names]):
            listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise Unreadable(f"{shown(uri)} has no column {' or '.join(columns)}; its columns: {listed}")
        if kind == "parquet":
            yield from file.iter_batches(BATCH_ROWS, columns=there)
        else:
            yield from (batch.select(there) for batch in _arrow_batches(file))


def _arrow_reader(f) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    """A reader for both Arrow formats: files with an index at the end, and streams, which `datasets` writes."""
    head = f.read(6)
    f.seek(0)
    return pa.ipc.open_file(f) if head == b"ARROW1" else pa.ipc.open_stream(f)


def _arrow_batches(reader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _csv_header(uri: str) -> list[str]:
    return [name.strip() for name in next(_csv_rows(uri), (0, []))[1]]


def _csv_rows(uri: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields), the header first. The delimiter is the one most frequent in the header; a tab for .tsv."""
    lines = text_lines(uri)
    header = next(lines, "")
    is_tsv = ".tsv" in storage.name(uri).lower()
    delimiter = "\t" if is_tsv else max(DELIMITERS, key=header.count)
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise Unreadable(f"cannot read {shown(uri)}: line {reader.line_num}: {error}") from None


def _csv_records(uri: str) -> Iterator[tuple[str, dict]]:
    rows = _csv_rows(uri)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    for line, row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise Unreadable(f"cannot read {shown(uri)}: line {line} has {len(row)} fields, the header {len(header)}")
        yield f"line {line}", dict(zip(header, row, strict=True))


def json_values(uri: str, split_arrays: bool = True, keep_errors: bool = False) -> Iterator[tuple[int, object]]:
    """(line, value) of JSON lines, of an array, or of a sequence of objects that span lines.

    split_arrays: if the file is an array, its elements are the values. Raises Unreadable that names the line. With
    keep_errors, the Unreadable is the value of a line that is not JSON, if other lines are."""
    opening = next((text.lstrip()[0] for text in text_chunks(uri) if text.strip()), "")
    if opening == "[" and split_arrays:
        yield from _json_sequence(uri, split_arrays)
        return
    lines = ((n, line) for n, line in enumerate(text_lines(uri), 1) if line.strip())
    first = list(islice(lines, FIRST_LINES if keep_errors else 1))
    if first and not any(_is_json(line) for _, line in first):
        yield from _json_sequence(uri, split_arrays)
        return
    for n, line in chain(first, lines):
        try:
            yield n, json.loads(line)
        except (ValueError, RecursionError) as error:
            wrong = Unreadable(f"cannot read {shown(uri)}: line {n} is not JSON: {error}")
            if not keep_errors:
                raise wrong from None
            yield n, wrong


def _is_json(line: str) -> bool:
    """Whether a line is an object or an array."""
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _json_sequence(uri: str, split_arrays: bool) -> Iterator[tuple[int, object]]:
    """Values separated by white space, or by commas in an array. If one is incomplete, it reads twice as much text."""
    decoder, chunks = json.JSONDecoder(), text_chunks(uri)
    buffer, at, line, wanted, ended, in_array = "", 0, 1, 1 << 20, False, False
    while True:
        between = (COMMAS if in_array else SPACES).match(buffer, at).end()  # ty: ignore[missing-union-attribute]
        line, at = line + buffer.count("\n", at, between), between
        bracket = split_arrays and buffer[at : at + 1] == ("]" if in_array else "[")
        if bracket:
            in_array, at = not in_array, at + 1
            continue
        if at < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, at)
            except (json.JSONDecodeError, RecursionError) as error:
                place, message = getattr(error, "pos", at), getattr(error, "msg", str(error))
                cut = message.startswith("Unterminated") or place > len(buffer) - 16
                if ended or not cut:
                    wrong = line + buffer.count("\n", at, place)
                    raise Unreadable(f"cannot read {shown(uri)}: line {wrong} is not JSON: {message}") from None
            else:
                yield line, value
                line, at = line + buffer.count("\n", at, end), end
                continue
        if ended:
            if in_array:
                raise Unreadable(f"cannot read {shown(uri)}: line {line} is not JSON: the array has no end")
            return
        parts, size = [buffer[at:]], 0
        while size < wanted and (chunk := next(chunks, None)) is not None:
            parts.append(chunk)
            size += len(chunk)
        buffer, at, ended = "".join(parts), 0, size < wanted
        wanted = max(1 << 20, len(buffer))
