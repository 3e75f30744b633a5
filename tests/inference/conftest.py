import json

import pytest
import torch

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig


@pytest.fixture(scope="session")
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


@pytest.fixture
def reference(golden, reference_model):
    """The model of the golden numbers, and prompts with their greedy answers of 40 tokens."""
    return reference_model, json.loads((golden / "greedy.json").read_text())


@pytest.fixture(scope="session")
def lively():
    """Random weights all through (init_weights leaves blocks and smear off), GQA, windows of 128 and 256."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 300, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@pytest.fixture(scope="session")
def random_prompts():
    """Lengths to prompts of that many tokens below 300, the same each time."""

    def make(*lengths: int, seed: int = 1) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]

    return make
