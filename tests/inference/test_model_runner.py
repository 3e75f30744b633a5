import contextvars
import shutil

import pytest
import torch

from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.kv_cache import BlockManager, BlockTable
from nanochat_ray.inference.model_runner import ModelRunner, PackedLinear, for_inference
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.gpt import GPT, GPTConfig


def sequence_of(ids: list[int], table: BlockTable) -> Sequence:
    return Sequence(ids, SamplingParams(), 0, 1, table=table)


def test_uneven_chunks_and_decoding_equal_one_forward(lively, random_prompts):
    """Two sequences take turns, past both windows, on pages that are full of what others left behind."""
    manager = BlockManager(lively.config, 200)
    runner = ModelRunner(lively, manager, 4)
    runner.keys.fill_(50.0)
    runner.values.fill_(50.0)
    prompts = random_prompts(400, 380)
    with torch.no_grad():
        expected = [lively(torch.tensor([prompt]))[0] for prompt in prompts]
    tables = [manager.open(prompt) for prompt in prompts]
    for chunks in ((7, 30), (1, 9), (160, 120), (1, 1), (190, 150), (1, 20)):
        for prompt, table, logits, chunk in zip(prompts, tables, expected, chunks, strict=True):
            end = table.length + chunk
            manager.reserve(table, end)
            said, _ = runner.run([], [(sequence_of(prompt, table), end)])
            manager.advance(table, prompt, end)
            torch.testing.assert_close(said, logits[end - 1 : end], atol=1e-3, rtol=0)
    for _ in range(40):
        lengths = [table.length for table in tables]
        for row, table in enumerate(tables):
            manager.reserve(table, table.length + 1)
            runner.place(row, table)
        rows = [sequence_of(p[: table.length + 1], table) for p, table in zip(prompts, tables, strict=True)]
        said, _ = runner.run(rows, [])
        logits = torch.stack([logits[length] for logits, length in zip(expected, lengths, strict=True)])
        torch.testing.assert_close(said, logits, atol=1e-3, rtol=0)
        for prompt, table in zip(prompts, tables, strict=True):
            manager.advance(table, prompt, table.length + 1)
    assert [table.length for table in tables] == [400, 370]


def test_the_copy_for_inference_leaves_the_model_to_its_training(reference_model):
    names = [name for name, parameter in reference_model.named_parameters() if parameter.requires_grad]
    copy = for_inference(reference_model)
    assert copy.transformer.wte.weight.data_ptr() == reference_model.transformer.wte.weight.data_ptr()
    assert [name for name, parameter in reference_model.named_parameters() if parameter.requires_grad] == names
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    idx = torch.arange(100).view(2, 50)
    expected = reference_model(idx).detach()
    torch.testing.assert_close(copy(idx), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        for block in reference_model.transformer.h:
            block.mlp.c_fc.weight.add_(1.0)  # a step of training after the copy was made
    torch.testing.assert_close(copy(idx), expected, atol=1e-4, rtol=0)


def test_bfloat16_packs_its_weights_in_bfloat16(reference_model, random_prompts):
    model = reference_model.set_compute_dtype(torch.bfloat16)
    runner = ModelRunner(model, manager := BlockManager(model.config, 50), 1)
    assert runner.keys.dtype == runner.model.transformer.h[0].mlp.c_fc.packed.dtype == torch.bfloat16
    [prompt] = random_prompts(60)
    manager.reserve(table := manager.open(prompt), 60)
    said, _ = runner.run([], [(sequence_of(prompt, table), 60)])
    assert said.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(said, model(torch.tensor([prompt]))[:, -1], atol=0.1, rtol=0)


def test_without_onednn_weights_are_not_packed(reference, monkeypatch):
    model, cases = reference
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    engine = Engine(model, None, 2)
    assert not any(isinstance(module, PackedLinear) for module in engine.runner.model.modules())
    completions = engine.generate([case["prompt"] for case in cases], SamplingParams(max_tokens=40, temperature=0))
    assert [completion.tokens for completion in completions] == [case["greedy"] for case in cases]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_say_what_eager_ones_say(random_prompts):
    """One row, several, and prompts in chunks of any size, with windows of 128 and 64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 97, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    prompts = [[token % 97 for token in prompt] for prompt in random_prompts(5, 150, 33)]
    eager, compiled = (Engine(model, None, 3, chunk=20) for _ in range(2))
    compiled.compile()
    params = SamplingParams(max_tokens=20, temperature=0)
    expected = eager.generate(prompts, params)
    assert len({token for completion in expected for token in completion.tokens}) > 10
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [compiled.generate([prompt], params)[0] for prompt in prompts] == expected
        assert compiled.generate(prompts, params) == expected
        for length in (1, 2, 20, 21, 22, 41):  # also chunks of one token, alone and beside others
            engines = [
                [
                    *engine.generate([prompts[1][-length:]], params),
                    *engine.generate([prompts[1][:length]] * 2 + [prompts[2]], params),
                ]
                for engine in (eager, compiled)
            ]
            assert engines[0] == engines[1]
        for drawn in (SamplingParams(20, seed=3), SamplingParams(20, temperature=0.3, top_k=5, n=2)):
            assert compiled.generate(prompts, drawn) == eager.generate(prompts, drawn)
        kept = len(contextvars.copy_context())
        compiled.generate(prompts, params)
        assert len(contextvars.copy_context()) == kept  # a step leaves nothing behind in its thread
