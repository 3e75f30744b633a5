"""What tests of runs look at."""

from pathlib import Path

from safetensors.torch import load_file

from nanochat_ray.train import checkpoint
from nanochat_ray.train.metrics import read_metrics


def steps(run_dir) -> list[dict]:
    """The lines of metrics.jsonl that optimizer steps wrote."""
    return [line for line in read_metrics(str(run_dir)) if "train/loss" in line]


def losses(run_dir) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in steps(run_dir)}


def weights(run_dir) -> dict:
    return load_file(Path(checkpoint.latest_checkpoint(str(run_dir))) / "model.safetensors")


def kept(run_dir) -> list[str]:
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def assert_same_weights(run_dir, other) -> None:
    theirs = weights(other)
    for name, tensor in weights(run_dir).items():
        assert tensor.equal(theirs[name]), name


def assert_every_row_once(run_dir, num_iterations: int, rows_per_step: int) -> None:
    """One line for each step, and each step began at the row where the one before ended."""
    lines = steps(run_dir)
    assert [line["step"] for line in lines] == list(range(1, num_iterations + 1))
    assert [line["train/position"] for line in lines] == list(range(0, num_iterations * rows_per_step, rows_per_step))
