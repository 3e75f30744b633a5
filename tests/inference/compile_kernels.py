"""Compile every kernel of GPU engines and training for Hopper (sm_90), on a machine without one; print JSON of each.

Run as a program: Triton must not have been imported for its interpreter. Kernels are compiled where they are launched,
with the arguments they are launched with, and then not run.
"""

import json
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nanochat_ray.inference.gpu_runner import GPURunner
from nanochat_ray.inference.kv_cache import BlockManager
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.sequence import Sequence
from nanochat_ray.model.embedding import sort_ids
from nanochat_ray.model.embedding_kernels import table_gradient
from nanochat_ray.model.gpt import GPT, GPTConfig


class Hopper:
    """What Triton asks of the driver in order to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    compiled, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    launch(GPTConfig(2048, 32768, 2, 12, 12, 1536, "SL"), torch.bfloat16, rows=(1, 64, 256))
    launch(GPTConfig(2048, 65536, 2, 8, 2, 1024, "SL"), torch.bfloat16, rows=(8,))
    launch(GPTConfig(256, 300, 2, 4, 2, 64, "SL"), torch.float32, rows=(3,))
    for C, dtype in ((768, torch.bfloat16), (1536, torch.bfloat16), (100, torch.float32)):
        table_gradient(torch.zeros(999, C, dtype=dtype), *sort_ids(torch.zeros(999)), rows=64)
    for kernel in compiled.values():
        print(json.dumps(describe(kernel)))


def launch(config: GPTConfig, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """A step of prompts, and decoding steps of so many rows."""
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device="cpu").set_compute_dtype(dtype)
    manager = BlockManager(config, 3000)
    runner, sequence = GPURunner(model, manager, max(rows)), Sequence([1] * 200, SamplingParams(), 0, 9)
    sequence.table = manager.open(sequence.ids)
    with torch.inference_mode():
        runner._run_prompts(0, [(sequence, 200)])
        for S in rows:
            runner._decode(torch.zeros(10, -(-S // 4) * 4, dtype=torch.int32), S)


def describe(kernel) -> dict:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(kernel.asm["ptx"])
        f.flush()
        ptxas = triton.knobs.nvidia.ptxas.path
        command = [ptxas, "-v", "-arch=sm_90a", f.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    return {
        "name": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "registers": int(registers[1]),
        "spilled": sum(map(int, spills)),
    }


if __name__ == "__main__":
    main()
