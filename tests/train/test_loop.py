"""Steps of the loop by themselves, on stand-ins for what is around them."""

from types import SimpleNamespace

import pytest
import torch

from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.train import loop
from nanochat_ray.train.loop import Diverged, start_save, train_step, write_samples


class Says:
    """In place of the monitor: what it is told."""

    def __init__(self):
        self.lines = []
        self.say = SimpleNamespace(remote=self.lines.append)


def test_samples_that_fail_are_said_and_do_not_end_a_run(monkeypatch):
    def sample(worker):
        raise TypeError("varlen_attn() got an unexpected keyword argument\nand a page of traceback")

    monkeypatch.setattr(loop, "sample", sample)
    monitor = Says()
    write_samples(SimpleNamespace(progress=SimpleNamespace(step=7)), monitor)
    assert monitor.lines == [
        "samples of step 7 are not written: TypeError: varlen_attn() got an unexpected keyword argument"
    ]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_weight_that_is_not_finite_stops_a_save(wrong):
    model = GPT(GPTConfig(16, 64, 2, 2, 2, 32)).set_compute_dtype(torch.bfloat16)
    with torch.no_grad():
        model.transformer.wte.weight[3, 4] = wrong
    worker = SimpleNamespace(
        config=None,
        progress=SimpleNamespace(step=7),
        model=model,
        optimizer=build_optimizer(model, **BASE_LRS, weight_decay=0.0),
        device=torch.device("cpu"),
        world_size=1,
    )
    with pytest.raises(Diverged, match="step 7"):
        start_save(worker, None)


def test_the_optimizer_waits_for_the_copies_of_a_checkpoint(monkeypatch):
    """On a GPU these are taken while the forward and backward run; then the weights are overwritten."""
    order = []
    monkeypatch.setattr(loop, "forward_backward", lambda worker: order.append("gradients") or (torch.zeros(()), 1.0))
    monkeypatch.setattr(loop, "set_rates", lambda *_: None)

    def update():
        order.append("update")
        raise InterruptedError

    worker = SimpleNamespace(
        config=None,
        rank=1,
        progress=SimpleNamespace(step=7),
        device=torch.device("cpu"),
        writer=SimpleNamespace(wait_for_copies=lambda: order.append("copied")),
        optimizer=SimpleNamespace(step=update),
    )
    with pytest.raises(InterruptedError):
        train_step(worker, 1.0, None)
    assert order == ["gradients", "copied", "update"]
