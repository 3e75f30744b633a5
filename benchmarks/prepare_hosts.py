"""Data preparation on 1, 2 and 3 hosts of a CPU each, which are namespaces of this machine. Needs root.

The hosts share this machine's cores: with fewer cores than hosts the last ones can add nothing.

    python -m benchmarks.prepare_hosts --megabytes 100
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from nanochat_ray.data import sources
from nanochat_ray.data.tokenizer import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))
from hosts import BIN, Cluster


@dataclass
class Options:
    hosts: tuple[int, ...] = (1, 2, 3)
    megabytes: float = 100
    """Of docstrings, repeated to this size."""
    files: int = 25


def write_text(folder: Path, options: Options) -> None:
    texts = [text for shard in sources.resolve("pydocs").train for text in sources.read_documents(shard)]
    size = sum(map(len, texts))
    texts = texts * max(1, round(options.megabytes * 1e6 / size))
    folder.mkdir()
    for i in range(options.files):
        pq.write_table(pa.table({"text": texts[i :: options.files]}), folder / f"part_{i:03d}.parquet")


def measure(num_hosts: int, options: Options) -> dict:
    with Cluster(num_hosts) as cluster:
        os.environ["NANOCHAT_RAY_HOME"] = cluster.env["NANOCHAT_RAY_HOME"]
        text, tokenizer = cluster.shared / "text", cluster.shared / "tokenizer"
        write_text(text, options)
        train(sources.read_documents(sources.resolve(str(text)).train[0]), 32768).save(str(tokenizer))
        command = [str(BIN / "python"), "-m", "nanochat_ray.cli", "prepare", f"--source={text}"]
        began = time.monotonic()
        said = cluster.head.run(*command, f"--tokenizer={tokenizer}", env=cluster.env, timeout=600)
        seconds = time.monotonic() - began
    speed = re.findall(r"([\d,]+) tokens/s", said)[-1]
    return {"hosts": num_hosts, "tokens/s": speed, "the whole command": f"{seconds:.1f} s"}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table("hosts", "tokens/s", "the whole command")
    for num_hosts in options.hosts:
        table.add_row(*map(str, measure(num_hosts, options).values()))
    Console().print(table)


if __name__ == "__main__":
    main()
