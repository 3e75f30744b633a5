"""Writes a model card: what the model is, its figures, how it was trained, and how to run it."""

from nanochat_ray import storage
from nanochat_ray.model.gpt import GPT
from nanochat_ray.train.checkpoint import run_name
from nanochat_ray.train.metrics import read_metrics

FIGURES = {
    "val/bpb": "bits per byte of validation text",
    "core_metric": "CORE (DCLM), GPT-2 XL has 0.2565",
    "chatcore_metric": "ChatCORE",
}
MAX_CURVE_ROWS = 12  # values of val/bpb, evenly spaced
STAGES = {"pretrain": "base model", "sft": "chat model", "rl": "chat model, finetuned by reinforcement learning"}

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanochat
- nanochat-ray
---

# {name}

A {kind} of {parameters:,} parameters ({layers} layers, width {width}, vocabulary {vocabulary:,}, context {context:,}),
trained with nanochat-ray: nanochat's architecture and recipe, on Ray.

## Figures

{figures}
{curve}
## Recipe

{recipe}

## How to run it

```python
from transformers import pipeline

model = pipeline("text-generation", "{name}", trust_remote_code=True)
{example}
```

The model's code is `modeling_nanochat_ray.py`, in this folder. It does not include the calculator that chat models may
call, which runs in nanochat-ray's engine and service. Text after `<|python_start|>` is such a call.
"""

BASE_EXAMPLE = """print(model("The sky is blue because")[0]["generated_text"])"""
CHAT_EXAMPLE = """\
print(model([{"role": "user", "content": "Why is the sky blue?"}])[0]["generated_text"][-1]["content"])"""


def write(out: str, model: GPT, meta: dict, folder: str, name: str) -> None:
    """Write README.md to `out` from a checkpoint's meta, and from its run's config.json and metrics.jsonl if present.

    folder: the checkpoint's folder. name: the model's name, on the Hub USER/NAME.
    """
    config, lines = _run_of(folder)
    lines = [line for line in lines if line["step"] <= meta["step"]]
    c = model.config
    text = CARD.format(
        name=name,
        kind=STAGES.get(meta.get("stage"), "model"),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=c.n_layer,
        width=c.n_embd,
        vocabulary=c.vocab_size,
        context=c.sequence_len,
        figures=_figures(meta, lines),
        curve=_curve(lines),
        example=BASE_EXAMPLE if meta.get("stage") == "pretrain" else CHAT_EXAMPLE,
        recipe=_recipe(meta, config, run_name(folder)),
    )
    storage.write_bytes(storage.join(out, "README.md"), text.encode())


def _run_of(folder: str) -> tuple[dict, list[dict]]:
    """Return config.json and the metrics of a checkpoint's run. Both are empty if it is not in a run folder."""
    run = storage.parent(storage.parent(folder))
    uri = storage.join(run, "config.json")
    if storage.name(storage.parent(folder)) != "checkpoints" or not storage.exists(uri):
        return {}, []
    return storage.read_json(uri), read_metrics(run)


def _figures(meta: dict, lines: list[dict]) -> str:
    last = {key: line[key] for line in [meta, *lines] for key in FIGURES if line.get(key) is not None}
    return _table(("measure", "value"), [(FIGURES[key], f"{value:.4f}") for key, value in last.items()])


def _curve(lines: list[dict]) -> str:
    measured = [line for line in lines if line.get("val/bpb") is not None]
    if len(measured) < 2:
        return ""
    last = len(measured) - 1
    chosen = sorted({round(i * last / (MAX_CURVE_ROWS - 1)) for i in range(MAX_CURVE_ROWS)})
    rows = [(f"{measured[i]['step']:,}", f"{measured[i]['val/bpb']:.4f}") for i in chosen]
    return f"\n{_table(('step', 'val/bpb'), rows)}\n"


def _recipe(meta: dict, config: dict, run: str) -> str:
    inputs = config.get("inputs", {})
    rates = inputs.get("lrs") or meta.get("lrs") or {}
    batch = inputs.get("total_batch_size") or meta.get("total_batch_size")
    known = {
        "run": run,
        "stage": meta.get("stage"),
        "imported from": meta.get("imported_from"),
        "begun from": inputs.get("init_from"),
        "data": config.get("rows") and storage.name(config["rows"]),
        "steps": f"{meta['step']:,}",
        "tokens a step": batch and f"{batch:,}",
        "learning rates": ", ".join(f"{name.removesuffix('_lr')} {rate:.3g}" for name, rate in rates.items()),
        "weight decay": inputs.get("weight_decay") and f"{inputs['weight_decay']:.3g}",
        "seed": inputs.get("seed"),
        "commit of nanochat-ray": config.get("commit"),
        "trained on": config.get("cluster"),
    }
    return _table(("what", "value"), [(key, str(value)) for key, value in known.items() if value not in (None, "")])


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {a} | {b} |" for a, b in (head, ("---", "---"), *rows))
