"""Byte-level BPE: train, load, encode, decode, and turn a conversation into token ids and a loss mask."""

import base64
import binascii
import hashlib
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import rustbpe
import tiktoken

from nanochat_ray import storage

# GPT-4's split pattern, but with digits in groups of one or two, so that numbers take few tokens of the vocabulary.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# The regex engines of tiktoken and rustbpe overflow their stack on a run of a million whitespace characters.
PIECE_CHARS = 500_000
# The split pattern always splits here: before a space, between a line's end and a visible character, and between a
# letter or digit and a punctuation mark. Cutting a text there changes no token.
SAFE_CUT = re.compile(r"\S(?= )|[\r\n](?=\S)|[^\W_](?=[!-/:-@\[-`{-~、。，！？；：])")
LOOK_BACK = 10_000  # characters at the end of a piece that are searched first for a safe cut
# The files that tiktoken downloads for an encoding. It caches each under the sha1 of its URL.
PUBLISHED = {
    "gpt2": (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    ),
    "cl100k_base": ("https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",),
}


class Tokenizer:
    """Byte-level BPE with tiktoken: ranks 0 … n-1, then the special tokens. Picklable, so that Ray can send it."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, special_tokens: dict[str, int] | None = None):
        """Raises ValueError if a byte or a special token is missing, or if the ids have gaps."""
        if special_tokens is None:
            special_tokens = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        if missing := [token for token in SPECIAL_TOKENS if token not in special_tokens]:
            raise ValueError(f"tokenizer: special tokens {', '.join(missing)} are missing")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"tokenizer: {len(missing)} of the 256 single bytes have no token, first {missing[0]}")
        if sorted([*ranks.values(), *special_tokens.values()]) != list(range(len(ranks) + len(special_tokens))):
            raise ValueError(f"tokenizer: ids are not 0 … {len(ranks) + len(special_tokens) - 1}, each once")
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos_id = special_tokens["<|bos|>"]
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32  # the smallest one for all ids
        self._encoding = tiktoken.Encoding(
            "nanochat_ray", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )

    def __reduce__(self):
        return Tokenizer, (self.ranks, self.pattern, self.special_tokens)

    @classmethod
    def load(cls, folder: str) -> "Tokenizer":
        """Read tokenizer.tiktoken and tokenizer.json. Raises FileNotFoundError, or ValueError for damaged files."""
        path, meta_path = (storage.join(folder, name) for name in ("tokenizer.tiktoken", "tokenizer.json"))
        for needed in (path, meta_path):
            if not storage.exists(needed):
                raise FileNotFoundError(f"no tokenizer in {folder}: {needed} is missing")
        content = storage.read_bytes(path)
        try:
            meta = storage.read_json(meta_path)
            pattern, special_tokens = meta["pattern"], meta["special_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{meta_path}: expected JSON with pattern and special_tokens ({error!r})") from None
        if "sha256" in meta and meta["sha256"] != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{path}: the sha256 differs from the one in tokenizer.json: restore the original file")
        try:
            lines = (line.split() for line in content.splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}: expected a base64 token and a rank on each line ({error})") from None
        return cls(ranks, pattern, special_tokens)

    def save(self, folder: str) -> None:
        """Write tokenizer.tiktoken, then tokenizer.json. If the second exists, both are complete."""
        storage.write_bytes(storage.join(folder, "tokenizer.tiktoken"), self._content)
        meta = {"pattern": self.pattern, "special_tokens": self.special_tokens, "sha256": self.sha}
        storage.write_json(storage.join(folder, "tokenizer.json"), meta)

    @cached_property
    def _content(self) -> bytes:
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)

    @property
    def sha(self) -> str:
        """sha256 of tokenizer.tiktoken in hex. Names of row folders begin with it."""
        return hashlib.sha256(self._content).hexdigest()

    def special(self, token: str) -> int:
        """The id of a special token such as "<|assistant_end|>"."""
        if token not in self.special_tokens:
            raise ValueError(f"no special token {token!r}; there are {', '.join(self.special_tokens)}")
        return self.special_tokens[token]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without bos. Special tokens in the text are encoded as plain text."""
        if len(text) <= PIECE_CHARS:
            return self._encoding.encode_ordinary(text)
        return [token for piece in pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `encode` as uint32 (n,). It makes no Python integers, so threads don't wait for the GIL."""
        try:
            ids = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
        except UnicodeEncodeError:  # half a surrogate pair; `encode` replaces it
            return np.array(self.encode(text), dtype=np.uint32)
        return np.concatenate(ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 8) -> list[list[int]]:
        """Token ids of each text, in order."""
        if num_threads > 1 and max(map(len, texts), default=0) <= PIECE_CHARS:
            return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Special tokens become their names, and invalid UTF-8 becomes U+FFFD."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        """Bytes of text of each id, int32 (vocab_size,); 0 for special tokens."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        counts[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return counts

    def render_conversation(self, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
        """(ids, mask) of {"messages": [{"role", "content"}, …]}. The mask is 1 for tokens that the model learns.

        Content is a string or a list of parts {"type": text | python | python_output, "text"}. An assistant's part with
        "weight" 0 is not learned. Both lists are cut to max_tokens (None: not cut). Raises ValueError for a malformed
        conversation.
        """
        ids, mask = [], []
        for tokens, learned in self._render(conversation, self.encode):
            ids.extend(tokens)
            mask.extend([learned] * len(tokens))
        return ids[:max_tokens], mask[:max_tokens]

    def render_to_numpy(self, conversation: dict) -> tuple[np.ndarray, np.ndarray]:
        """render_conversation without a cut, as arrays: ids in `dtype` and mask in uint8."""
        tokens, learned = zip(*self._render(conversation, self.encode_to_numpy), strict=True)
        ids = np.concatenate(tokens, dtype=self.dtype, casting="unsafe")
        return ids, np.repeat(np.array(learned, np.uint8), [len(part) for part in tokens])

    def _render(self, conversation: dict, encode: Callable) -> Iterator[tuple[Sequence[int], int]]:
        """(token ids, mask) of each piece of the conversation, in order."""

        def wrap(name: str, text: str, learned: int) -> Iterator[tuple[Sequence[int], int]]:
            yield [self.special(f"<|{name}_start|>")], learned
            yield encode(text), learned
            yield [self.special(f"<|{name}_end|>")], learned

        yield [self.bos_id], 0
        for role, parts in _turns(conversation):
            if role == "user":
                yield from wrap("user", "".join(part["text"] for part in parts), 0)
                continue
            yield [self.special("<|assistant_start|>")], 0
            learned = 1
            for part in parts:
                learned = part.get("weight", 1)
                if part["type"] == "text":
                    yield encode(part["text"]), learned
                elif part["type"] == "python":
                    yield from wrap("python", part["text"], learned)
                else:  # tool output: the model reads it, but must not learn to write it
                    yield from wrap("output", part["text"], 0)
            yield [self.special("<|assistant_end|>")], learned

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids of a conversation and assistant_start, so that the assistant speaks next.

        Raises ValueError if the last message is not the user's.
        """
        ids, _ = self.render_conversation(conversation, max_tokens=None)
        if (role := conversation["messages"][-1]["role"]) != "user":
            raise ValueError(f"conversation: the last message has role {role!r}, expected 'user'")
        return [*ids, self.special("<|assistant_start|>")]


def _turns(conversation: dict) -> list[tuple[str, list[dict]]]:
    """Alternating (role, parts), the user's first. A system message is joined to the first user message."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('conversation: expected {"messages": [{"role": …, "content": …}, …]}')
    system, turns = "", []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role == "system" and i == 0 and isinstance(content, str):
            system = content + "\n\n"
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise ValueError(f"conversation: message {i} has role {role!r}, expected {expected!r}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kinds = ("text",) if role == "user" else ("text", "python", "python_output")
        if not isinstance(parts, list) or not all(
            isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts
        ):
            raise ValueError(f"conversation: message {i} needs a string, or a list of parts with a type and a text")
        for part in parts:
            if part.get("type") not in kinds:
                raise ValueError(
                    f"conversation: message {i} has a part of type {part.get('type')!r}, expected {' or '.join(kinds)}"
                )
        turns.append((role, [{"type": "text", "text": system}, *parts] if system and not turns else parts))
    if not turns:
        raise ValueError("conversation: no user message")
    return turns


def pieces(text: str) -> Iterator[str]:
    """Split a very long text where that changes no token. A text without such a place is cut anywhere."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _last_safe_cut(text, start, start + PIECE_CHARS)
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def _last_safe_cut(text: str, start: int, end: int) -> int:
    for begin in (end - LOOK_BACK, start):
        if cuts := deque(SAFE_CUT.finditer(text[begin:end]), maxlen=1):
            return begin + cuts[0].end()
    return end


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of exactly vocab_size tokens: bytes, merges and special tokens. Deterministic.

    Raises ValueError if vocab_size has no room for the bytes, or if the text has too few pairs to merge.
    """
    num_ranks = vocab_size - len(SPECIAL_TOKENS)
    if num_ranks < 256:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
    # Replace half surrogate pairs, which JSON can hold, because rustbpe rejects them.
    parts = (piece.encode(errors="replace").decode() for text in texts for piece in pieces(text))
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(parts, num_ranks, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_ranks:
        most = len(ranks) + len(SPECIAL_TOKENS)
        raise ValueError(
            f"vocab_size {vocab_size} is too large: this text gives only {most} tokens; lower it or use more text"
        )
    return Tokenizer(ranks)


def compression(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Bytes per token of this tokenizer ("ours") and of each published encoding in tiktoken's cache."""
    num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    encoders: dict[str, Callable] = {"ours": tokenizer.encode}
    encoders |= {name: tiktoken.get_encoding(name).encode_ordinary for name in PUBLISHED if _is_cached(name)}
    return {name: num_bytes / max(1, sum(len(encode(text)) for text in texts)) for name, encode in encoders.items()}


def _is_cached(name: str) -> bool:
    """Whether tiktoken can load an encoding without the network."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    files = [os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()) for url in PUBLISHED[name]]
    return bool(folder) and all(map(os.path.exists, files))
