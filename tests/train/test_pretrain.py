"""Real TorchTrainer runs on tiny models."""

from pathlib import Path

import pytest
from runs import assert_every_row_once, kept, losses, steps

from nanochat_ray import storage
from nanochat_ray.train import checkpoint, pretrain
from nanochat_ray.train.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_a_run_learns_and_leaves_what_the_design_says(uninterrupted, tiny):
    run_dir = Path(uninterrupted.run_dir)
    bpb = {line["step"]: line["val/bpb"] for line in read_metrics(str(run_dir)) if "val/bpb" in line}
    assert list(bpb) == [0, 5, 10, 15, 20]
    assert bpb[20] == uninterrupted.val_bpb < bpb[0]
    assert_every_row_once(run_dir, 20, 8)
    last = steps(run_dir)[-1]
    named = "total_training_flops total_training_time train/lrm train/dt train/tok_per_sec train/mfu train/epoch"
    assert all(name in last for name in [*named.split(), "train/peak_memory_mb"])
    assert 0 < last["train/mfu"] < 1
    # The last two checkpoints are kept, and with them the best, which here is the last.
    assert kept(run_dir) == ["step_000016", "step_000020"]
    assert "## step 20" in (run_dir / "samples.md").read_text()
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".pkl", ".pt", ".tmp")]


def test_lr_factor_is_of_every_rate(tiny, monkeypatch):
    monkeypatch.setattr(pretrain, "train", lambda config, *_: config)
    one, four = [pretrain.run(tiny(run=f"x{factor}", lr_factor=factor)).lrs for factor in (1.0, 4.0)]
    assert four == {name: pytest.approx(4 * lr) for name, lr in one.items()}


def test_a_finished_run_is_not_run_again(uninterrupted, tiny, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_RAY_HOME", str(Path(uninterrupted.run_dir).parents[1]))
    before = (Path(uninterrupted.checkpoint) / "meta.json").stat().st_mtime_ns
    assert pretrain.run(tiny(run="whole")).val_bpb == uninterrupted.val_bpb
    assert "nothing to do" in capsys.readouterr().out
    assert (Path(uninterrupted.checkpoint) / "meta.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"num_iterations 20, not num_iterations 21"):
        pretrain.run(tiny(run="whole", num_iterations=21))


def test_two_workers_learn_what_one_does(uninterrupted, tiny):
    """Same rows, same losses; and what two began, one can finish."""
    two = pretrain.run(tiny(run="two", workers=2))
    of_one, of_two = losses(uninterrupted.run_dir), losses(two.run_dir)
    assert max(abs(of_one[step] - of_two[step]) for step in range(1, 21)) < 1e-3
    assert abs(uninterrupted.val_bpb - two.val_bpb) < 1e-3
    storage.remove(two.checkpoint)
    assert len(list(Path(checkpoint.latest_checkpoint(two.run_dir)).glob("optimizer_*.safetensors"))) == 2
    again = pretrain.run(tiny(run="two", workers=1))
    assert abs(losses(again.run_dir)[20] - of_one[20]) < 1e-3
