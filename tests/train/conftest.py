"""A few thousand real tokens as rows, and tiny runs on them."""

import json
import pydoc_data.topics

import pytest

from nanochat_ray.data import prepare
from nanochat_ray.train import pretrain
from nanochat_ray.train.pretrain import PretrainOptions


@pytest.fixture(scope="session")
def rows(tmp_path_factory, golden, ray_session):
    """Rows of 65 tokens from the standard library's help texts, with nanochat's reference tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts = [paragraph for text in topics for paragraph in text.split("\n\n") if len(paragraph) > 80]
    for i, part in enumerate((texts[::3], texts[1::3], texts[2::9])):
        (folder / f"part_{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RAY_HOME", str(tmp_path_factory.mktemp("home")))
        options = prepare.PrepareOptions(str(folder), sequence_len=64, tokenizer=str(golden / "nanochat_d2"))
        return prepare.run(options).rows


@pytest.fixture(scope="session")
def tiny(rows):
    """Options of a run that takes a second, but for starting its workers."""

    def options(**changes) -> PretrainOptions:
        defaults = {
            "depth": 2,
            "rows": rows,
            "head_dim": 32,
            "total_batch_size": 8 * 64,
            "num_iterations": 20,
            "eval_every": 5,
            "eval_tokens": 1024,
            "save_every": 8,
            "sample_every": 0,
            "dtype": "float32",
            "compile": False,
        }
        return PretrainOptions(**defaults | changes)

    return options


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    """The result of a run to which nothing happened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RAY_HOME", str(tmp_path_factory.mktemp("home")))
        return pretrain.run(tiny(run="whole"))
