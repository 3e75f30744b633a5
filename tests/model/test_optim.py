import copy
import weakref

import pytest
import torch
from safetensors.torch import load_file

from nanochat_ray.model.compiling import MAX_GRAPHS
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer, orthogonalize


def reference_gradients(model, step):
    """The gradient of the i-th parameter by the formula that came with the reference numbers."""
    for i, p in enumerate(model.parameters()):
        k = torch.arange(p.numel(), dtype=torch.float64)
        p.grad = (0.01 * torch.sin(0.6180339887498949 * k**2 + 0.1 * i + step)).float().view(p.shape).to(p.device)


def reference_step(model, optimizer, step):
    reference_gradients(model, step)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (step + 1) / 6
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.02 * step
            group["weight_decay"] = 0.2 * (1 - step / 6)
    optimizer.step()


def build(model):
    return build_optimizer(
        model, unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.2
    )


def assert_equals_reference(model, expected, prefix):
    for name, p in model.named_parameters():
        error = (p.detach() - expected[f"{prefix}.{name}"]).abs()
        allowed = max(1e-4 * error.numel(), 2)  # where an update is about zero, rounding flips its decay mask
        assert error.max() <= 1e-3, name
        assert (error > 1e-5).sum() <= allowed, (name, error.max())


def test_steps_one_and_six_equal_nanochats(golden, reference_model, device):
    """On a GPU the updates are compiled."""
    expected = load_file(golden / "optim.safetensors", device=str(device))
    optimizer = build(reference_model.to(device))
    for step in range(6):
        reference_step(reference_model, optimizer, step)
        if step in (0, 5):
            assert_equals_reference(reference_model, expected, f"step{step + 1}")


def test_state_survives_export_and_load(reference_model):
    """A new optimizer given the old one's state makes the same step, to the bit."""
    other = GPT(reference_model.config)
    optimizer = build(reference_model)
    for step in range(2):
        reference_step(reference_model, optimizer, step)
    other.load_state_dict(reference_model.state_dict())
    resumed = build(other)
    state = optimizer.shard_state()
    resumed.load_shard_state(lambda key, start, stop: state[key][1][start:stop].clone())
    reference_step(reference_model, optimizer, 2)
    reference_step(other, resumed, 2)
    for (name, p), q in zip(reference_model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_missing_gradient_is_named(reference_model):
    optimizer = build(reference_model)
    reference_gradients(reference_model, 0)
    reference_model.lm_head.weight.grad = None
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 64, 16), (2, 16, 64), (1, 32, 32)])
def test_orthogonalize_makes_singular_values_about_one(shape):
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32))
    assert 0.85 < singular_values.min() and singular_values.max() < 1.15


def train_step(model, optimizer, step):
    """With rates that change, as they do at every step."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (step + 1) / 6
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = 0.85 + 0.02 * step, 0.2 * (1 - step / 6)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_compiled_updates_make_no_new_graphs_after_the_first_step():
    """As on a GPU, by a compiler that runs the graphs as they are."""
    graphs = []

    def keep(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(128, 512, 2, 2, 2, 64, "SL"))
    model.init_weights()
    model.set_compute_dtype(torch.bfloat16)
    plain, compiled = copy.deepcopy(model), model
    optimizer = build(compiled)
    optimizer.compile_updates(backend=keep)
    torch.manual_seed(1)
    train_step(compiled, optimizer, 0)
    first = len(graphs)
    for step in range(1, 4):
        train_step(compiled, optimizer, step)
    assert 8 < first < MAX_GRAPHS and len(graphs) == first
    for graph in graphs:  # shapes are constants
        assert not [
            n for n in graph.graph.nodes if n.op == "placeholder" and "Sym" in type(n.meta["example_value"]).__name__
        ]
    optimizer = build(plain)
    torch.manual_seed(1)
    for step in range(4):
        train_step(plain, optimizer, step)
    for (name, p), q in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (p.float() - q.float()).abs().max() < 0.02, name  # scalars are rounded to fp32, tables to bf16
    torch._dynamo.reset()


def test_gradients_are_given_up_as_they_are_used(reference_model):
    """So that a GPU never holds the stacks of all groups beside the gradients that they were made of."""
    optimizer, held = build(reference_model), []
    update = optimizer._muon

    def spy(p, grad, *state, **options):
        held.append(sum(gradient() is not None for gradient in gradients))
        update(p, grad, *state, **options)

    optimizer._muon = spy
    reference_gradients(reference_model, 0)
    gradients = [weakref.ref(p.grad) for p in reference_model.transformer.h.parameters()]
    optimizer.step()
    assert held == sorted(held, reverse=True) and held[0] > held[-1] == 0
    assert all(p.grad is None for p in reference_model.parameters())
