"""The checks of benchmarks.gpu: what each runs, how long it takes and which targets it has. Runs one of them.

python -m benchmarks.gpu_checks NAME FILE [--tiny]      appends the figures to FILE as JSON lines
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanochat_ray import storage

Report = Callable[..., None]  # report(name=figure, …) at once keeps what is known


@dataclass(frozen=True)
class Target:
    figure: str
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        bounds = [f">= {self.least:g}"] if self.least is not None else []
        return " and ".join(bounds + ([f"<= {self.most:g}"] if self.most is not None else []))


@dataclass(frozen=True)
class Check:
    name: str
    what: str
    function: str  # module.function of this package, called as function(report, tiny, **arguments)
    seconds: int  # usual time on an H100 or H200: what results/gpu.jsonl has and a margin, else estimated
    targets: tuple[Target, ...] = ()
    arguments: dict = field(default_factory=dict)


ALL_PASS = (Target("passed", least=1), Target("failed", most=0))
DECODE = (Target("bandwidth_share", least=0.6), Target("least_over_transformers", least=3))
CHECKS = (
    Check("machine", "matmul in bf16 and fp8 at 8192³, memory bandwidth of a copy", "gpu_training.machine", 10),
    Check("golden", "pytest -m gpu", "gpu_jobs.golden", 80, ALL_PASS),
    Check(
        "train_d12",
        "T 2,048, 32 rows, bf16, compiled, SSSL, every attention back end",
        "gpu_training.train",
        60,
        (Target("mfu", least=0.5), Target("optimizer_share", most=0.08)),
        {"depth": 12, "rows": 32, "compare_attention": True},
    ),
    Check(
        "train_d24",
        "16 rows, or the half or quarter of them that fits",
        "gpu_training.train",
        45,
        (Target("mfu", least=0.55), Target("memory_over_plan", least=0.9, most=1.1)),
        {"depth": 24, "rows": 16},
    ),
    Check(
        "fp8_d24",
        "fp8 beside bf16: tokens/s, and the loss after 60 steps on the same tokens",
        "gpu_training.fp8",
        90,
        (Target("speed_over_bf16", least=1.2), Target("loss_difference", most=0.01)),
        {"depth": 24, "rows": 16, "steps": 60},
    ),
    Check(
        "decode_d12",
        "batch 1 to 256, with and without CUDA graphs, against transformers",
        "gpu_inference.decode",
        45,
        DECODE,
        {"depth": 12},
    ),
    Check("decode_d20", "the same at depth 20", "gpu_inference.decode", 35, DECODE, {"depth": 20}),
    Check(
        "prefill",
        "depth 20, prompts of 128 to 8,192 tokens",
        "gpu_inference.prefill",
        30,
        (Target("least_mfu_from_2048", least=0.4),),
        {"depth": 20},
    ),
    Check(
        "speedrun",
        "one minute on docstrings with real Ray, a training worker killed half way",
        "gpu_jobs.speedrun",
        110,
        (Target("as_if_nothing_happened", least=1), Target("answers", least=1)),
    ),
    Check(
        "service",
        "nanochat-ray serve, depth 12, 64 and 256 clients, over the engine alone",
        "gpu_service.service",
        90,
        (Target("least_over_engine", least=0.9), Target("failed", most=0)),
        {"depth": 12},
    ),
    Check(
        "rl",
        "16 questions with 16 answers of 256 tokens, depth 12: asking over the engine alone, and a step",
        "gpu_jobs.reinforcement",
        60,
        (Target("asking_over_engine", least=0.8),),
        {"depth": 12},
    ),
    Check("core", "CORE tasks made of Python's help texts, depth 12", "gpu_jobs.core", 25, (), {"depth": 12}),
)


def function_of(check: Check) -> Callable[..., None]:
    """Imported when the check runs, as Ray and the service take seconds to import."""
    module, function = check.function.split(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)


def main() -> None:
    name, file, *flags = sys.argv[1:]
    tiny = "--tiny" in flags
    if tiny:
        torch.compiler.set_stance("force_eager")  # compiling takes longer than all that it would speed up
    check = next(check for check in CHECKS if check.name == name)

    def report(**figures) -> None:
        print(figures, flush=True)
        with open(file, "a") as f:
            f.write(storage.to_json(figures) + "\n")

    function_of(check)(report, tiny, **check.arguments)


if __name__ == "__main__":
    main()
