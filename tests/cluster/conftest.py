"""Hosts of the tests' own, which the tests of a file share."""

import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Cluster


def can_make_hosts() -> bool:
    """Whether this process may make namespaces: root of a container may not."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        return False
    return (
        subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode == 0
    )


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_training.py")  # the longest, beside which the others run
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    why = "hosts need Linux, root with the right to namespaces, and iproute2"
    skip = pytest.mark.skipif(bool(here) and not can_make_hosts(), reason=why)
    for item in here:
        item.add_marker(pytest.mark.cluster)
        item.add_marker(skip)


@pytest.fixture(scope="module")
def cluster():
    """Three hosts of one CPU each."""
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def rows(cluster, golden) -> str:
    """Prepared on the cluster, into the home that its hosts share."""
    text = cluster.shared / "text"
    text.mkdir()
    paragraphs = [
        p for _, topic in sorted(pydoc_data.topics.topics.items()) for p in topic.split("\n\n") if len(p) > 80
    ]
    for i in range(3):
        lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs[i::3]]
        (text / f"part_{i}.jsonl").write_text("".join(lines))
    shutil.copytree(golden / "nanochat_d2", cluster.shared / "tokenizer")
    options = [f"--source={text}", "--sequence-len=64", f"--tokenizer={cluster.shared / 'tokenizer'}"]
    cluster.head.run("python", "-m", "nanochat_ray.cli", "prepare", *options, env=cluster.env, timeout=300)
    [folder] = (manifest.parent for manifest in (cluster.shared / "home" / "rows").glob("*/manifest.json"))
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(cluster, golden) -> list[str]:
    """Two of untrained models, which say anything for as long as they may."""
    import torch

    from nanochat_ray.data.tokenizer import Tokenizer
    from nanochat_ray.model.gpt import GPT, GPTConfig
    from nanochat_ray.train.checkpoint import save_checkpoint

    torch.manual_seed(0)
    tokenizer = Tokenizer.load(str(golden / "nanochat_d2"))
    model = GPT(GPTConfig(2048, tokenizer.vocab_size, 2, 2, 2, 64, "SL"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    head = torch.nn.init.normal_(model.lm_head.weight)
    head.data[[tokenizer.bos_id, tokenizer.special("<|assistant_end|>")]] = 0
    folders = [str(cluster.shared / name) for name in ("old", "new")]
    for folder in folders:
        save_checkpoint(folder, 1, model, None, tokenizer, {})
    return folders
