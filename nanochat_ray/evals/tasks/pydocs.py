"""Questions about what a name in the installed packages does. The answer is the summary of its docstring."""

import re
from collections import Counter
from collections.abc import Iterator

import pyarrow.parquet as pq

from nanochat_ray import storage
from nanochat_ray.evals.tasks.common import conversation, in_split, reference_text

QUESTIONS = [
    "What does `{name}` do?",
    "What is `{name}`?",
    "What is `{name}` for?",
    "Describe `{name}` in one sentence.",
    "In Python, what does `{name}` do?",
    "Summarize `{name}`.",
]
MIN_CHARS, MAX_CHARS = 15, 200  # per answer
PRIVATE_OR_TEST = re.compile(r"_(?!_\w+__$).*|tests?|conftest|test_.*|Test[A-Z].*")
# A paragraph ends at an empty line or at a heading such as "Args:".
PARAGRAPH_END = re.compile(r"\n\s*\n|\n[ \t]*[\w ]{3,20}:[ \t]*\n")
# A sentence ends at . ! or ? before a capital, but not after e.g., i.e., etc. or an initial.
SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\b[A-Z]\.)(?<=[.!?])\s+(?=[A-Z`\"'(])")


def conversations(shards: list[str], split: str, size: int) -> list[dict]:
    """Return the first `size` conversations of a split in the shards' order, or fewer if the shards hold no more.

    shards: URIs of parquet files with columns name (qualified) and text (a docstring). A name is in one split only,
    and the wording of its question depends only on the name. Raises ValueError if a column is missing."""
    chosen = []
    for name, text in _docstrings(shards):
        if len(chosen) == size:
            break
        answer = summary(text)
        if answer and in_split(split, name) and not any(map(PRIVATE_OR_TEST.fullmatch, name.split("."))):
            wording = QUESTIONS[int(storage.fingerprint("wording", name), 16) % len(QUESTIONS)]
            chosen.append(conversation(wording.format(name=name), answer))
    return chosen


def judge(conversation: dict, answer_text: str) -> bool:
    """Return whether the F1 of the two bags of words is at least 0.5, as in SQuAD (Rajpurkar et al. 2016)."""
    wanted, given = (Counter(re.findall(r"\w+", t.lower())) for t in (reference_text(conversation), answer_text))
    return 2 * (wanted & given).total() >= 0.5 * (wanted.total() + given.total())


def summary(docstring: str) -> str | None:
    """Return the first sentence on one line without markup, or None if it is not a sentence of 15 to 200 characters."""
    paragraph = PARAGRAPH_END.split(docstring.strip())[0]
    sentence = SENTENCE_END.split(" ".join(paragraph.split()))[0]
    sentence = re.sub(r":[\w:.+-]+:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"`\1`", sentence)  # a Sphinx role
    sentence = re.sub(r"`+", "`", sentence).replace("**", "").strip()
    is_signature = re.match(r"[\w.]+\(|[\w.]+ ?->", sentence)
    is_markup = re.search(r"^[^\w`\"']|::|>>>|[=~*-]{4}|\|", sentence)
    if is_signature or is_markup or sentence.endswith(":") or not MIN_CHARS <= len(sentence) <= MAX_CHARS:
        return None
    return sentence if sentence[-1] in ".!?" else f"{sentence}."


def _docstrings(shards: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) in order, with only the first docstring of each name."""
    seen = set()
    for uri in shards:
        with storage.reading(uri) as f:
            file = pq.ParquetFile(f)
            if missing := {"name", "text"} - set(file.schema_arrow.names):
                raise ValueError(
                    f"{uri} has no column {' or '.join(sorted(missing))}: give shards of the source pydocs"
                )
            for batch in file.iter_batches(columns=["name", "text"]):
                for name, text in zip(*(batch.column(c).to_pylist() for c in ("name", "text")), strict=True):
                    if name not in seen:
                        seen.add(name)
                        yield name, text
