"""What the tasks share: the split of problems, conversations that call the calculator, reading a number back."""

import re

from nanochat_ray import storage
from nanochat_ray.inference.tools import calculate

VAL_EVERY = 20  # one problem in twenty is validation


def in_split(split: str, *problem) -> bool:
    """Whether a problem is in the split, "train" or "val": the problem itself decides, whatever words ask for it."""
    if split not in ("train", "val"):
        raise ValueError(f"there is no split {split!r}: use train or val")
    return (split == "val") == (int(storage.fingerprint(*problem), 16) % VAL_EVERY == 0)


def conversation(question: str, answer: str | list[dict]) -> dict:
    """One user turn and one assistant turn, whose answer is text or a list of parts."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tool_conversation(question: str, opening: str, expression: str, closing: str) -> dict:
    """An answer that calls the calculator. closing: the text after it, with {result} where the result goes.

    Raises ValueError when the calculator has no result for the expression."""
    output = calculate(expression)
    if output is None:
        raise ValueError(f"the calculator has no result for {expression!r}: give it an expression it can evaluate")
    parts = [
        {"type": "text", "text": opening},
        {"type": "python", "text": expression},
        {"type": "python_output", "text": output},
        {"type": "text", "text": closing.format(result=output.removesuffix(".0"))},
    ]
    return conversation(question, parts)


def reference_text(conversation: dict) -> str:
    """The text the conversation answers with in the end: the last part."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def last_number(text: str) -> float | None:
    """The last number of a text, thousands separators allowed: where an answer states its result."""
    numbers = re.findall(r"(?:(?<![\w)])[-−])?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def same_number(conversation: dict, answer_text: str) -> bool:
    """Whether an answer ends on the number the conversation ends on."""
    return last_number(answer_text) == last_number(reference_text(conversation))
