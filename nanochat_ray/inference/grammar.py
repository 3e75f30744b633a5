"""Constrained decoding with llguidance: makes grammars from schemas and says which tokens may come next.

JSON may have white space only after `,` and `:`, so that a model cannot write spaces for ever.
"""

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from llguidance.tiktoken import lltokenizer_from_encoding

CACHED_GRAMMARS = 64
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def from_json_schema(schema: dict) -> str:
    """The grammar of JSON that is valid under a schema (draft 2020-12). Raises ValueError for unsupported schemas."""
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema is an object, not {type(schema).__name__}")
    return _checked(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE))


def json_object() -> str:
    """The grammar of any JSON object."""
    return from_json_schema({"type": "object"})


def from_regex(pattern: str) -> str:
    """The grammar of texts that a regular expression matches as a whole. Raises ValueError for an invalid one, and for
    lookahead or lookbehind."""
    return _checked(LLMatcher.grammar_from_regex(pattern))


def from_choices(choices: list[str]) -> str:
    """The grammar of exactly one of these texts. Raises ValueError without texts, and for an empty one."""
    if not choices or not all(choices):
        raise ValueError("choices need one or more texts that are not empty")
    return from_regex("|".join(map(re.escape, choices)))


def _checked(grammar: str) -> str:
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise ValueError(_reason(messages[0]))
    return grammar


def _reason(error: str) -> str:
    """The line of an error message that names the cause."""
    lines = [line.strip() for line in error.splitlines()]
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")


class Grammars:
    """Compiles grammars for a tokenizer and finds the tokens that they allow next."""

    def __init__(self, tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.ends = [tokenizer.special("<|assistant_end|>"), tokenizer.bos_id]
        self.forbidden = [token for token in tokenizer.special_tokens.values() if token not in self.ends]
        self.thread = ThreadPoolExecutor(1, "grammar")
        self.compiled = lru_cache(CACHED_GRAMMARS)(self._compile)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of the grammar. The first call compiles it, which may take a second. Thread-safe.

        Raises ValueError for a grammar that is invalid or too large.
        """
        return self.compiled(grammar).deep_copy()

    def allowed(self, matchers: list[LLMatcher | None]) -> "Future[np.ndarray]":
        """A future of bool (B, V): the tokens that may come next. Rows without a matcher allow all."""
        return self.thread.submit(self._allowed, matchers)

    def _allowed(self, matchers: list[LLMatcher | None]) -> np.ndarray:
        bits = allocate_token_bitmask(len(matchers), self.vocab_size)
        constrained = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
        fill_next_token_bitmask_par(self._executor, constrained, bits)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=self.vocab_size, bitorder="little")
        rows = [row for _, row in constrained]
        allowed[np.ix_(rows, self.forbidden)] = 0
        return allowed.view(bool)

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        encoding = self.tokenizer._encoding
        return lltokenizer_from_encoding(encoding, n_vocab=self.vocab_size, eos_token=self.ends)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        matcher.compute_bitmask()  # the first call may take a second; make it here, outside the engine's steps
        if matcher.is_error():
            raise ValueError(f"grammar: {_reason(matcher.get_error())}")
        return matcher
