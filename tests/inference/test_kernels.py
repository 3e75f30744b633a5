"""The GPU engine's kernels: on a GPU or in Triton's interpreter, and compiled for Hopper. Engines on them are in
test_gpu_runner.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.inference.sampling import Controls, SamplingParams, sample, uniforms
from nanochat_ray.model.loss import softcap

pytest.importorskip("triton")
from nanochat_ray.inference import kernels
from nanochat_ray.model import embedding_kernels

PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.6),
    SamplingParams(top_p=1e-9),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.5),
    SamplingParams(top_k=20, top_p=0.9, min_p=0.1),
    SamplingParams(min_p=0.2),
]


def drawn_by_kernel(raw: torch.Tensor, V: int, params: list[SamplingParams], keys: np.ndarray):
    columns = Controls(params, V, raw.device)
    temperature, top_k, top_p, min_p = (
        x.squeeze(1) for x in (columns.temperature, columns.top_k.int(), columns.top_p, columns.min_p)
    )
    logits = torch.full((len(raw), V), torch.nan, device=raw.device)
    drawn = torch.full((len(raw),), -1, dtype=torch.int32, device=raw.device)
    chances = uniforms(keys).to(raw.device)
    kernels.sample(raw, V, temperature, chances, top_k, top_p, min_p, logits, drawn)
    return logits, drawn.tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("V", [300, 5000])  # a block, and several of them
def test_drawing_is_that_of_sample(kernel_device, V, ties):
    torch.manual_seed(0)
    for trial in range(4):
        raw = torch.randn(len(PARAMS), V + 20) * 3
        raw = (raw.round() if ties else raw).to(kernel_device)
        keys = np.array([[trial, 0, row] for row in range(len(PARAMS))], dtype=np.uint64)
        logits, drawn = drawn_by_kernel(raw, V, PARAMS, keys)
        expected = softcap(raw[:, :V])
        torch.testing.assert_close(logits, expected)
        assert drawn == sample(expected, Controls(PARAMS, V, kernel_device), keys).tolist()


def test_a_token_without_a_weight_is_never_drawn(kernel_device):
    """The last chance below 1 reaches the end of the running sum, where rounding decides."""
    raw = torch.full((1, 300), -40.0, device=kernel_device)
    raw[0, 7], raw[0, 100] = 3.0, 3.0
    drawn, top_k = (torch.tensor([x], dtype=torch.int32, device=kernel_device) for x in (-1, 2))
    temperature, chance, top_p, min_p = (torch.tensor([x], device=kernel_device) for x in (1.0, 1 - 2**-24, 1.0, 0.0))
    logits = torch.empty(1, 290, device=kernel_device)
    kernels.sample(raw, 290, temperature, chance, top_k, top_p, min_p, logits, drawn)
    assert drawn.tolist() == [100]


def test_mixing_norms_and_squares_are_the_models(kernel_device):
    torch.manual_seed(0)
    x, y, x0 = torch.randn(3, 3, 48).to(kernel_device)
    weights = torch.tensor([1.1, 0.2], device=kernel_device)
    for added, mixed in ((None, None), (y, None), (None, x0), (y, x0)):
        expected = x if added is None else x + added
        expected = expected if mixed is None else 1.1 * expected + 0.2 * mixed
        inside = x.clone()
        u = kernels.mix_norm(inside, added, mixed, weights)
        torch.testing.assert_close(inside, expected)
        torch.testing.assert_close(u, F.rms_norm(expected, (48,)))
    hidden = torch.randn(2, 5000).to(kernel_device)
    torch.testing.assert_close(kernels.relu_square(hidden.clone()), hidden.relu().square())


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spills():
    """At the sizes of d24, of a wide vocabulary with grouped heads, and of a small fp32 model."""
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(folder.parents[1])
    command = [sys.executable, str(folder / "compile_kernels.py")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    compiled = [json.loads(line) for line in said.stdout.splitlines()]
    names = {kernel["name"] for kernel in compiled}
    assert names == {name for name in (*dir(kernels), *dir(embedding_kernels)) if name.endswith("_kernel")}
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 227 * 1024 and kernel["registers"] * kernel["warps"] * 32 <= 65536, kernel
