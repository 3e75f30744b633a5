"""What the tasks share: rows of the Hub, the split of problems, kinds of conversation, reading an answer back."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain

from nanochat_ray import storage
from nanochat_ray.data import hub
from nanochat_ray.inference.tools import calculate

VAL_EVERY = 20  # one problem in twenty is validation
ROWS_AT_ONCE = 1000  # in memory


def hub_rows(
    name: str,
    config: str | None,
    split: str,
    datasets_dir: str | None = None,
    size: int | None = None,
    shuffled: bool = True,
) -> Iterator[dict]:
    """A dataset's split in the order of shuffle(seed=42), the first `size` rows of it, read as they are taken.

    shuffled: else in its own order, which is faster to read.
    name: of the Hub, or below datasets_dir a folder of the same layout. Raises OSError saying what can't be had."""
    import datasets  # takes a second, and the tasks that need no network do without

    with tempfile.TemporaryDirectory() as scratch:
        # The library's own cache takes two folders of the same name for one: only the Hub's datasets are kept there.
        cache = scratch if datasets_dir else None
        rows = from_hub(datasets.load_dataset, name, config, datasets_dir, split=split, cache_dir=cache)
        if shuffled:
            rows = rows.shuffle(seed=42, keep_in_memory=True)
        rows = rows.select(range(min(len(rows) if size is None else size, len(rows))), keep_in_memory=True)
    batches = rows.with_format("arrow").iter(ROWS_AT_ONCE)  # their files stay open after the folder is gone
    return chain.from_iterable(batch.to_pylist() for batch in batches)


def from_hub(load: Callable, name: str, config: str | None, datasets_dir: str | None, **arguments):
    """load(path, config, **arguments), a function of `datasets`. Raises OSError of one line if that fails."""
    if datasets_dir is not None and not os.path.isdir(os.path.join(datasets_dir, name)):
        raise FileNotFoundError(f"{name} is not in {datasets_dir}: --datasets-dir takes a folder of the Hub's layout")
    hint = "" if datasets_dir else "; --datasets-dir takes a folder of the Hub's layout instead"
    what = " ".join(filter(None, (name, config, arguments.get("split"))))
    return hub.ask(what, hint, load, os.path.join(datasets_dir or "", name), config, **arguments)


def multiple_choice(question: str, choices: list[str], letters: list[str], answer: str) -> dict:
    """A question with its choices, answered by a letter. letters is kept beside the messages, for the judge.

    Raises ValueError when the answer is none of the letters, or a choice has none."""
    if answer not in letters or len(choices) != len(letters):
        raise ValueError(f"{len(choices)} choices, letters {letters}, answer {answer!r}: {question[:80]!r}")
    listed = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
    return conversation(prompt, answer) | {"letters": list(letters)}


def same_letter(conversation: dict, answer_text: str) -> bool:
    """Whether the answer is the letter of the right choice."""
    return answer_text.strip() == reference_text(conversation)


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
