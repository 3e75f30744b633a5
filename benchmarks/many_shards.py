"""What `prepare` costs besides tokenizing when a source has very many files: each here has two tiny documents.

python -m benchmarks.many_shards --files 100000                listing and planning, and the manifest
python -m benchmarks.many_shards --files 10000 --run           the whole of prepare
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat_ray import storage
from nanochat_ray.data import prepare
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.session import one_line_errors, start_ray


@dataclass
class Options:
    files: int = 10_000
    run: bool = False
    """Also tokenize and write the rows, by one task a file."""
    json: bool = False
    """End with one line of JSON."""


def measure(options: Options, folder: Path) -> dict:
    os.environ["NANOCHAT_RAY_HOME"] = str(folder / "home")
    (folder / "text").mkdir()
    for i in range(options.files):
        lines = [json.dumps({"text": f"document {j} of file {i}, with little to say. " * 4}) for j in range(2)]
        (folder / "text" / f"part_{i:06d}.jsonl").write_text("\n".join(lines))
    Tokenizer({bytes([i]): i for i in range(256)}).save(str(folder / "tokenizer"))
    arguments = prepare.PrepareOptions(str(folder / "text"), sequence_len=64, tokenizer=str(folder / "tokenizer"))
    seconds, start = {}, time.monotonic()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = time.monotonic() - start, time.monotonic()

    [source] = prepare.find_sources(arguments)
    lap("list and inspect")
    rows_uri = storage.join(storage.home(), "rows", "plan")
    jobs = prepare.plan_jobs(source, rows_uri)
    prepare.unfinished(jobs)
    lap("plan")
    counts = dict.fromkeys(("rows", "tokens", "cropped_tokens", "dropped_tokens", "documents", "bytes"), 1)
    for split in ("train", "val"):
        Path(rows_uri, split).mkdir(parents=True)
    for job in jobs:
        Path(job.counts_uri).write_text(json.dumps(counts))
    start = time.monotonic()
    splits = prepare._collect(jobs, rows_uri, 65, source)
    lap("collect")
    storage.write_json(storage.join(rows_uri, "manifest.json"), splits)
    result = {"files": options.files, "manifest_mb": storage.size(storage.join(rows_uri, "manifest.json")) / 1e6}
    if options.run:
        start = time.monotonic()
        prepare.run(arguments, [source])
        lap("run")
    return result | {f"{name}, s": round(value, 2) for name, value in seconds.items()}


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.run:
        start_ray()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    for name, value in result.items():
        print(f"{name:<22} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
