"""nanochat_ray as a library."""

import subprocess
import sys

import pytest
import torch

import nanochat_ray
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.train.checkpoint import save_checkpoint


def test_three_lines_answer_a_question(golden, tmp_path):
    trained = GPT(GPTConfig(64, 4096, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    trained.init_weights()
    save_checkpoint(str(tmp_path), 1, trained, None, Tokenizer.load(str(golden / "nanochat_d2")), {})

    from nanochat_ray import Engine, SamplingParams, load_model

    model, tokenizer, _ = load_model(str(tmp_path))
    question = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "Hi"}]})
    (answer,) = Engine(model, tokenizer).generate([question], SamplingParams(max_tokens=4))
    assert answer.finish_reason in ("stop", "length") and isinstance(tokenizer.decode(answer.tokens), str)
    assert model.transformer.wte.weight.dtype in (torch.float32, torch.bfloat16)


def test_importing_it_imports_nothing_else():
    script = "import sys; before = set(sys.modules); import nanochat_ray; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    others = {name for name in loaded if not name.startswith("importlib.")}  # Python's versions differ in these
    assert others <= {"nanochat_ray", "importlib", "warnings"}
    with pytest.raises(AttributeError, match="no attribute 'engine_of_nothing'"):
        _ = nanochat_ray.engine_of_nothing
