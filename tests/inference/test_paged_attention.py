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
def test_each_row_sees_its_window_of_its_pages(dtype, heads, kv_heads, dim, window):
    torch.manual_seed(0)
    rows, width = 5, 4
    keys, values = torch.randn(2, 1 + rows * width, kv_heads, PAGE, dim).to(dtype)
    q = torch.randn(rows, 1, heads, dim).to(dtype)
    table = 1 + torch.randperm(rows * width).view(rows, width)
    at = torch.tensor([[0], [5], [PAGE - 1], [PAGE], [width * PAGE - 1]])
    said = paged_attention(q, keys, values, table, at, window)
    assert said.dtype == dtype
    expected = _attend(*(x.double() for x in (q, keys, values)), table, at, window)
    torch.testing.assert_close(said.double(), expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


def test_what_a_row_does_not_see_is_not_read():
    """Neither pages after its last token, which a wider row's table has, nor what another sequence left in a page."""
    keys, values = torch.full((2, 3, 1, PAGE, 64), torch.nan)
    keys[1, :, :4], values[1, :, :4] = 0.5, 2.0
    table, at = torch.tensor([[1, 2]]), torch.tensor([[3]])
    assert (paged_attention(torch.ones(1, 1, 1, 64), keys, values, table, at, 100) == 2).all()


def test_a_head_too_large_is_refused():
    pages = torch.zeros(1, 1, PAGE, 2048)
    with pytest.raises(RuntimeError, match="2048"):
        paged_attention(torch.zeros(1, 1, 1, 2048), pages, pages, torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), 1)
