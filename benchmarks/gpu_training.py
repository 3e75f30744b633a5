"""Training without Ray, and what the machine can do at most: speed, memory, attention back ends, fp8."""

import gc
import importlib
import re
import time

import torch

from benchmarks.gpu_checks import Report
from nanochat_ray.model.attention import available_backends
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import RunPlan, plan_run
from nanochat_ray.train.metrics import peak_flops
from nanochat_ray.train.plan import predict_memory

BATCH = 2**19  # tokens of a training step
DTYPE = torch.bfloat16


def device_of(tiny: bool) -> torch.device:
    return torch.device("cpu" if tiny else "cuda")


def now(device: torch.device) -> float:
    """Seconds, once all that the device has been given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(call, device: torch.device, calls: int = 20) -> float:
    """Of one call among several without a pause; three calls before them warm up."""
    for _ in range(3):
        call()
    began = now(device)
    for _ in range(calls):
        call()
    return (now(device) - began) / calls


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)  # zeros may copy faster than data does
    target = torch.empty_like(source)
    return 2 * size / seconds_per_call(lambda: target.copy_(source), device)


def machine(report: Report, tiny: bool) -> None:
    device, n = device_of(tiny), 128 if tiny else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPE)
    report(bf16_tflops=2 * n**3 / seconds_per_call(lambda: a @ b, device) / 1e12)
    report(copy_gb_per_s=copy_bandwidth(device, 2**20 if tiny else 2**32) / 1e9)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()  # the second factor must be column-major
    one = torch.ones((), device=device)

    def multiply_fp8() -> None:
        torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=DTYPE, use_fast_accum=not tiny)

    report(fp8_tflops=2 * n**3 / seconds_per_call(multiply_fp8, device) / 1e12)


def plan_of(depth: int, tiny: bool) -> RunPlan:
    """The run of a depth as the gpu preset has it, or a tiny one."""
    if tiny:
        return plan_run(2, sequence_len=160, vocab_size=512, head_dim=32, window_pattern="SL")
    return plan_run(depth, sequence_len=2048, vocab_size=32768, head_dim=128, window_pattern="SSSL")


class Trainer:
    """A model with its optimizer, and micro-batches of made-up tokens."""

    def __init__(self, plan: RunPlan, device: torch.device, rows: int, attention: str | None = None, fp8=False):
        torch.manual_seed(0)
        self.plan, self.device, self.rows = plan, device, rows
        with device:
            self.model = GPT(plan.config)
        self.model.init_weights()
        self.model.set_compute_dtype(DTYPE)
        if fp8:
            self.model.convert_to_fp8()
        self.model.compile_for_training(attention=attention)
        self.optimizer = build_optimizer(self.model, **plan.lrs, weight_decay=plan.weight_decay)
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.plan.config.sequence_len

    def micro_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that a model can learn from: small ids are frequent, and a row's second half repeats its first."""
        config = self.plan.config
        half = config.sequence_len // 2
        chance = torch.rand(self.rows, half + 1, device=self.device, generator=self.generator)
        ids = (config.vocab_size**chance).long() - 1
        row = torch.cat([ids[:, :half], ids], dim=1)
        return row[:, :-1].contiguous(), row[:, 1:].contiguous()

    def forward_backward(self, micro_batches: int) -> torch.Tensor:
        """Gradients of a step of so many micro-batches; returns the last one's mean loss."""
        for _ in range(micro_batches):
            x, y = self.micro_batch()
            loss = self.model(x, y, loss_reduction="sum") / y.numel()
            (loss / micro_batches).backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Compile everything, and let the optimizer make its state."""
        for _ in range(2):
            self.forward_backward(2)
            self.update()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def measure_speed(trainer: Trainer, steps: int) -> dict[str, float]:
    """Whole training steps, and the optimizer once more with nothing else on the device."""
    device = trainer.device
    micro_batches = BATCH // trainer.tokens if device.type == "cuda" else 2
    trainer.warm_up()
    began = now(device)
    for _ in range(steps):
        trainer.forward_backward(micro_batches)
        trainer.update()
    step_seconds = (now(device) - began) / steps
    trainer.forward_backward(1)
    began = now(device)
    trainer.update()
    optimizer_seconds = now(device) - began
    tokens_per_s = micro_batches * trainer.tokens / step_seconds
    return {
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * trainer.plan.flops_per_token / peak_flops(device, DTYPE),
        "step_seconds": step_seconds,
        "optimizer_seconds": optimizer_seconds,
        "optimizer_share": optimizer_seconds / step_seconds,
    }


def train(report: Report, tiny: bool, depth: int, rows: int, compare_attention: bool = False) -> None:
    """Figures of the default back end; with compare_attention also the speed of each one that there is."""
    device, plan = device_of(tiny), plan_of(depth, tiny)
    rows, steps = (2, 1) if tiny else (rows, 3)
    while True:
        try:
            figures = measure_speed(Trainer(plan, device, rows), steps)
            break
        except RuntimeError as error:  # a full card may also fail in cuBLAS or cuDNN
            if rows == 1 or not re.search("out of memory|alloc_failed|workspace", str(error), re.IGNORECASE):
                raise
            report(out_of_memory_rows=rows)
        rows //= 2
        free_memory()
    report(rows=rows, **figures, **memory(plan, rows, device))
    if not compare_attention:
        return
    default, *others = available_backends(device, DTYPE)
    backends = {default: figures}
    for name in others:
        free_memory()
        try:
            backends[name] = measure_speed(Trainer(plan, device, rows, attention=name), steps=1)
        except Exception as error:  # a back end that fails must not hide the others
            backends[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        report(attention=backends)


def free_memory() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def memory(plan: RunPlan, rows: int, device: torch.device) -> dict[str, float]:
    """Peak bytes of tensors beside the plan's, less what the plan counts for the process itself."""
    predicted = predict_memory(plan.config, 1, rows, False, DTYPE)
    tensors = sum(predicted.values()) - predicted["process"]
    figures = {"plan_gib": tensors / 2**30}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_gib": peak / 2**30, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
        figures["memory_over_plan"] = peak / tensors
    return figures


def fp8(report: Report, tiny: bool, depth: int, rows: int, steps: int) -> None:
    """Both models start from the same weights and learn from the same tokens."""
    device, plan = device_of(tiny), plan_of(depth, tiny)
    if device.type == "cuda":
        importlib.import_module("torchao")  # fail before any time is spent
    rows, steps = (2, 3) if tiny else (rows, steps)
    found = {}
    for name in ("bf16", "fp8"):
        free_memory()
        trainer = Trainer(plan, device, rows, fp8=name == "fp8" and device.type == "cuda")
        trainer.warm_up()
        losses = []
        for _ in range(steps):
            losses.append(trainer.forward_backward(1))
            trainer.update()
        loss = torch.stack(losses[-10:]).mean().item()
        found[name] = {"first_loss": losses[0].item(), "loss": loss} | measure_speed(trainer, 1)
        report(**found)
        del trainer
    report(
        speed_over_bf16=found["fp8"]["tokens_per_s"] / found["bf16"]["tokens_per_s"],
        loss_difference=abs(found["fp8"]["loss"] / found["bf16"]["loss"] - 1),
    )
