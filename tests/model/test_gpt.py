import pytest
import torch
from safetensors.torch import load_file

from nanochat_ray.model.gpt import GPT, GPTConfig


@pytest.fixture
def reference(golden, reference_model, device):
    return reference_model.to(device), load_file(golden / "model.safetensors", device=str(device))


def test_logits_and_losses_equal_nanochats(reference):
    model, expected = reference
    with torch.no_grad():
        logits = model(expected["idx"])
        torch.testing.assert_close(logits[:, -64:], expected["logits_last64"], atol=1e-4, rtol=0)
        loss = model(expected["idx"], expected["targets"])
        torch.testing.assert_close(loss, expected["loss"], atol=1e-4, rtol=0)
        losses = model(expected["idx"], expected["targets"], loss_reduction="none")
        torch.testing.assert_close(losses, expected["loss_none"], atol=1e-4, rtol=0)


def test_gradients_equal_nanochats(reference):
    model, expected = reference
    model.zero_grad()
    model(expected["idx"], expected["targets"]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"grads.{name}"], atol=1e-4, rtol=0, msg=name)


def test_bf16_is_near_nanochats_numbers(reference):
    """On a CPU the loss is off by 0.0004, logits by 0.03 at most, and gradients have cosines of 0.9995 and more."""
    model, expected = reference
    model.set_compute_dtype(torch.bfloat16)
    loss = model(expected["idx"], expected["targets"])
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"], atol=2e-3, rtol=0)
    with torch.no_grad():
        logits = model(expected["idx"])
    torch.testing.assert_close(logits[:, -64:], expected["logits_last64"], atol=0.1, rtol=0)
    for name, parameter in model.named_parameters():
        gradients = parameter.grad.float().flatten(), expected[f"grads.{name}"].flatten()
        assert torch.cosine_similarity(*gradients, dim=0) > 0.995, name


def test_init_follows_the_design():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=1000, n_layer=3, n_head=2, n_kv_head=1, n_embd=128))
    model.init_weights()
    w = dict(model.named_parameters())
    assert w["transformer.wte.weight"].shape == (1024, 128)
    assert w["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.02)
    assert w["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.02)
    bound = (3 / 128) ** 0.5
    for name, limit in {"attn.c_q": bound, "attn.c_v": bound, "mlp.c_fc": 0.4 * bound}.items():
        weight = w[f"transformer.h.1.{name}.weight"]
        assert 0.97 * limit < weight.abs().max() <= limit
    assert w["transformer.h.2.attn.c_proj.weight"].abs().max() == 0
    assert set(model.value_embeds) == {"0", "2"}
    assert w["value_embeds.2.weight"].shape == (1024, 64)
    torch.testing.assert_close(w["resid_lambdas"], torch.tensor([1.15, 1.10, 1.05]))
    torch.testing.assert_close(w["x0_lambdas"], torch.tensor([0.20, 0.125, 0.05]))
    assert 0 <= w["transformer.h.2.attn.ve_gate.weight"].min() and w["smear_gate.weight"].max() <= 0.02


def test_inputs_longer_than_the_context_are_not_truncated():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    for block in model.transformer.h:  # projections start at zero: make attention count
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.2)
    torch.nn.init.normal_(model.lm_head.weight)
    idx = torch.randint(64, (1, 160))
    with torch.no_grad():
        logits = model(idx)
        assert logits.shape == (1, 160, 64)
        changed = idx.clone()
        changed[0, 100] = (idx[0, 100] + 1) % 64
        difference = (model(changed) - logits).abs().amax(-1)[0]
        # Layer 0 sees 128 back (its short window is a multiple of 128), layer 1 sees 16: nothing before 100 moves.
        assert difference[:100].max() == 0 and difference[100:116].min() > 0
        with pytest.raises(ValueError, match="161"):
            model(torch.zeros(1, 161, dtype=torch.long))


def test_bf16_compute_keeps_fp32_master_weights():
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    model.set_compute_dtype(torch.bfloat16)
    assert model.compute_dtype == model.value_embeds["1"].weight.dtype == torch.bfloat16
    assert model.transformer.h[0].attn.c_q.weight.dtype == torch.float32
    loss = model(torch.randint(64, (2, 16)), torch.randint(64, (2, 16)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.transformer.h[0].mlp.c_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"n_embd": 100}, {"n_kv_head": 4}, {"window_pattern": "SX"}])
def test_bad_configs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**wrong)
