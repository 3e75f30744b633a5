"""Writes stages.md: what each stage makes of a small text. `python docs/start/example.py` takes a minute or two.

The text is Python's own help topics, which every Python has. The home is a temporary folder.
"""

import json
import os
import pydoc_data.topics
import re
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "What is 45 - 30?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me calculate. "},
                {"type": "python", "text": "45-30"},
                {"type": "python_output", "text": "15"},
                {"type": "text", "text": "The answer is 15."},
            ],
        },
    ]
}
SHOWN_STEPS = (20, 60, 100)


def write_documents(folder: Path) -> list[str]:
    """The paragraphs of Python's help topics as jsonl files; returns the documents."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    documents = [paragraph.strip() for text in texts for paragraph in text.split("\n\n") if len(paragraph) > 80]
    for i in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[i::3]]
        (folder / f"help_{i}.jsonl").write_text("".join(lines))
    return documents


def tokens_of(tokenizer, ids) -> str:
    """The tokens' texts, joined by bars."""
    return "|".join(tokenizer.decode([int(i)]).replace("\n", "⏎") for i in ids)


def wrapped(text: str, width: int = 76) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def samples_at(run_dir: str, step: int) -> str:
    """The last sample of a step."""
    section = Path(run_dir, "samples.md").read_text().partition(f"## step {step}\n")[2].partition("\n## ")[0]
    return re.findall(r"^- (.*)$", section, re.M)[-1]


def page() -> str:
    from nanochat_ray.data import prepare
    from nanochat_ray.data.loader import Rows
    from nanochat_ray.data.tokenizer import Tokenizer
    from nanochat_ray.session import start_ray
    from nanochat_ray.train import pretrain
    from nanochat_ray.train.metrics import read_metrics

    text = Path(tempfile.mkdtemp())
    documents = write_documents(text)
    start_ray()
    prepared = prepare.run(prepare.PrepareOptions([str(text)], vocab_size=2048, sequence_len=64))
    tokenizer, rows = Tokenizer.load(prepared.tokenizer), Rows(f"{prepared.rows}/train")
    run = pretrain.run(
        pretrain.PretrainOptions(
            depth=2,
            rows=prepared.rows,
            head_dim=64,
            window_pattern="L",
            total_batch_size=1024,
            lr_factor=16,
            num_iterations=SHOWN_STEPS[-1],
            eval_every=20,
            eval_tokens=8192,
            sample_every=20,
            save_every=0,
            compile=False,
        )
    )
    document = min((d for d in documents if d.startswith("The ")), key=lambda d: abs(len(d) - 130))
    bpb = {line["step"]: line["val/bpb"] for line in read_metrics(run.run_dir) if "val/bpb" in line}
    ids, mask = tokenizer.render_conversation(CONVERSATION)
    learned = ("learned" if one else " " * 7 for one in mask)
    masked = "\n".join(f"{word}  {tokenizer.decode([i])!r}" for word, i in zip(learned, ids, strict=True))
    parts = {
        "count": f"{len(documents):,}",
        "document": document,
        "tokens": wrapped(tokens_of(tokenizer, tokenizer.encode(document))),
        "n_tokens": str(len(tokenizer.encode(document))),
        "n_bytes": str(len(document.encode())),
        "rows": f"{len(rows):,}",
        "row": wrapped(tokens_of(tokenizer, rows[[3]][0])),
        "curve": "\n".join(f"| {step} | {value:.3f} |" for step, value in sorted(bpb.items()) if step),
        "samples": "\n".join(f"| {step} | {samples_at(run.run_dir, step)} |" for step in SHOWN_STEPS),
        "masked": masked,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], (HERE / "stages.md.in").read_text())


if __name__ == "__main__":
    home = tempfile.mkdtemp()
    os.environ |= {"NANOCHAT_RAY_HOME": home, "WANDB_MODE": "disabled", "OMP_WAIT_POLICY": "PASSIVE"}
    (HERE / "stages.md").write_text(page())
