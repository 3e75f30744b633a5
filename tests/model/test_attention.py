import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.model.attention import (
    _attention_by_blocks,
    attention,
    available_backends,
    sliding_window_mask,
    window_mask,
)


def inputs(T: int, heads: int = 4, kv_heads: int = 4, dim: int = 16, device="cpu", dtype=torch.float32):
    """Heads normed as the model's are."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, heads, dim), torch.randn(2, T, kv_heads, dim), torch.randn(2, T, kv_heads, dim)
    q, k = (1.2 * F.rms_norm(x, (dim,)) for x in (q, k))
    return tuple(x.to(device, dtype).requires_grad_() for x in (q, k, v))


def plain(q, k, v, window):
    """Every score at once, as the definition has it."""
    T, groups = q.size(1), q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    positions = torch.arange(T, device=q.device)
    visible = sliding_window_mask(positions, positions, window)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("T", "window"), [(300, 300), (300, 128), (300, 1), (256, 0), (128, 128), (5, 2), (1, 7)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_and_sdpa_are_the_definition(T, window, kv_heads, device):
    q, k, v = inputs(T, 4, kv_heads, device=device)
    expected = plain(q, k, v, window)
    gradient = torch.randn_like(expected)
    results = [attention(q, k, v, window)]
    if device.type == "cpu":
        results.append(_attention_by_blocks(*(x.transpose(1, 2) for x in (q, k, v)), window).transpose(1, 2))
    for y in results:
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        ours = torch.autograd.grad(y, (q, k, v), gradient, retain_graph=True)
        theirs = torch.autograd.grad(expected, (q, k, v), gradient, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["blocks", "sdpa", "flex", "flash-attn-2", "flash-attn-3", "flash-attn-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [128, 512])
def test_every_back_end_is_the_definition(backend, dtype, window, device):
    """Compiled, as in training. bf16 is compared with the definition in fp64 of the same rounded inputs."""
    if backend not in available_backends(device, dtype):
        pytest.skip(f"{backend} is not available here")
    torch._dynamo.reset()
    q, k, v = inputs(512, 4, 2, 128, device, dtype)
    expected = plain(*(x.double() for x in (q, k, v)), window)
    gradient = torch.randn_like(expected)
    compiler = "inductor" if device.type == "cuda" else "eager"
    compiled = torch.compile(attention, backend=compiler, dynamic=False, fullgraph=True)
    y = compiled(q, k, v, window, backend, window_mask(backend, 512, window, device))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    ours = torch.autograd.grad(y, (q, k, v), gradient.to(dtype))
    theirs = torch.autograd.grad(expected, (q, k, v), gradient)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 2 * tolerance * b.abs().max()
