import copy

import pytest
import torch

from nanochat_ray.model.gpt import GPT, GPTConfig


@pytest.mark.gpu
def test_fp8_is_near_bf16():
    """E4M3 keeps 4 bits of each number, and each tensor has a scale of its own."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT(GPTConfig(256, 512, 2, 2, 2, 256, "SL"))
        idx = torch.randint(512, (8, 256))
    model.init_weights()
    model.set_compute_dtype(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():  # projections that start at zero would hide the rest
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.smear_lambda.fill_(0.3)  # at 0 the smear's gate has no gradient
    in_fp8 = copy.deepcopy(model)
    in_fp8.convert_to_fp8()
    losses = [m(idx, idx.roll(-1, 1)) for m in (model, in_fp8)]
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=0.01)
    for loss in losses:
        loss.backward()
    assert not torch.equal(*(m.transformer.h[0].mlp.c_fc.weight.grad for m in (model, in_fp8)))  # fp8 was used
    for (name, p), q in zip(model.named_parameters(), in_fp8.parameters(), strict=True):
        if p.dim() == 2:
            assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.95, name
