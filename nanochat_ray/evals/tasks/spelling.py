"""Spelling: a word letter by letter, and how often a letter is in a word, counted with the tool."""

import re
from functools import cache
from pydoc_data.topics import topics
from random import Random
from string import ascii_lowercase

from nanochat_ray.evals.tasks.common import conversation, in_split, reference_text, same_number, tool_conversation

SPELL = ["Spell the word '{word}'.", "How do you spell {word}?", "Spell {word} letter by letter."]
COUNT = [
    "How many {letter}'s are in {word}?",
    "How many times does the letter {letter} occur in {word}?",
    "Count the letter '{letter}' in the word '{word}'.",
    "How often is there a {letter} in {word}?",
]


@cache
def words(split: str) -> list[str]:
    """Sorted lower-case words of 3 to 12 letters from the help texts every Python carries, a word in one split only."""
    found = set(re.findall(r"(?<![^\s(])[a-z]{3,12}(?=[\s,.;:?!)]*\s)", " ".join(topics.values())))
    return sorted(word for word in found if in_split(split, word))


def conversations(split: str, size: int, seed: int = 0) -> list[dict]:
    """size conversations, a third spelling and the rest counting; the i-th depends on split, seed and i alone."""
    return [_conversation(words(split), Random(f"spelling {split} {seed} {i}")) for i in range(size)]


def judge(conversation: dict, answer_text: str) -> bool:
    """Whether the answer, without its tool calls, ends on the right count, or spells the word with any separators."""
    if isinstance(conversation["messages"][-1]["content"], list):
        return same_number(conversation, answer_text)
    runs = re.findall(r"(?:\b[a-z]\b[\W_]*)+", answer_text.lower())
    spelled = re.findall(r"[a-z]", max(runs, key=len, default=""))
    return spelled == reference_text(conversation).split()


def _conversation(words: list[str], rng: Random) -> dict:
    word = rng.choice(words)
    if rng.random() < 1 / 3:
        return conversation(rng.choice(SPELL).format(word=word), " ".join(word))
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(ascii_lowercase)
    question = rng.choice(COUNT).format(word=word, letter=letter)
    closing = f"The letter {letter} is in {word} {{result}} time{'' if word.count(letter) == 1 else 's'}."
    return tool_conversation(question, "Let me count. ", f"'{word}'.count('{letter}')", closing)
