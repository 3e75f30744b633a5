import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.model import loss


@pytest.fixture
def inputs():
    """More tokens than one chunk of the patched size holds, some without a target, and logits that reach the cap."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(300, (50,))
    targets[5:9] = -1
    return hidden, weight, targets


def reference(hidden, weight, targets, reduction):
    capped = 15 * torch.tanh((hidden.double() @ weight.double().T) / 15)
    return F.cross_entropy(capped, targets, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_chunks_give_the_loss_and_gradients_of_the_whole(inputs, monkeypatch, chunk_tokens):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk_tokens)
    hidden, weight, targets = inputs
    total, losses = loss.cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(total / 7, (hidden, weight))
    expected = reference(hidden, weight, targets, "sum")
    torch.testing.assert_close(losses.double(), reference(hidden, weight, targets, "none"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.double(), expected, atol=1e-4, rtol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected / 7, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_without_gradients_the_losses_are_the_same(inputs):
    hidden, weight, targets = inputs
    total, losses = loss.cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        total_again, losses_again = loss.cross_entropy(hidden, weight, targets)
    assert torch.equal(losses, losses_again) and torch.equal(total, total_again)
    assert (losses[5:9] == 0).all()


def test_softcap_is_fifteen_tanh_of_a_fifteenth():
    x = torch.linspace(-200, 200, 4001)
    torch.testing.assert_close(loss.softcap(x), 15 * torch.tanh(x / 15), atol=4e-6, rtol=0)
    assert loss.softcap(x.bfloat16()).dtype == torch.float32


def test_chunks_of_a_micro_batch_on_a_gpu_are_few():
    """Each reads and writes the fp32 gradient of the head: a chunk of a CPU's size would make it 64 times."""
    tokens = vocab_size = 32768
    assert tokens // loss.chunk_size(vocab_size, on_gpu=True) == 4
    assert tokens // loss.chunk_size(vocab_size, on_gpu=False) == 64


def test_the_heads_gradient_is_summed_by_an_overload_that_exists():
    arguments = {a.name for a in torch.ops.aten.addmm.dtype_out._schema.arguments}
    assert {"self", "mat1", "mat2", "out_dtype", "out"} <= arguments
