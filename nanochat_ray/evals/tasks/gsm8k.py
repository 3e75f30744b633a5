"""GSM8K (arXiv:2110.14168): word problems of grade-school arithmetic, solved step by step with a calculator."""

import re
from decimal import Decimal

from nanochat_ray.evals.tasks.common import conversation, hub_rows

MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")  # <<48/2=24>>
FINAL = re.compile(r"#### ([-−]?(?:\d[\d,]*)?\.?\d+)")


def conversations(split: str, datasets_dir: str | None = None, size: int | None = None) -> list[dict]:
    """Return the problems. split: train or test. The marks <<expression=result>> of answers become calculator calls."""
    rows = hub_rows("openai/gsm8k", "main", split, datasets_dir, size)
    return [conversation(row["question"], answer_parts(row["answer"])) for row in rows]


def judge(conversation: dict, answer_text: str) -> bool:
    """Return whether the answer states the number of the reference answer, as `#### number`."""
    stated = final_number(answer_text)
    return stated is not None and stated == final_number(conversation["messages"][-1]["content"][-1]["text"])


def answer_parts(answer: str) -> list[dict]:
    """Split an answer into the text between the marks, and a python and a python_output part for each mark."""
    texts = MARK.split(answer)  # text, expression, result, text, expression, …
    parts = []
    for kind, text in zip(("text", "python", "python_output") * (len(texts) // 3 + 1), texts, strict=False):
        if text or kind != "text":
            parts.append({"type": kind, "text": text})
    return parts


def final_number(text: str) -> Decimal | None:
    """Return the number after the first ####, or None without one. 1,234 is 1234, and 18.00 equals 18."""
    found = FINAL.search(text)
    return Decimal(found[1].replace(",", "").replace("−", "-")) if found else None
