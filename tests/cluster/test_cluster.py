"""Training on several hosts, which are namespaces of this machine. Run by `make test-cluster`."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hosts import Cluster

from nanochat_ray.train.metrics import read_metrics


def can_make_hosts() -> bool:
    """Whether this process may make namespaces: root of a container may not."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        return False
    return (
        subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode == 0
    )


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        not can_make_hosts(), reason="hosts need Linux, root with the right to namespaces, and iproute2"
    ),
]
TINY = ["--depth=2", "--head-dim=32", "--total-batch-size=512", "--num-iterations=20", "--eval-every=5"]
TINY += ["--eval-tokens=1024", "--save-every=8", "--sample-every=0", "--dtype=float32", "--compile=False"]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def rows(cluster, golden) -> str:
    """Prepared on the cluster, into the home that its hosts share."""
    import pydoc_data.topics

    text = cluster.shared / "text"
    text.mkdir()
    paragraphs = [
        p for _, topic in sorted(pydoc_data.topics.topics.items()) for p in topic.split("\n\n") if len(p) > 80
    ]
    for i in range(3):
        lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs[i::3]]
        (text / f"part_{i}.jsonl").write_text("".join(lines))
    shutil.copytree(golden / "nanochat_d2", cluster.shared / "tokenizer")
    tokenizer = str(cluster.shared / "tokenizer")
    nanochat_ray(cluster, "prepare", f"--source={text}", "--sequence-len=64", f"--tokenizer={tokenizer}")
    [folder] = (cluster.shared / "home" / "rows").iterdir()
    return str(folder)


def nanochat_ray(cluster: Cluster, *command: str) -> str:
    return cluster.head.run("python", "-m", "nanochat_ray.cli", *command, env=cluster.env, timeout=300)


def test_two_hosts_train_as_one_does(cluster, rows):
    """Each host's name maps to 127.0.1.1, where no other host answers."""
    results = {}
    for workers in (1, 2):
        nanochat_ray(cluster, "pretrain", *TINY, f"--rows={rows}", f"--run=on-{workers}", f"--workers={workers}")
        lines = read_metrics(str(cluster.shared / "home" / "runs" / f"on-{workers}"))
        sizes = {line["train/world_size"] for line in lines if "train/world_size" in line}
        assert sizes == {workers}
        results[workers] = [line["val/bpb"] for line in lines if "val/bpb" in line]
    assert len(results[1]) == 5
    assert results[2] == pytest.approx(results[1], abs=1e-3)
