"""Writes an engine's messages as OpenAI's answers to chats and completions, whole or as server-sent events."""

import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.text import AnswerStream
from serving.messages import listed, merged
from serving.protocol import ApiError, event
from serving.requests import CompletionRequest, Request

MIN_LOGPROB = -9999.0  # written for minus infinity, which JSON can't express


@dataclass(frozen=True)
class TextToken:
    """A token of an answer's text. A stop string can cut it, so that only its first characters remain."""

    id: int
    logprobs: tuple[float | None, list[tuple[int, float]]]  # its own, and (id, log probability) of the likeliest
    start: int  # characters of the text before the token
    end: int  # characters of the text up to the token's end
    bytes: bytes


@dataclass
class Piece:
    """A new piece of an answer. Only pieces of text have tokens; the calculator's input and output have none."""

    kind: str  # text, python or python_output
    text: str
    tokens: list[TextToken] = field(default_factory=list)


class Choice:
    """One answer while it grows: its parts, and the tokens of its text if log probabilities were requested."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self.tokenizer, self.stream = tokenizer, AnswerStream(tokenizer, stops)
        self.parts: list[tuple[str, str]] = []
        self.tokens: list[TextToken] = []
        self.reason: str | None = None
        self.said = 0  # characters of the text so far
        self.waiting: deque[TextToken] = deque()  # tokens whose text the stream still holds back

    @property
    def text(self) -> str:
        """The text without the calculator's input and output."""
        return "".join(text for kind, text in self.parts if kind == "text")

    def echo(self, ids: list[int], logprobs: list | None) -> Piece:
        """Begin the answer with the prompt. A bos at its beginning is a token without text."""
        bos = ids[:1] == [self.tokenizer.bos_id]
        piece = Piece("text", self.tokenizer.decode(ids[1:] if bos else ids))
        if logprobs is not None:
            stream, start = AnswerStream(self.tokenizer), 0
            for i, (token, own) in enumerate(zip(ids, logprobs, strict=True)):
                raw = b"" if bos and i == 0 else self._bytes(token)
                end = start + sum(len(text) for _, text in stream.push(*([token] if raw else [])))
                piece.tokens.append(TextToken(token, own or (None, []), start, end, raw))
                start = end
        self.said += len(piece.text)
        self._note(piece)
        return piece

    def push(
        self, tokens: list[int], logprobs: list | None, reason: str | None, ending: tuple | None = None
    ) -> list[Piece]:
        """Add tokens and return the new pieces. ending: the token that ended the answer, which has no text, and its log
        probabilities.
        """
        pieces, stream = [], self.stream
        if logprobs is None:
            self._tell(pieces, stream.push(*tokens))
        for token, own in zip(tokens, logprobs, strict=True) if logprobs is not None else ():
            start = self.said + len(stream.held)
            of_text = stream.kind == "text" and token not in stream.kinds and not stream.stopped
            parts = stream.push(token)
            if of_text:
                end = self.said + sum(len(text) for _, text in parts) + len(stream.held)
                self.waiting.append(TextToken(token, own, start, end, self._bytes(token)))
            self._tell(pieces, parts)
        if reason:
            self.reason = reason
            self._tell(pieces, stream.finish())
            if self.waiting and self.waiting[0].start < self.said:  # a stop string cut this token
                self._last(pieces).tokens.append(self._cut(self.waiting[0]))
            if ending:
                self._last(pieces).tokens.append(TextToken(*ending, self.said, self.said, b""))
        for piece in pieces:
            self._note(piece)
        return pieces

    def _bytes(self, token: int) -> bytes:
        return self.tokenizer.decode_bytes([token])

    def _tell(self, pieces: list[Piece], parts: list[tuple[str, str]]) -> None:
        for kind, text in parts:
            if pieces and pieces[-1].kind == kind:
                pieces[-1].text += text
            else:
                pieces.append(Piece(kind, text))
            if kind == "text":
                self.said += len(text)
        while self.waiting and self.said >= max(self.waiting[0].end, self.waiting[0].start + 1):
            self._last(pieces).tokens.append(self.waiting.popleft())

    def _last(self, pieces: list[Piece]) -> Piece:
        """Return the last piece of text, or a new empty one if all text was sent before."""
        of_text = [piece for piece in pieces if piece.kind == "text"]
        if not of_text:
            pieces.insert(0, Piece("text", ""))
            of_text = pieces[:1]
        return of_text[-1]

    def _cut(self, token: TextToken) -> TextToken:
        text = token.bytes.decode(errors="replace")[: self.said - token.start]
        return TextToken(token.id, token.logprobs, token.start, self.said, text.encode())

    def _note(self, piece: Piece) -> None:
        if piece.text:
            self.parts = merged([*self.parts, (piece.kind, piece.text)])
        self.tokens += piece.tokens


def token_name(raw: bytes) -> str:
    """Return the text, or bytes:\\xNN… if the bytes are not valid UTF-8, so that no two tokens have the same name."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else MIN_LOGPROB


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TextToken]) -> list[dict]:
    def entry(raw: bytes, logprob: float | None) -> dict:
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}

    def likeliest(token: TextToken) -> list[dict]:
        return [entry(tokenizer.decode_bytes([other]), value) for other, value in token.logprobs[1]]

    return [entry(token.bytes, token.logprobs[0]) | {"top_logprobs": likeliest(token)} for token in tokens]


def completion_logprobs(tokenizer: Tokenizer, tokens: list[TextToken]) -> dict:
    def likeliest(token: TextToken) -> dict[str, float | None] | None:
        own, others = token.logprobs
        if own is None:  # the first token has no log probability
            return None
        # Include the token itself, as OpenAI does.
        return {token_name(tokenizer.decode_bytes([id])): finite(value) for id, value in [*others, (token.id, own)]}

    return {
        "tokens": [token_name(token.bytes) for token in tokens],
        "token_logprobs": [finite(token.logprobs[0]) for token in tokens],
        "top_logprobs": [likeliest(token) for token in tokens],
        "text_offset": [token.start for token in tokens],
    }


class Writer:
    """Turns an engine's messages into the answer of an endpoint."""

    asked: Any  # the Request, of the class that the endpoint takes
    object_name = stem = ""
    lists_ending = False  # whether the log probabilities include the token that ends an answer

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Request, prompts: list[list[int]]):
        self.asked, self.tokenizer, self.prompts = asked, tokenizer, prompts
        self.choices = [Choice(tokenizer, asked.stops) for _ in range(len(prompts) * asked.samples)]
        self.completion_tokens, self.cached_tokens = 0, [0] * len(prompts)
        self.logs = asked.asked_logprobs() is not None
        self.head = {
            "id": f"{self.stem}{uuid.uuid4().hex}",
            "object": self.object_name,
            "created": int(time.time()),
            "model": model,
        }

    def take(self, prompt: int, message: dict) -> Iterator[tuple[int, list[Piece]]]:
        """Take in a message of one prompt. Yields the index and the new pieces of each choice in it."""
        self.cached_tokens[prompt] = message["cached_tokens"]
        for choice in message["choices"]:
            i = prompt * self.asked.samples + choice["index"]
            self.completion_tokens += len(choice["tokens"])
            logprobs = choice["logprobs"] if self.logs else None
            ending = choice.get("ending") if self.logs and self.lists_ending else None
            yield i, self.choices[i].push(choice["tokens"], logprobs, choice["finish_reason"], ending)

    @property
    def usage(self) -> dict:
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens)},
        }

    async def whole(self, messages: AsyncIterator[tuple[int, dict]]) -> dict:
        async for prompt, message in messages:
            for _ in self.take(prompt, message):
                pass
        return self.answer()

    async def events(self, messages: AsyncGenerator[tuple[int, dict]]) -> AsyncIterator[str]:
        """Yield server-sent events. Events that are ready together are one text, as each yield passes through Serve.

        If the client goes away, this generator is closed, and closes the engine's.
        """
        due = self.opening()
        try:
            async for prompt, message in messages:
                if not message["choices"]:  # keep the connection open: proxies close one that is silent for a minute
                    yield ": keep-alive\n\n"
                    continue
                for i, pieces in self.take(prompt, message):
                    due += "".join(self.chunk(i, piece) for piece in pieces)
                    if self.choices[i].reason:
                        due += self.ending(i)
                if due and not all(choice.reason for choice in self.choices):
                    yield due
                    due = ""
        except ApiError as error:
            yield due + self.failing(error)
            return
        finally:
            await messages.aclose()
        yield due + self.closing()

    def answer(self) -> dict:
        raise NotImplementedError

    def opening(self) -> str:
        return ""

    def chunk(self, index: int, piece: Piece) -> str:
        raise NotImplementedError

    def ending(self, index: int) -> str:
        """Return the event that ends a choice."""
        raise NotImplementedError

    def failing(self, error: ApiError) -> str:
        return event(error.body)

    def closing(self) -> str:
        usage = event(self.head | {"choices": [], "usage": self.usage}) if self.asked.wants_usage else ""
        return usage + event("[DONE]")


class ChatWriter(Writer):
    object_name, stem = "chat.completion", "chatcmpl-"

    def answer(self) -> dict:
        return self.head | {
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": choice.text, "nanochat_parts": listed(choice.parts)},
                    "logprobs": self.logprobs(choice.tokens),
                    "finish_reason": choice.reason,
                }
                for i, choice in enumerate(self.choices)
            ],
            "usage": self.usage,
        }

    def logprobs(self, tokens: list[TextToken]) -> dict | None:
        return {"content": chat_logprobs(self.tokenizer, tokens)} if self.logs else None

    def event(self, index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return event(self.head | {"choices": [choice]})

    def opening(self) -> str:
        self.head["object"] = "chat.completion.chunk"
        return "".join(self.event(i, {"role": "assistant", "content": ""}) for i in range(len(self.choices)))

    def chunk(self, index: int, piece: Piece) -> str:
        if piece.kind != "text":
            return self.event(index, {"content": "", "nanochat_part": piece.kind, "nanochat_text": piece.text})
        return self.event(index, {"content": piece.text}, logprobs=self.logprobs(piece.tokens))

    def ending(self, index: int) -> str:
        return self.event(index, {}, self.choices[index].reason)


class CompletionWriter(Writer):
    object_name, stem = "text_completion", "cmpl-"
    lists_ending = True  # lm-eval requests one token beside a prompt's scores and expects it to be listed

    def __init__(self, model: str, tokenizer: Tokenizer, asked: CompletionRequest, prompts: list[list[int]]):
        super().__init__(model, tokenizer, asked, prompts)
        self.unechoed = set(range(len(prompts))) if asked.echo else set()  # prompts that were not echoed yet

    def take(self, prompt: int, message: dict) -> Iterator[tuple[int, list[Piece]]]:
        echoed = {}
        samples = range(prompt * self.asked.samples, (prompt + 1) * self.asked.samples)
        if prompt in self.unechoed:
            self.unechoed.remove(prompt)
            logprobs = message.get("prompt_logprobs") if self.logs else None
            own = slice(self.asked.is_text, None)  # leave out the bos that was put before a text
            echoed = {i: self.choices[i].echo(self.prompts[prompt][own], logprobs and logprobs[own]) for i in samples}
        for i, pieces in super().take(prompt, message):
            yield i, [echoed.pop(i), *pieces] if i in echoed else pieces
        yield from ((i, [piece]) for i, piece in echoed.items())

    def choice(self, index: int, text: str, tokens: list[TextToken] | None, reason: str | None) -> dict:
        logprobs = completion_logprobs(self.tokenizer, tokens) if self.logs and tokens is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def answer(self) -> dict:
        choices = [self.choice(i, c.text, c.tokens, c.reason) for i, c in enumerate(self.choices)]
        return self.head | {"choices": choices, "usage": self.usage}

    def chunk(self, index: int, piece: Piece) -> str:
        if piece.kind != "text":
            return ""
        return event(self.head | {"choices": [self.choice(index, piece.text, piece.tokens, None)]})

    def ending(self, index: int) -> str:
        return event(self.head | {"choices": [self.choice(index, "", None, self.choices[index].reason)]})
