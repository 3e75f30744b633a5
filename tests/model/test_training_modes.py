"""Compiling and recomputing change how gradients are found, not what they are."""

import pytest
import torch

from nanochat_ray.model.gpt import GPT, GPTConfig


def gradients(model, idx, targets):
    loss = model(idx, targets, loss_reduction="sum")
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(160, 300, 2, 2, 2, 64, "SL"))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():  # projections that start at zero would hide the rest
            p.add_(0.02 * torch.randn_like(p))
    return model


@pytest.fixture
def batch():
    idx = torch.randint(300, (2, 160))
    targets = idx.roll(-1, 1)
    targets[0, :9] = -1
    return idx, targets


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-3, rtol=1e-5)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-5, name


def test_recomputing_gives_the_same_gradients(model, batch):
    kept = gradients(model, *batch)
    model.recompute = True
    assert_same(gradients(model, *batch), kept)


def test_reductions_agree_and_all_have_gradients(model, batch):
    idx, targets = batch
    each = model(idx, targets, loss_reduction="none")
    total = model(idx, targets, loss_reduction="sum")
    mean = model(idx, targets)
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(total / (targets >= 0).sum(), mean)
    weight = model.lm_head.weight
    of_each = torch.autograd.grad(each.sum(), weight)[0]
    torch.testing.assert_close(of_each, torch.autograd.grad(total, weight)[0], atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients(model, batch, device):
    model, batch = model.to(device), [x.to(device) for x in batch]
    eager = gradients(model, *batch)
    model.compile_for_training()
    assert_same(gradients(model, *batch), eager)
    model.recompute = True
    assert_same(gradients(model, *batch), eager)
