"""What is compiled for GPUs, traced without one: how many graphs, and what is in them."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from nanochat_ray.model import attention as attention_module
from nanochat_ray.model import gpt
from nanochat_ray.model.attention import FLASH, attention, available_backends, sliding_window_mask, window_mask
from nanochat_ray.model.compiling import STATIC
from nanochat_ray.model.gpt import GPT, GPTConfig

T, WINDOW = 512, 128


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    return []


@pytest.fixture
def recorder(graphs):
    """A compiler that keeps the operators of each graph, forward and backward, and runs it as it is."""

    def keep(graph_module, _):
        graphs.append([str(node.target) for node in graph_module.graph.nodes if node.op.startswith("call")])
        return make_boxed_func(graph_module.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def small_model(backend, compiler, device="meta"):
    with torch.device(device):
        model = GPT(GPTConfig(T, 512, 4, 4, 2, 64, "SSSL"))
        model.set_compute_dtype(torch.bfloat16)
    for block in model.transformer.h:
        block.attn.backend = backend
        block.compile(backend=compiler, **STATIC)
    model.compiled = True
    return model


@pytest.mark.parametrize("backend", ["flex", "flash-attn-2", "sdpa"])
def test_a_kind_of_block_is_one_graph_without_a_mask_being_built(backend, graphs, recorder, monkeypatch):
    """Of the four layers two are alike; the kinds are S with and without value embedding, and L."""
    flex = sys.modules["torch.nn.attention.flex_attention"]
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # it has no gradients on CPUs, and refuses meta
    model = small_model(backend, recorder)
    idx = torch.zeros(2, T, dtype=torch.long, device="meta")
    for _ in range(2):
        model.hidden(idx).sum().backward()
    assert len(graphs) == 2 * 3
    names = {name for graph in graphs for name in graph}
    assert not [name for name in names if "sort" in name or "arange" in name or "aten.le." in name]
    kernel = {"flex": "flex_attention", "flash-attn-2": "_flash_attention_forward", "sdpa": "softmax"}
    assert [name for name in names if kernel[backend] in name]


@pytest.mark.parametrize("window", [WINDOW, T])
def test_a_block_without_its_mask_is_causal_all_the_same(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, 2, 16) for _ in range(3))
    compiled = torch.compile(attention, backend="eager", **STATIC)
    for backend in ("flex", "sdpa", "blocks"):
        expected = attention(q, k, v, window)
        torch.testing.assert_close(compiled(q, k, v, window, backend), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("window", [WINDOW, T])
def test_masks_that_are_handed_over_give_what_uncompiled_attention_gives(backend, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, 4, 16), torch.randn(2, T, 2, 16), torch.randn(2, T, 2, 16)
    mask = window_mask(backend, T, window, q.device)
    compiled = torch.compile(attention, backend="eager", **STATIC)
    torch.testing.assert_close(compiled(q, k, v, window, backend, mask), attention(q, k, v, window))


def test_a_mask_made_while_evaluating_serves_in_training():
    attention_module._block_mask.cache_clear()
    attention_module._boolean_mask.cache_clear()
    with torch.inference_mode():
        masks = [window_mask(backend, T, WINDOW + 1, torch.device("cpu")) for backend in ("flex", "sdpa")]
    assert not masks[0].kv_indices.is_inference() and not masks[1].is_inference()
    assert window_mask("flex", T, WINDOW + 1, torch.device("cpu")) is masks[0]


def scores_of(q, k, window):
    positions = torch.arange(q.size(1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    return scores.masked_fill(~sliding_window_mask(positions, positions, window), -torch.inf)


def plain(q, k, v, window):
    """(output, lse), in the layout of FlashAttention."""
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    scores = scores_of(q, k, window)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def plain_backward(q, k, v, y, grad, lse, window):
    groups = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    weights = torch.exp(scores_of(q, k, window) - lse.unsqueeze(-1))
    dv = torch.einsum("bhqk,bqhd->bkhd", weights, grad)
    d_weights = torch.einsum("bqhd,bkhd->bhqk", grad, v) - (grad * y).sum(-1).transpose(1, 2).unsqueeze(-1)
    d_scores = weights * d_weights / q.size(-1) ** 0.5
    dq, dk = torch.einsum("bhqk,bkhd->bqhd", d_scores, k), torch.einsum("bhqk,bqhd->bkhd", d_scores, q)
    return dq, *(x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))


@pytest.fixture
def fake_packages(monkeypatch):
    """Modules with the signatures of flash-attn-4 4.0 and kernels-community/flash-attn3, on plain math."""

    def forward(q, k, v, *, causal, return_lse, window_size_left=None, window_size_right=None):
        assert causal and return_lse and window_size_right == (None if window_size_left is None else 0)
        return *plain(q, k, v, q.size(1) if window_size_left is None else window_size_left), None, None, None

    def backward(q, k, v, out, dout, lse, *, causal, window_size_left=None, window_size_right=None):
        assert causal and dout.is_contiguous() and lse.shape == (q.size(0), q.size(2), q.size(1))
        return plain_backward(q, k, v, out, dout, lse, q.size(1) if window_size_left is None else window_size_left)

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal and window_size[1] == 0
        mask = sliding_window_mask(
            torch.arange(q.size(1)), torch.arange(q.size(1)), q.size(1) if window_size[0] < 0 else window_size[0]
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    interface = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    kernel = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda name, version: kernel))
    monkeypatch.setitem(FLASH, "flash-attn-3", None)  # so that it is taken out again


@pytest.mark.parametrize("backend", ["flash-attn-4", "flash-attn-3"])
@pytest.mark.parametrize("window", [37, T])
def test_packages_are_called_by_their_signatures_and_trained_through(fake_packages, backend, window, graphs, recorder):
    assert attention_module._load_flash_attention_3()
    assert attention_module._runs(backend, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    inputs = [torch.randn(2, T, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    traced = torch.compile(attention, backend=recorder, **STATIC)
    y, expected = traced(*inputs, window, backend), plain(*inputs, window)[0]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    gradient = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2


def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    available_backends.cache_clear()


def test_a_package_that_is_absent_or_broken_is_no_back_end(monkeypatch):
    on_hopper(monkeypatch)
    offline = SimpleNamespace(get_kernel=lambda name, version: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setitem(sys.modules, "kernels", offline)
    assert available_backends("cuda") == ("flex", "flash-attn-2", "sdpa")
    assert available_backends("cuda", torch.float32) == ("flex", "sdpa")
    assert available_backends("cpu") == ("blocks", "sdpa")
    available_backends.cache_clear()


def test_a_model_takes_the_best_back_end_or_the_one_it_is_told(monkeypatch):
    model = GPT(GPTConfig(64, 64, 2, 2, 2, 32))
    model.compile_for_training()
    assert {block.attn.backend for block in model.transformer.h} == {"blocks"}
    model.compile_for_training("sdpa")
    assert {block.attn.backend for block in model.transformer.h} == {"sdpa"}
    with pytest.raises(ValueError, match="flash-attn-9 here: there are blocks, sdpa"):
        model.compile_for_training("flash-attn-9")


def test_before_and_after_the_blocks_is_one_graph_each(graphs, recorder):
    model = GPT(GPTConfig(64, 64, 2, 2, 2, 32))
    x = torch.randn(2, 64, 32, requires_grad=True)
    smear, finish = (torch.compile(f, backend=recorder, **STATIC) for f in (GPT.smear, GPT.finish))
    for _ in range(2):
        finish(model, smear(model, x), x).sum().backward()
    assert len(graphs) == 2 * 2


def test_uncompiled_compiles_nothing(graphs, recorder):
    model = small_model("flex", recorder, "cpu")
    with torch.no_grad(), model.uncompiled():
        y = model.hidden(torch.zeros(1, 300, dtype=torch.long))
    assert y.shape == (1, 300, 64) and not graphs and model.compiled


def test_a_layers_two_lambdas_are_aligned(monkeypatch):
    """Compiled CUDA code copies arguments that are not at a multiple of 16 bytes."""
    rows = []
    monkeypatch.setattr(gpt.Block, "forward", lambda self, x, x0, lambdas, *_: rows.append(lambdas) or x)
    GPT(GPTConfig(16, 64, 3, 2, 2, 32)).hidden(torch.zeros(1, 16, dtype=torch.long))
    assert [row.data_ptr() % 16 for row in rows] == [0, 0, 0]
