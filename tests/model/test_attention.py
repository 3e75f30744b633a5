import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.model.attention import _attention_by_blocks, attention, sliding_window_mask


def inputs(T: int, heads: int = 4, kv_heads: int = 4):
    """Heads normed as the model's are."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, heads, 16), torch.randn(2, T, kv_heads, 16), torch.randn(2, T, kv_heads, 16)
    q, k = (1.2 * F.rms_norm(x, (16,)) for x in (q, k))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def plain(q, k, v, window):
    """Every score at once, as the definition has it."""
    T, groups = q.size(1), q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 16**0.5
    visible = sliding_window_mask(torch.arange(T), torch.arange(T), window)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("T", "window"), [(300, 300), (300, 128), (300, 1), (256, 0), (128, 128), (5, 2), (1, 7)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_and_sdpa_are_the_definition(T, window, kv_heads):
    q, k, v = inputs(T, 4, kv_heads)
    expected = plain(q, k, v, window)
    gradient = torch.randn_like(expected)
    by_blocks = _attention_by_blocks(*(x.transpose(1, 2) for x in (q, k, v)), window).transpose(1, 2)
    for y in (attention(q, k, v, window), by_blocks):
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        ours = torch.autograd.grad(y, (q, k, v), gradient, retain_graph=True)
        theirs = torch.autograd.grad(expected, (q, k, v), gradient, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
