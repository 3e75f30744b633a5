"""Docstrings of the standard library and the installed packages, as parquet shards: text without a network."""

import ast
import gc
import hashlib
import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from nanochat_ray import storage

MIN_CHARS = 200  # shorter docstrings are skipped
SHARDS = 9  # the last is validation
CHUNK_BYTES = 2_000_000  # source code per task, because packages differ a hundredfold in size
SCHEMA = pa.schema([(column, pa.string()) for column in ("module", "name", "text", "origin")])
LONG_STRING = re.compile(rb"^[ \t]*[rRuU]?(\"\"\"|''').*?\1", re.M | re.S)
DEFINES = re.compile(rb"^(?:class|def|async def) ", re.M)
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def write_docstrings(roots: Sequence[str], place: str) -> None:
    """Write shard_00000.parquet … with columns text and name to the folder `place`, then manifest.json."""
    start = time.monotonic()
    # Send the source code to the tasks, because other nodes may have other packages.
    chunks = [ray.put(chunk) for chunk in _python_sources(roots)]
    found = ray.data.from_arrow_refs(chunks).map_batches(_docstrings, batch_format="pyarrow", batch_size=None)
    rows, next_line = [], 0
    for batch in found.iter_batches(batch_format="pyarrow", batch_size=None):
        rows += batch.to_pylist()
        if len(rows) >= next_line:
            print(f"pydocs: {len(rows):,} names read", flush=True)
            next_line = len(rows) + 50_000
    importers = defaultdict(set)
    for row in rows:
        if row["origin"]:
            importers[row["origin"], row["name"]].add(row["module"])
    names = {}
    for row in rows:
        if row["text"]:
            name = f"{_public_module(row['module'], row['name'], importers)}.{row['name']}".rstrip(".")
            names[row["text"]] = min(names.get(row["text"], name), name, key=lambda n: (n.count("."), n))
    # Sort by hash. This shuffles the texts, and the order does not depend on the order of files.
    texts = sorted(names, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(texts) < SHARDS:
        raise ValueError(f"only {len(texts)} docstrings in {', '.join(roots)}: use another source")
    for i in range(SHARDS):
        part = texts[len(texts) * i // SHARDS : len(texts) * (i + 1) // SHARDS]
        with storage.writing(storage.join(place, f"shard_{i:05d}.parquet")) as file:
            pq.write_table(pa.table({"text": part, "name": [names[t] for t in part]}), file, compression="zstd")
    characters = sum(map(len, texts))
    storage.write_json(storage.join(place, "manifest.json"), {"documents": len(texts), "characters": characters})
    seconds = time.monotonic() - start
    print(f"pydocs: {len(texts):,} docstrings, {characters:,} characters in {seconds:.0f} s", flush=True)


def _python_sources(roots: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of (module, is_package, source) for the Python files below the roots."""
    chunk, size = [], 0
    for root in roots:
        for path, folders, files in os.walk(root):
            # Skip tests: they are a sixth of the work and a fortieth of the text. Skip names that can't be imported.
            folders[:] = sorted(f for f in folders if f.isidentifier() and f not in ("__pycache__", "test", "tests"))
            for name in sorted(f.removesuffix(".py") for f in files if f.endswith(".py")):
                is_package = name == "__init__"
                module = ".".join([*Path(path).relative_to(root).parts, *([] if is_package else [name])])
                if not name.isidentifier() or not module:
                    continue
                try:
                    source = Path(path, f"{name}.py").read_bytes()
                except OSError:
                    continue
                chunk.append({"module": module, "is_package": is_package, "source": source})
                size += len(source)
                if size >= CHUNK_BYTES:
                    yield pa.Table.from_pylist(chunk)
                    chunk, size = [], 0
    if chunk:
        yield pa.Table.from_pylist(chunk)


def _docstrings(sources: pa.Table) -> pa.Table:
    """Parse modules. Returns one row per docstring (text), and one per name imported within its package (origin)."""
    rows: list[tuple] = []
    gc.disable()  # syntax trees have no cycles, and looking for them costs a seventh of the time
    for module, is_package, source in zip(*(sources[key].to_pylist() for key in sources.column_names), strict=True):
        long_string = any(len(m[0]) >= MIN_CHARS for m in LONG_STRING.finditer(source))
        if not (long_string or is_package or DEFINES.search(source) is None):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about invalid escapes in the parsed source
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node, name in _walk(tree):
            if not isinstance(node, ast.ImportFrom):
                text = ast.get_docstring(node) or ""
                if len(text) >= MIN_CHARS:
                    # A literal can hold half a surrogate pair, but UTF-8 can't.
                    rows.append((module, name, text.encode(errors="replace").decode(), None))
            elif not name and (origin := _origin(node, module, is_package)):
                rows += [(module, item.name, None, origin) for item in node.names if item.asname in (None, item.name)]
    gc.enable()
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str | None:
    """The full name of the imported module if it belongs to the same top-level package, else None."""
    parts = module.split(".")
    parents = parts[: len(parts) - node.level + is_package] if node.level else []
    origin = ".".join(filter(None, [*parents, node.module]))
    return origin if origin.split(".")[0] == parts[0] else None


def _walk(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """The module, classes, functions and `from … import …` nodes, each with its dotted name inside the module."""
    stack = [(tree, "")]
    while stack:
        node, name = stack.pop()
        if isinstance(node, DEFINITION):
            name = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, (ast.Module, *DEFINITION, ast.ImportFrom)):
            yield node, name
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            stack += [(child, name) for child in getattr(node, block, ())]


def _public_module(module: str, name: str, importers: dict[tuple[str, str], set[str]]) -> str:
    """The highest parent package that exports `name`: numpy for argsort of numpy._core.fromnumeric.

    importers: {(module, name or "*"): the modules that run `from module import name`}."""
    leaf = name.split(".")[0]
    reached, frontier = {module}, [module] if leaf else []
    while frontier:
        origin = frontier.pop()
        new = importers.get((origin, leaf), set()) | importers.get((origin, "*"), set())
        frontier += new - reached
        reached |= new
    return min((m for m in reached if f"{module}.".startswith(f"{m}.")), key=len)
