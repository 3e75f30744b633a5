"""Decoding and prefill of the engine alone: share of memory bandwidth, MFU, and transformers' generate beside it."""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from benchmarks.gpu_checks import Report
from benchmarks.gpu_training import DTYPE, copy_bandwidth, device_of, free_memory, now, plan_of
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.kv_cache import cache_bytes
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.scaling import RunPlan
from nanochat_ray.train.metrics import peak_flops

BATCHES = (1, 8, 32, 128, 256)
PROMPT = 64  # tokens
NEW = 128  # tokens that each sequence decodes while time is taken
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)  # of prompts


def build(config: GPTConfig, device: torch.device) -> GPT:
    torch.manual_seed(0)
    with device:
        model = GPT(config)
    model.init_weights()
    return model.set_compute_dtype(DTYPE).eval()


def prompts(config: GPTConfig, count: int, length: int) -> list[list[int]]:
    return torch.randint(config.vocab_size, (count, length)).tolist()


def decode(report: Report, tiny: bool, depth: int) -> None:
    """Tokens a second by batch size, with CUDA graphs, without them, and of transformers with a model of that size."""
    device, plan = device_of(tiny), plan_of(depth, tiny)
    batches, new = ((1, 3), 4) if tiny else (BATCHES, NEW)
    bandwidth = copy_bandwidth(device, 2**20 if tiny else 2**32)
    report(copy_gb_per_s=bandwidth / 1e9)
    transformers = transformers_speed(plan, device, batches, new)
    report(transformers=transformers)
    free_memory()
    kv_bytes = cache_bytes(plan.config, max(batches), 2 * (PROMPT + new), DTYPE.itemsize)
    engine = Engine(build(plan.config, device), None, max(batches), kv_bytes)
    with no_graphs(device):
        report(without_graphs=decode_speeds(engine, batches, new))
    began = now(device)
    engine.compile()
    report(compile_seconds=now(device) - began)
    speed = decode_speeds(engine, batches, new)
    weights = DTYPE.itemsize * (plan.param_counts["transformer_matrices"] + plan.param_counts["lm_head"])
    report(with_graphs=speed, ms_per_token=1e3 / speed[1], bandwidth_share=weights * speed[1] / bandwidth)
    ratios = {batch: speed[batch] / transformers[batch] for batch in transformers}
    if ratios:
        report(over_transformers=ratios, least_over_transformers=min(ratios.values()))


@contextmanager
def no_graphs(device: torch.device) -> Iterator[None]:
    """Within it an engine on a GPU captures no graph of its own accord."""
    if device.type == "cpu":
        yield
        return
    from nanochat_ray.inference import gpu_runner

    before, gpu_runner.EAGER_STEPS = gpu_runner.EAGER_STEPS, math.inf
    yield
    gpu_runner.EAGER_STEPS = before


def decode_speeds(engine: Engine, batches: tuple[int, ...], new: int) -> dict[int, float]:
    """Tokens a second by batch size. The first few of each size, which compile kernels, are not counted."""
    for batch in batches:
        decode_speed(engine, batch, 4)
    return {batch: decode_speed(engine, batch, new) for batch in batches}


def decode_speed(engine: Engine, batch: int, new: int) -> float:
    """Tokens a second from the step that reads the last prompt to the end of all sequences."""
    device = engine.runner.device
    params = SamplingParams(new + 1)
    sequences = [s for prompt in prompts(engine.config, batch, PROMPT) for s in engine.submit(prompt, params)]
    while any(not sequence.generated for sequence in sequences):
        engine.step()
    before = sum(sequence.generated for sequence in sequences)
    began = now(device)
    while engine.busy:
        engine.step()
    return (sum(sequence.generated for sequence in sequences) - before) / (now(device) - began)


def transformers_speed(plan: RunPlan, device: torch.device, batches: tuple[int, ...], new: int) -> dict[int, float]:
    """Decoded tokens a second of generate on a Llama of the plan's sizes; none where transformers is not installed."""
    if not find_spec("transformers"):
        return {}
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=plan.config.vocab_size,
        hidden_size=plan.n_embd,
        intermediate_size=-(-8 * plan.n_embd // 3 // 64) * 64,  # three matrices with as many weights as the MLP's two
        num_hidden_layers=plan.depth,
        num_attention_heads=plan.n_head,
        num_key_value_heads=plan.config.n_kv_head,
        max_position_embeddings=plan.config.sequence_len,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        model = LlamaForCausalLM(config).to(DTYPE).eval()

    def seconds(batch: int, tokens: int) -> float:
        idx = torch.tensor(prompts(plan.config, batch, PROMPT), device=device)
        began = now(device)
        model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=tokens, do_sample=False)
        return now(device) - began

    speed = {}
    for batch in batches:
        seconds(batch, 2)  # warms up
        speed[batch] = batch * new / (seconds(batch, new + 1) - seconds(batch, 1))
    return speed


def prefill(report: Report, tiny: bool, depth: int) -> None:
    """Seconds to the first token of one prompt, and MFU, by its length."""
    device, plan = device_of(tiny), plan_of(depth, tiny)
    lengths, rounds = ((40, 200), 1) if tiny else (LENGTHS, 5)
    engine = Engine(build(plan.config, device), None, 8)
    engine.compile()
    peak, seconds, mfu = peak_flops(device, DTYPE), {}, {}
    for length in lengths:
        seconds[length] = statistics.median([first_token(engine, length) for _ in range(rounds + 1)][1:])
        mfu[length] = forward_flops(plan, length) / seconds[length] / peak
        report(seconds_to_first_token=seconds, mfu=mfu)
    long = [mfu[length] for length in lengths if length >= 2048 or tiny]
    report(least_mfu_from_2048=min(long))


def first_token(engine: Engine, length: int) -> float:
    [prompt] = prompts(engine.config, 1, length)
    began = now(engine.runner.device)
    engine.submit(prompt, SamplingParams(1))
    while engine.busy:
        engine.step()
    return now(engine.runner.device) - began


def forward_flops(plan: RunPlan, length: int) -> float:
    """Of reading one prompt: 2 a weight and token, 4·H·D a pair of tokens of which one sees the other, one row of the
    head."""
    counts, config = plan.param_counts, plan.config
    pairs = 0
    for window in config.window_sizes:
        full = min(length, window + 1)  # tokens that see all tokens before them
        pairs += full * (full + 1) // 2 + (length - full) * (window + 1)
    matmuls = 2 * (length * counts["transformer_matrices"] + counts["lm_head"])
    return matmuls + 4 * config.n_head * config.head_dim * pairs
