"""The gradient of tables, on a GPU or in Triton's interpreter, beside torch's own. compile_kernels.py compiles it."""

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.model import gpt
from nanochat_ray.model.embedding import _kernels_work, embed, order_for_gradients, sort_ids
from nanochat_ray.model.gpt import GPT, GPTConfig

V = 90
IDS = {
    "frequent ones": lambda N: (V * torch.rand(N) ** 4).int(),
    "equally frequent": lambda N: torch.randint(V - 20, (N,)),
    "one": lambda N: torch.full((N,), V - 1),
    "the first and the last": lambda N: (torch.arange(N) >= N // 3).long() * (V - 1),
    "all": lambda N: torch.randperm(max(N, V))[:N] % V,
}


def gradients(idx, table, grad):
    """Of the kernels, and torch's own in fp64, which is near the true one."""
    own = torch.autograd.grad(embed(idx, table, sort_ids(idx)), table, grad)[0]
    exact = table.detach().double().requires_grad_()
    return own, torch.autograd.grad(F.embedding(idx, exact), exact, grad.double())[0]


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("N", [1, 32, 33, 64, 96, 1100])  # a program has 32 ids, and the sums of 32 blocks
def test_gradient_of_a_table(kernel_device, ids, N):
    torch.manual_seed(N)
    for C in (20, 160) if N < 100 else (20,):
        idx = IDS[ids](N).view(1, N).to(kernel_device)
        table, grad = torch.randn(V, C, device=kernel_device).requires_grad_(), torch.randn(1, N, C).to(kernel_device)
        own, exact = gradients(idx, table, grad)
        torch.testing.assert_close(own.double(), exact, atol=1e-5 * N**0.5, rtol=1e-5)
        assert torch.equal(own, gradients(idx, table, grad)[0])
        unseen = torch.ones(V, dtype=torch.bool).index_fill(0, idx.flatten().long().cpu(), False)
        assert not own[unseen.to(kernel_device)].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("C", [768, 1536])
def test_gradient_at_the_sizes_of_training(dtype, C):
    torch.manual_seed(0)
    chances = 1 / torch.arange(3, 32_003, device="cuda")  # Zipf's law; the last 768 ids never come
    idx = torch.multinomial(chances, 32 * 2048, replacement=True).view(32, 2048)
    table = torch.zeros(32_768, C, device="cuda", dtype=dtype).requires_grad_()
    grad = torch.randn(32, 2048, C, device="cuda", dtype=dtype)
    own, exact = gradients(idx, table, grad)
    # A sum is rounded once to its dtype, and in fp32 before: frequent ids add up a thousand numbers and more.
    torch.testing.assert_close(own.double(), exact, atol=1e-4, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)
    assert own.dtype == dtype and torch.equal(own, gradients(idx, table, grad)[0])


def steps_gradients(model, idx) -> list[torch.Tensor]:
    model.zero_grad()
    for part in idx.split(1):  # micro-batches
        model(part, part.roll(-1, 1)).backward()
    return [p.grad for p in (model.transformer.wte.weight, *(table.weight for table in model.value_embeds.values()))]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_models_tables_learn_the_same(kernel_device, monkeypatch, recompute):
    torch.manual_seed(0)
    with kernel_device:
        model, idx = GPT(GPTConfig(32, 100, 3, 2, 2, 32, "SL")), torch.randint(100, (2, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.recompute, sorted_ids = recompute, []
    monkeypatch.setattr(gpt, "order_for_gradients", lambda idx: None)
    expected = steps_gradients(model, idx)
    monkeypatch.setattr(gpt, "order_for_gradients", lambda idx: sorted_ids.append(sort_ids(idx)) or sorted_ids[-1])
    torch.testing.assert_close(steps_gradients(model, idx), expected)
    assert len(sorted_ids) == len(idx)  # once for all tables of a micro-batch


def test_ids_are_sorted_only_for_gradients_on_a_gpu(device):
    idx = torch.zeros(2, 3, dtype=torch.int64, device=device)
    assert (order_for_gradients(idx) is not None) == (device.type == "cuda")
    with torch.no_grad():
        assert order_for_gradients(idx) is None


@pytest.mark.parametrize("faulty", [lambda grad, *_: 1 / 0, lambda grad, *_: torch.zeros(64, 80)])
def test_kernels_that_fail_or_are_wrong_give_way_to_torchs_gradient(monkeypatch, faulty):
    monkeypatch.setattr(pytest.importorskip("nanochat_ray.model.embedding_kernels"), "table_gradient", faulty)
    with pytest.warns(UserWarning, match="torch's own path"):
        assert not _kernels_work.__wrapped__(torch.device("cpu"))
