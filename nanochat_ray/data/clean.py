"""Quality rules, duplicate detection and decontamination as pure functions on batches of texts.

A rule of RULES returns for each text the reason to drop it, or None. The rules and their thresholds come from Gopher
(arXiv:2112.11446, table A1), C4 (arXiv:1910.10683, section 2.2) and FineWeb (arXiv:2406.17557, section 3.6). Near
duplicates are found as in FineWeb, by MinHash (Broder 1997) over 5-grams of words: 112 hashes in 14 bands of 8.
Languages are recognized by py3langid, naive Bayes over byte n-grams (langid.py, Lui and Baldwin 2012).
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
SENTENCE_ENDS = (".", "!", "?", '"', "'", "”", "’", "。", "！", "？", "…")
BULLETS = ("-", "*", "•", "‣", "◦", "●", "–")
SENTENCE = re.compile(r"[.!?。！？]+(?:\s|$)")
# Largest share of a text's characters in its most frequent n-gram, and in all repeated n-grams, by n.
MAX_TOP_NGRAM_SHARE = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_REPEATED_NGRAM_SHARE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

SHINGLE_WORDS = 5  # words
# Two texts with a Jaccard similarity of 0.8 share at least one band with probability 0.92.
BANDS, BAND_HASHES = 14, 8
TEST_NGRAM = 13  # words; a text that shares so long an n-gram with a test is dropped (arXiv:2005.14165, appendix C)
LANGUAGE_CHARS = 2000  # of a text, which its language is recognized by
BLOCK_CHARS, MAX_TEXT_CHARS = 2**16, 2**22  # see blocks
MAX_CODE_POINT = 0x20000  # characters above are rare: they are not converted to lower case

# Rules


def gopher_quality(text: str) -> str | None:
    words = text.split()
    if not 50 <= len(words) <= 100_000:
        return "fewer than 50 words" if len(words) < 50 else "more than 100,000 words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "words of less than 3 or more than 10 letters on average"
    if max(text.count("#"), text.count("...") + text.count("…")) > 0.1 * len(words):
        return "more than a # or … for each 10 words"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "more than 90 % of lines begin with a bullet"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "more than 30 % of lines end with …"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "less than 80 % of words have a letter"
    if len(STOP_WORDS.intersection(map(str.lower, words))) < 2:
        return "fewer than two of " + ", ".join(sorted(STOP_WORDS))
    return None


def gopher_repetition(texts: Sequence[str]) -> list[str | None]:
    return list(chain.from_iterable(map(_repetition, blocks(texts))))


def _repetition(texts: Sequence[str]) -> list[str | None]:
    why = [_repeated_lines(text) for text in texts]
    split = [text.split() for text in texts]
    counts, chars = np.array([*map(len, split)]), np.array([*map(len, texts)])
    flat = list(chain.from_iterable(split))
    of_words = Hashes(_mix(pd.factorize(np.array(flat, dtype=object))[0].astype(np.uint64)), np.cumsum(counts))
    lengths = np.array([*map(len, flat)])
    for n, most in [*MAX_TOP_NGRAM_SHARE.items(), *MAX_REPEATED_NGRAM_SHARE.items()]:
        repeated = (_top_ngram if n in MAX_TOP_NGRAM_SHARE else _repeated_ngrams)(of_words, lengths, n)
        which = "the most frequent" if n in MAX_TOP_NGRAM_SHARE else "all repeated"
        for i in np.flatnonzero(repeated > most * chars):
            why[i] = why[i] or f"more than {most:.0%} of characters in {which} {n} words"
    return why


def _repeated_lines(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    for name, parts in (("lines", lines), ("paragraphs", paragraphs)):
        again = len(parts) - len(set(parts))
        if again > 0.3 * len(parts):
            return f"more than 30 % of {name} came before"
        if again and sum(map(len, parts)) - sum(map(len, set(parts))) > 0.2 * len(text):
            return f"more than 20 % of characters in {name} that came before"
    return None


def _top_ngram(of_words: "Hashes", lengths: np.ndarray, n: int) -> np.ndarray:
    """Characters that each text's most frequent n-gram covers: int64 (texts,). 0 if no n-gram comes twice."""
    text, start, ngrams = of_words.places(n)
    _, first, times = np.unique(_mix(ngrams + text.astype(np.uint64)), return_index=True, return_counts=True)
    size = np.concatenate([[0], np.cumsum(lengths)])
    chars = np.where(times > 1, times * (size[start[first] + n] - size[start[first]]), 0)
    most = np.zeros(len(of_words.ends), np.int64)
    # Sort by frequency, then by place, so that the first of equally frequent n-grams is assigned last and wins.
    order = np.lexsort((-first, times))
    most[text[first[order]]] = chars[order]
    return most


def _repeated_ngrams(of_words: "Hashes", lengths: np.ndarray, n: int) -> np.ndarray:
    """Characters of each text in n-grams that came earlier in the text: int64 (texts,)."""
    text, start, ngrams = of_words.places(n)
    again = np.ones(len(ngrams), bool)
    again[np.unique(_mix(ngrams + text.astype(np.uint64)), return_index=True)[1]] = False
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(edges, start[again], 1)
    np.add.at(edges, start[again] + n, -1)
    covered = np.concatenate([[0], np.cumsum(np.where(np.cumsum(edges)[:-1] > 0, lengths, 0))])
    return covered[of_words.ends] - covered[np.concatenate([[0], of_words.ends[:-1]])]


def c4_quality(text: str) -> str | None:
    """C4's rules for whole documents. C4 also removes single lines; we don't, because that leaves gaps in the text."""
    lower = text.lower()
    if "lorem ipsum" in lower:
        return "lorem ipsum"
    if "{" in text:
        return "a curly bracket"
    if len(SENTENCE.findall(text)) < 5:
        return "fewer than 5 sentences"
    return None


def fineweb_quality(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no text"
    if sum(line.endswith(SENTENCE_ENDS) for line in lines) < 0.12 * len(lines):
        return "less than 12 % of lines end a sentence"
    if sum(len(line) < 30 for line in lines) > 0.67 * len(lines):
        return "more than 67 % of lines have fewer than 30 characters"
    if sum(map(len, lines)) - sum(map(len, set(lines))) > 0.1 * sum(map(len, lines)):
        return "more than 10 % of characters in lines that came before"
    return None


def per_text(rule: Callable[[str], str | None]) -> Callable[[Sequence[str]], list[str | None]]:
    """Make a rule for one text a rule for a batch."""
    return lambda texts: [rule(text) for text in texts]


RULES: dict[str, Callable[[Sequence[str]], list[str | None]]] = {
    "gopher": per_text(gopher_quality),
    "repetition": gopher_repetition,
    "c4": per_text(c4_quality),
    "fineweb": per_text(fineweb_quality),
}

# Languages


def known_languages() -> list[str]:
    """The codes (ISO 639) of the languages that are recognized."""
    from py3langid import langid  # it loads its model of 5 MB when it is first used

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE).labels


def other_language(texts: Sequence[str], languages: Collection[str]) -> list[str | None]:
    """For each text None if it is in one of the languages (codes), else its own. The first 2,000 characters decide."""
    from py3langid import classify

    found = [classify(text[:LANGUAGE_CHARS])[0] for text in texts]
    return [None if language in languages else f"is {language}" for language in found]


# Words and n-grams of a batch of texts


@dataclass(frozen=True)
class Hashes:
    """Hashes of the words or n-grams of a batch: those of the first text, then those of the second, and so on."""

    values: np.ndarray  # uint64
    ends: np.ndarray  # int64 (texts,): where the hashes of each text end

    def ngrams(self, n: int) -> "Hashes":
        """The hash of every n-gram. A text of fewer than n words has one n-gram of all its words."""
        counts = np.diff(self.ends, prepend=0)
        num_ngrams = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
        starts = np.repeat(self.ends - counts, num_ngrams) + _ranges(num_ngrams)
        padded = np.concatenate([self.values, np.zeros(n, np.uint64)])
        left = np.repeat(self.ends, num_ngrams) - starts  # values of the text from here on
        mixed = np.zeros(len(starts), np.uint64)
        for i in range(n):
            mixed = _mix(mixed + np.where(left > i, padded[starts + i], np.uint64(0)))
        return Hashes(mixed, np.cumsum(num_ngrams))

    def places(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, index of the first word, hash) of each n-gram. A text of fewer than n words has none."""
        counts = np.diff(self.ends, prepend=0)
        num_ngrams = np.maximum(0, counts - n + 1)
        text = np.repeat(np.arange(len(counts)), num_ngrams)
        start = np.repeat(self.ends - counts, num_ngrams) + _ranges(num_ngrams)
        mixed = np.zeros(len(start), np.uint64)
        for i in range(n):
            mixed = _mix(mixed + self.values[start + i])
        return text, start, mixed


def blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Group texts into blocks of about BLOCK_CHARS characters. Only the first MAX_TEXT_CHARS of a text are used.

    The arrays of a block stay in a core's cache, which is five times as fast as one large batch."""
    ends = np.cumsum([len(text) for text in texts])
    for group in np.split(np.arange(len(texts)), np.flatnonzero(np.diff(ends // BLOCK_CHARS)) + 1):
        yield [texts[i][:MAX_TEXT_CHARS] for i in group]


def words(texts: Sequence[str]) -> Hashes:
    """Hashes of the lower-case words of texts. A word is a run of letters, digits and marks of any script."""
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    letters = np.where(codes < MAX_CODE_POINT, _letters()[np.minimum(codes, MAX_CODE_POINT - 1)], codes)
    is_letter = letters != 0
    first = is_letter.copy()
    first[1:] &= ~is_letter[:-1]
    chars = letters[is_letter]
    begins = np.flatnonzero(first[is_letter])
    if not len(begins):
        return Hashes(np.zeros(0, np.uint64), np.zeros(len(texts), np.int64))
    places = np.arange(len(chars)) - np.repeat(begins, np.diff(begins, append=len(chars)))
    values = _mix(np.add.reduceat(chars * _powers()[places & 63], begins))
    text_ends = np.cumsum([len(text) + 1 for text in texts])
    return Hashes(values, np.searchsorted(np.flatnonzero(first), text_ends))


@cache
def _letters() -> np.ndarray:
    """Map each code point to its lower-case letter's, or to 0 if it is not part of a word."""
    table = np.zeros(MAX_CODE_POINT, np.uint32)
    for code in range(MAX_CODE_POINT):
        char = chr(code)
        if char.isalnum() or unicodedata.category(char)[0] == "M":
            table[code] = ord(char.lower()[0])
    return table


@cache
def _powers() -> np.ndarray:
    return np.cumprod(np.full(64, 0x9E3779B97F4A7C15, np.uint64))


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 … count − 1 for each count, one range after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: each output bit depends on all input bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Duplicates


def digest(text: str) -> bytes:
    """An 8-byte hash of the text. Case and white space do not change it."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def minhash(shingles: Hashes) -> np.ndarray:
    """MinHash signatures, uint32 (texts, BANDS · BAND_HASHES): the smallest shingle hash in each of so many orders.

    Two texts with Jaccard similarity J agree in each column with probability J. A text without words has 2³² − 1."""
    random = np.random.default_rng(1)
    orders = random.integers(0, 2**32, (BANDS * BAND_HASHES, 2), dtype=np.uint32) | np.array([[0, 1]], np.uint32)
    values = (shingles.values >> np.uint64(32)).astype(np.uint32)
    counts = np.diff(shingles.ends, prepend=0)
    signature = np.full((len(counts), len(orders)), 2**32 - 1, np.uint32)
    full = np.flatnonzero(counts)
    if len(full):
        begins, ordered = (shingles.ends - counts)[full], np.empty_like(values)
        for k, (flips, factor) in enumerate(orders):
            np.multiply(np.bitwise_xor(values, flips, out=ordered), factor, out=ordered)
            signature[full, k] = np.minimum.reduceat(ordered, begins)
    return signature


def bands(texts: Sequence[str]) -> np.ndarray:
    """LSH bands, uint64 (texts, BANDS). Near duplicates share at least one. A text shorter than a shingle has zeros."""
    return np.concatenate([_bands(block) for block in blocks(texts)])


def _bands(texts: Sequence[str]) -> np.ndarray:
    of_texts = words(texts)
    signature = minhash(of_texts.ngrams(SHINGLE_WORDS)).astype(np.uint64).reshape(len(texts), BANDS, BAND_HASHES)
    keys = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), signature.shape[:2])
    for i in range(BAND_HASHES):
        keys = _mix(keys + signature[:, :, i])
    short = np.diff(of_texts.ends, prepend=0) < SHINGLE_WORDS
    return np.where(short[:, None], np.uint64(0), keys)


def pairs(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(document, next document with the same number), two int64 arrays. The number 0 matches nothing."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    return order[same], order[same + 1]


def duplicates(paired: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Which of `count` documents to drop, bool (count,): all but the first of each connected component of the pairs."""
    edges = tuple(map(np.concatenate, zip(*paired, strict=True)))
    graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    again = np.ones(count, bool)
    again[np.unique(component, return_index=True)[1]] = False
    return again


# Decontamination


def ngrams_of_tests(texts: Sequence[str]) -> np.ndarray:
    """Sorted uint64 hashes of all 13-grams of the tests. Shorter tests match too many texts and are skipped."""
    return np.unique(np.concatenate([words(block).places(TEST_NGRAM)[2] for block in blocks(texts)]))


def contaminated(texts: Sequence[str], of_tests: np.ndarray) -> np.ndarray:
    """Which texts share a 13-gram with a test: bool (texts,)."""
    return np.concatenate([_contaminated(block, of_tests) for block in blocks(texts)])


def _contaminated(texts: Sequence[str], of_tests: np.ndarray) -> np.ndarray:
    text, _, ngrams = words(texts).places(TEST_NGRAM)
    hit = np.zeros(len(texts), bool)
    if len(of_tests):
        at = np.minimum(np.searchsorted(of_tests, ngrams), len(of_tests) - 1)
        hit[text[of_tests[at] == ngrams]] = True
    return hit
