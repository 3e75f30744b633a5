"""Spelling a word letter by letter, and counting a letter in a word with the tool.

A small model can't look up a word that it has not seen, but it can copy one. So an answer shows the word in the same
tokens as the question; they depend on the character before the word. There are many words, and most of the training
words are made up.
"""

import re
import sys
import sysconfig
from functools import cache
from pathlib import Path
from random import Random
from string import ascii_lowercase

from nanochat_ray.evals.tasks.common import conversation, in_split, reference_text, same_number, tool_conversation

SPELL = ["Spell the word {word}.", "How do you spell {word}?", "Spell {word} letter by letter."]
COUNT = [
    "How many {letter}'s are in {word}?",
    "How many times does the letter {letter} occur in {word}?",
    "Count the letter '{letter}' in the word {word}.",
    "How often is there a {letter} in {word}?",
]
QUOTED_SHARE = 5 / 6  # share of the questions that have the word in quotes
MADE_UP_SHARE = 0.7  # share of the training words that are made up
MAX_LETTERS = 12  # per word


@cache
def words(split: str) -> list[str]:
    """Return sorted lower-case words of 3 to 12 letters from the standard library's sources. A word is in one split."""
    return [word for word in _library_words() if in_split(split, word)]


def conversations(split: str, size: int, seed: int = 0) -> list[dict]:
    """Return `size` conversations, about half spelling, half counting. The i-th depends only on split, seed and i."""
    return [_conversation(split, Random(f"spelling {split} {seed} {i}")) for i in range(size)]


def judge(conversation: dict, answer_text: str) -> bool:
    """Return whether the answer, without tool calls, ends with the right count or spells the word, however spaced."""
    if isinstance(conversation["messages"][-1]["content"], list):
        return same_number(conversation, answer_text)
    return _spelled(answer_text) == _spelled(reference_text(conversation))


def _spelled(text: str) -> list[str]:
    """Return the letters of the longest run of single letters."""
    runs = re.findall(r"(?:\b[a-z]\b[\W_]*)+", text.lower())
    return re.findall(r"[a-z]", max(runs, key=len, default=""))


@cache
def _library_words() -> list[str]:
    """Return the words of both splits, sorted. This takes a second."""
    library, found = Path(sysconfig.get_path("stdlib")), set()
    for name in sys.stdlib_module_names:
        for path in (library / f"{name}.py", *(library / name).rglob("*.py")):
            if path.is_file():
                text = path.read_text("utf-8", "replace")
                found.update(re.findall(rf"(?<![^\s(])[a-z]{{3,{MAX_LETTERS}}}(?=[\s,.;:?!)]*\s)", text))
    return sorted(found)


def _conversation(split: str, rng: Random) -> dict:
    word = _word(split, rng)
    quoted = rng.random() < QUOTED_SHARE
    shown = f"'{word}'" if quoted else word
    spelled = f"Spelling {shown}: {' '.join(word)}"
    if rng.random() < 1 / 2:
        return conversation(rng.choice(SPELL).format(word=shown), spelled)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(ascii_lowercase)
    # After a space, the word has the same tokens as in a question without quotes.
    expression = f'"{word if quoted else " " + word}".count("{letter}")'
    question = rng.choice(COUNT).format(word=shown, letter=letter)
    return tool_conversation(question, f"{spelled}. ", expression, "That makes {result}.")


def _word(split: str, rng: Random) -> str:
    """Draw a word of the split. Most training words join the beginning of one to the end of another.

    A training word is never a held-out word.
    """
    while split == "train" and rng.random() < MADE_UP_SHARE:
        begin, end = rng.choice(words(split)), rng.choice(words(split))
        made_up = begin[: rng.randint(2, len(begin))] + end[-rng.randint(1, len(end)) :]
        if 3 <= len(made_up) <= MAX_LETTERS and in_split(split, made_up):
            return made_up
    return rng.choice(words(split))
