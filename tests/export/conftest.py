import atexit
import json
import os
import shutil
import tempfile

import pytest
import torch

from nanochat_ray import storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.train.checkpoint import save_checkpoint

if "HF_MODULES_CACHE" not in os.environ:  # transformers copies a folder's code there; it reads this when imported
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer(golden):
    return Tokenizer.load(str(golden / "nanochat_d2"))


@pytest.fixture(scope="session")
def lively(tokenizer):
    """Random weights all through (init_weights leaves blocks and smear off), GQA, windows of 128 and 256."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, tokenizer.vocab_size, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


@pytest.fixture(scope="session")
def run_dir(lively, tokenizer, tmp_path_factory) -> str:
    """A run with one checkpoint, of lively, and what training would have left beside it."""
    run = tmp_path_factory.mktemp("runs") / "d4-lively"
    inputs = {"init_from": "base/step_000100", "total_batch_size": 4096, "lrs": {"matrix_lr": 0.02}, "seed": 42}
    config = {"inputs": inputs, "rows": "/home/rows/pydocs-x-T256", "commit": "abc", "cluster": "2 CPUs"}
    storage.write_json(str(run / "config.json"), config)
    lines = [
        {"step": step, "val/bpb": 2 - step / 10, "chatcore_metric": 0.5 if step == 7 else None} for step in range(9)
    ]
    storage.write_bytes(str(run / "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in lines).encode())
    save_checkpoint(str(run), 7, lively, None, tokenizer, {"stage": "sft", "val/bpb": 1.3})
    return str(run)


@pytest.fixture(scope="session")
def exported(run_dir, tmp_path_factory) -> str:
    from nanochat_ray.export import ExportOptions, run

    return run(ExportOptions(run_dir, str(tmp_path_factory.mktemp("hf") / "lively")))


@pytest.fixture
def load():
    """transformers' model of a folder, which never ends before its length."""
    from transformers import AutoModelForCausalLM

    def load(folder: str, **options):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
        model.generation_config.eos_token_id = None
        return model

    return load
