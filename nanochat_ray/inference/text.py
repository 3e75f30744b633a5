"""The text of an answer as its tokens come: in parts of speech, code and tool output, up to a stop string."""

import codecs
from itertools import groupby

KINDS = {  # what follows a special token
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}


class AnswerStream:
    """Tokens in, parts (kind, text) out, the kinds being those of a conversation: text, python, python_output.

    Bytes wait until they make a whole character, and text that may be the beginning of a stop string until it is not.
    After `stopped` nothing more comes; the stop string itself is left out.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.kinds = {tokenizer.special(name): kind for name, kind in KINDS.items()}
        self.kind, self.held = "text", ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *tokens: int) -> list[tuple[str, str]]:
        """The parts that tokens complete, none of them empty."""
        parts = []
        for special, run in groupby(tokens, self.kinds.__contains__):
            if self.stopped:
                break
            if not special:
                parts += self._say(self.decoder.decode(self.tokenizer.decode_bytes(list(run))))
                continue
            parts += self.finish()
            *_, last = run
            self.kind = self.kinds[last]
        return parts

    def finish(self) -> list[tuple[str, str]]:
        """What was held back."""
        parts = self._say(self.decoder.decode(b"", final=True))
        self.decoder.reset()
        if self.held and not self.stopped:
            parts.append((self.kind, self.held))
        self.held = ""
        return parts

    def _say(self, text: str) -> list[tuple[str, str]]:
        text = self.held + text
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(ends)
        safe = min(ends, default=len(text) - self._beginning(text))
        self.held = text[safe:]
        return [(self.kind, text[:safe])] if safe else []

    def _beginning(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0
