"""Turns the tokens of an answer into text as they come: parts of text, code and tool output, up to a stop string."""

import codecs
from itertools import groupby

KINDS = {  # kind of the part that a special token begins
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}


class AnswerStream:
    """Takes tokens and returns parts (kind, text). Kinds: text, python, python_output, as in conversations.

    It holds back bytes that are no whole character yet, and text that may begin a stop string. A stop string sets
    `stopped` and ends the output; it is not part of it.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.kinds = {tokenizer.special(name): kind for name, kind in KINDS.items()}
        self.kind, self.held = "text", ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *tokens: int) -> list[tuple[str, str]]:
        """The parts that these tokens complete. None is empty."""
        parts = []
        for special, run in groupby(tokens, self.kinds.__contains__):
            if self.stopped:
                break
            if not special:
                parts += self._split(self.decoder.decode(self.tokenizer.decode_bytes(list(run))))
                continue
            parts += self.finish()
            *_, last = run
            self.kind = self.kinds[last]
        return parts

    def finish(self) -> list[tuple[str, str]]:
        """Return the text that was held back."""
        parts = self._split(self.decoder.decode(b"", final=True))
        self.decoder.reset()
        if self.held and not self.stopped:
            parts.append((self.kind, self.held))
        self.held = ""
        return parts

    def _split(self, text: str) -> list[tuple[str, str]]:
        text = self.held + text
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(ends)
        safe = min(ends, default=len(text) - self._beginning(text))
        self.held = text[safe:]
        return [(self.kind, text[:safe])] if safe else []

    def _beginning(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0
