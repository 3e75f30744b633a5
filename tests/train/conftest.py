"""Tiny runs."""

import pytest

from nanochat_ray import storage
from nanochat_ray.train import pretrain
from nanochat_ray.train.pretrain import PretrainOptions


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
def mixed(rows) -> str:
    """A mixture of the same rows under two names."""
    manifest = storage.read_json(f"{rows}/manifest.json")
    beside, name = storage.parent(rows), storage.name(rows)
    manifest["mixture"] = [{"name": part, "rows": name, "weight": w} for part, w in (("topics", 0.7), ("again", 0.3))]
    storage.write_json(f"{beside}/topics+again/manifest.json", manifest)
    return f"{beside}/topics+again"


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
    """The result of a run to which nothing happened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RAY_HOME", str(tmp_path_factory.mktemp("home")))
        return pretrain.run(tiny(run="whole"))
