"""Shared by the tasks: reading rows of the Hub, splitting problems, building conversations, reading answers."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain

from nanochat_ray import storage
from nanochat_ray.data import hub
from nanochat_ray.inference.tools import calculate

VAL_EVERY = 20  # one problem in twenty is for validation
ROWS_AT_ONCE = 1000  # rows in memory


def hub_rows(
    name: str,
    config: str | None,
    split: str,
    datasets_dir: str | None = None,
    size: int | None = None,
    shuffled: bool = True,
) -> Iterator[dict]:
    """Iterate over the first `size` rows of a dataset's split, in the order of shuffle(seed=42). Rows are read lazily.

    name: a dataset of the Hub, or a folder of the same layout below datasets_dir. shuffled: False keeps the dataset's
    own order, which is faster to read. Raises OSError with the name of what can't be read."""
    import datasets  # the import takes a second; the offline tasks do not need it

    with tempfile.TemporaryDirectory() as scratch:
        # Use the library's cache only for the Hub's datasets: it takes two local folders of the same name for one.
        cache = scratch if datasets_dir else None
        rows = from_hub(datasets.load_dataset, name, config, datasets_dir, split=split, cache_dir=cache)
        if shuffled:
            rows = rows.shuffle(seed=42, keep_in_memory=True)
        rows = rows.select(range(min(len(rows) if size is None else size, len(rows))), keep_in_memory=True)
    batches = rows.with_format("arrow").iter(ROWS_AT_ONCE)  # the files stay open after the folder is deleted
    return chain.from_iterable(batch.to_pylist() for batch in batches)


def from_hub(load: Callable, name: str, config: str | None, datasets_dir: str | None, **arguments):
    """Call load(path, config, **arguments), a function of `datasets`. Raises OSError with one line if that fails."""
    if datasets_dir is not None and not os.path.isdir(os.path.join(datasets_dir, name)):
        raise FileNotFoundError(f"{name} is not in {datasets_dir}: --datasets-dir takes a folder of the Hub's layout")
    hint = "" if datasets_dir else "; --datasets-dir takes a folder of the Hub's layout instead"
    what = " ".join(filter(None, (name, config, arguments.get("split"))))
    return hub.ask(what, hint, load, os.path.join(datasets_dir or "", name), config, **arguments)


def multiple_choice(question: str, choices: list[str], letters: list[str], answer: str) -> dict:
    """Return a question with its choices, answered by a letter. `letters` is kept beside the messages, for ChatCORE.

    Raises ValueError if the answer is not one of the letters, or if there is not one letter per choice."""
    if answer not in letters or len(choices) != len(letters):
        raise ValueError(f"{len(choices)} choices, letters {letters}, answer {answer!r}: {question[:80]!r}")
    listed = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
    return conversation(prompt, answer) | {"letters": list(letters)}


def same_letter(conversation: dict, answer_text: str) -> bool:
    """Return whether the answer is the letter of the right choice."""
    return answer_text.strip() == reference_text(conversation)


def in_split(split: str, *problem) -> bool:
    """Return whether a problem is in the split, "train" or "val". Only the problem decides, not its wording."""
    if split not in ("train", "val"):
        raise ValueError(f"there is no split {split!r}: use train or val")
    return (split == "val") == (int(storage.fingerprint(*problem), 16) % VAL_EVERY == 0)


def conversation(question: str, answer: str | list[dict]) -> dict:
    """Return a user turn and an assistant turn. The answer is text or a list of parts."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tool_conversation(question: str, opening: str, expression: str, closing: str) -> dict:
    """Return a conversation whose answer calls the calculator. closing: the text after the call, with {result} in it.

    Raises ValueError if the calculator has no result for the expression."""
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
    """Return the text of the reference answer, or of its last part if it has several."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def last_number(text: str) -> float | None:
    """Return the last number of a text, where an answer states its result, or None. Commas may separate thousands."""
    numbers = re.findall(r"(?:(?<![\w)])[-−])?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def same_number(conversation: dict, answer_text: str) -> bool:
    """Return whether an answer ends with the same number as the reference answer."""
    return last_number(answer_text) == last_number(reference_text(conversation))
