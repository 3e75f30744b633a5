"""The operator in C++ against plain matmuls: heads that are whole vectors and others, windows, scattered pages."""

import shutil

import pytest
import torch

from nanochat_ray.inference.kv_cache import PAGE
from nanochat_ray.inference.model_runner import _attend
from nanochat_ray.inference.paged_attention import build_paged_attention, paged_attention

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="the operator needs a C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def built():
    build_paged_attention()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 6, 64), (4, 2, 128), (6, 2, 36), (3, 3, 8), (2, 1, 96)])
@pytest.mark.parametrize("window", [7, PAGE, 1000])
def test_each_token_sees_its_window_of_its_pages(dtype, heads, kv_heads, dim, window):
    """Single tokens, and adjacent ones that fill vectors and pages or do not: where each begins, and how many."""
    torch.manual_seed(0)
    spans = [(0, 1), (PAGE, 1), (0, 2), (9, 16), (9, 17), (PAGE - 1, PAGE), (5, 70), (2 * PAGE, 64), (4 * PAGE - 1, 1)]
    keys, values = torch.randn(2, 1 + len(spans) * 4, kv_heads, PAGE, dim).to(dtype)
    at = torch.cat([torch.arange(start, start + count) for start, count in spans])
    q = torch.randn(len(at), heads, dim).to(dtype)
    table = 1 + torch.randperm(len(spans) * 4).view(len(spans), 4)
    last = torch.tensor([count for _, count in spans]).cumsum(0) - 1
    said = paged_attention(q, keys, values, table, last, at, window)
    assert said.dtype == dtype
    expected = _attend(*(x.double() for x in (q, keys, values)), table, last, at, window)
    torch.testing.assert_close(said.double(), expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_token_does_not_see_is_not_read(count):
    """Neither pages after its last token, which a wider row's table has, nor what another sequence left in a page."""
    keys, values = torch.full((2, 3, 1, PAGE, 64), torch.nan)
    keys[1, :, :4], values[1, :, :4] = 0.5, 2.0
    table, at = torch.tensor([[1, 2]]), torch.arange(4 - count, 4)
    said = paged_attention(torch.ones(count, 1, 64), keys, values, table, torch.tensor([count - 1]), at, 100)
    assert (said == 2).all()


def test_a_head_too_large_is_refused():
    pages, zero = torch.zeros(1, 1, PAGE, 2048), torch.zeros(1, dtype=torch.long)
    with pytest.raises(RuntimeError, match="2048"):
        paged_attention(torch.zeros(1, 1, 2048), pages, pages, zero[None], zero, zero, 1)
