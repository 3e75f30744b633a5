"""The service on a GPU under load, beside its engine alone."""

import tempfile
import time

import torch

from benchmarks import serve as serve_benchmark
from benchmarks.gpu_checks import Report
from benchmarks.gpu_inference import build, prompts
from benchmarks.gpu_training import device_of, free_memory, now, plan_of
from benchmarks.train import tokenizer_of_size
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.train.checkpoint import load_model, save_checkpoint


def service(report: Report, tiny: bool, depth: int) -> None:
    """Tokens a second through HTTP over those of the engine alone, with as many requests at once."""
    device, plan = device_of(tiny), plan_of(depth, tiny)
    clients, prompt, new = ((2,), 16, 8) if tiny else ((64, 256), 64, 128)
    most, failed, ratios = max(clients), 0, {}
    with tempfile.TemporaryDirectory() as home:
        tokenizer = tokenizer_of_size(plan.config.vocab_size)
        folder = save_checkpoint(home, 0, build(plan.config, torch.device("cpu")), None, tokenizer, {})
        alone = {count: engine_speed(folder, device, count, prompt, new) for count in clients}
        report(engine_tokens_per_s=alone)
        free_memory()
        began = time.perf_counter()
        options = serve_benchmark.Options(dtype="bfloat16", compile=not tiny, max_batch_size=most)
        with serve_benchmark.serving(folder, options, home) as running:
            report(start_seconds=time.perf_counter() - began)
            load = {"prompt_tokens": prompt, "max_tokens": new}
            running.load(**load, clients=most, requests=most)  # warms up
            for count in clients:
                result = running.measure(**load, clients=count, requests=8 * count)
                failed += result["failed"] + result["rejected"]
                ratios[count] = result["tokens_per_s"] / alone[count]
                report(over_engine=ratios, failed=failed, **{f"clients_{count}": result})
    report(least_over_engine=min(ratios.values()))


def engine_speed(folder: str, device: torch.device, count: int, prompt: int, new: int) -> float:
    """Tokens a second of the engine alone, prompts included, for eight requests of each of `count` clients."""
    model, tokenizer, _ = load_model(folder, device, "bfloat16")
    engine = Engine(model, tokenizer, count)
    engine.compile()
    engine.generate(prompts(engine.config, count, prompt), SamplingParams(new))  # warms up
    asked = prompts(engine.config, 8 * count, prompt)
    began = now(device)
    completions = engine.generate(asked, SamplingParams(new))
    return sum(len(completion.tokens) for completion in completions) / (now(device) - began)
