"""Near duplicates by datatrove and by datasketch, run by benchmarks/clean.py with a Python that has both. Prints {name:
{"seconds": …, "dropped": [documents]}} as one line."""

import json
import os
import sys
import tempfile
import time

from datasketch import MinHash, MinHashLSH
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.typeshelper import Languages


def by_datasketch(texts: list[str]) -> list[int]:
    """A document that a query finds another for is dropped: in its index are those before it."""
    index, dropped = MinHashLSH(params=(14, 8), num_perm=112), []
    for number, text in enumerate(texts):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        signature = MinHash(num_perm=112)
        signature.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))])
        if index.query(signature):
            dropped.append(number)
        index.insert(number, signature)
    return dropped


def by_datatrove(texts: list[str]) -> list[int]:
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/in")
        with open(f"{folder}/in/texts.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts))
        read, config_of = JsonlReader(f"{folder}/in"), {"config": config}
        stages = [
            [read, MinhashDedupSignature(f"{folder}/signatures", **config_of, language=Languages.english)],
            [MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", **config_of)],
            [MinhashDedupCluster(f"{folder}/buckets", f"{folder}/clusters", **config_of)],
            [read, MinhashDedupFilter(f"{folder}/clusters"), JsonlWriter(f"{folder}/out", compression=None)],
        ]
        for number, stage in enumerate(stages):
            tasks = config.num_buckets if number == 1 else 1
            LocalPipelineExecutor(stage, tasks=tasks, workers=1, logging_dir=f"{folder}/log{number}").run()
        [name] = os.listdir(f"{folder}/out")
        with open(f"{folder}/out/{name}") as file:
            kept = {int(json.loads(line)["id"]) for line in file}
    return [i for i in range(len(texts)) if i not in kept]


def main() -> None:
    with open(sys.argv[1]) as file:
        texts = json.load(file)
    found = {}
    for name, function in (("datasketch", by_datasketch), ("datatrove", by_datatrove)):
        began = time.process_time()
        dropped = function(texts)
        found[name] = {"seconds": time.process_time() - began, "dropped": dropped}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
