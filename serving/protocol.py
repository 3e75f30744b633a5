"""What requests may say and how answers look: OpenAI's API, as far as a small chat model has use for it.

Beyond OpenAI's: top_k, min_p, repetition_penalty; and tool calls as parts (type text, python or python_output) beside
the plain text, in `nanochat_parts` of an answer and `nanochat_part` of a delta.
"""

import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.sampling import MOST_LOGPROBS, SamplingParams
from nanochat_ray.inference.text import AnswerStream

UNSUPPORTED = ("tools", "functions", "logit_bias", "audio", "suffix", "echo")  # unless empty or false
DEFAULT_MAX_TOKENS = 512
MOST_CHOICES = 16


class ApiError(Exception):
    """An answer that is not 2xx, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status, self.headers = status, {"Retry-After": str(retry)} if retry else {}
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request(BaseModel):
    """Fields of both endpoints. The default temperature, 0.6, suits small models; the default seed is random."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def known(self):
        for name in UNSUPPORTED:
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} is not supported")
        if (self.model_extra or {}).get("response_format", {"type": "text"}) != {"type": "text"}:
            raise ValueError("response_format is not supported, but for text")
        return self

    @field_validator("stop")
    @classmethod
    def not_empty(cls, stop):
        if stop is not None and not all([stop] if isinstance(stop, str) else stop):
            raise ValueError("a stop string is empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def asked_tokens(self) -> int | None:
        return self.max_tokens

    def asked_logprobs(self) -> int | None:
        return None

    def sampling(self, room: int) -> SamplingParams:
        """room: tokens left for the answer. Raises ApiError when more are asked for."""
        asked = self.asked_tokens()
        if asked is not None and asked > room:
            message = f"max_tokens {asked} is more than the {room} tokens that the context leaves after this prompt"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        return SamplingParams(
            max_tokens=asked or min(DEFAULT_MAX_TOKENS, room),
            temperature=0.6 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**63,
            n=self.n or 1,
            stop=self.stops,
            logprobs=self.asked_logprobs(),
        )


class ChatRequest(Request):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> dict:
        """The messages as the tokenizer takes them. Raises ApiError for content that is neither text nor parts."""
        messages = []
        for i, message in enumerate(self.messages):
            role, content = message.get("role"), message.get("content")
            role = "system" if role == "developer" else role
            if role not in ("system", "user", "assistant"):
                raise ApiError(400, f"messages[{i}] has role {role!r}, expected system, user or assistant", "messages")
            if isinstance(content, list) and role != "assistant":
                if not all(
                    isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
                ):
                    raise ApiError(400, f"messages[{i}] has a part that is not text", "messages")
                content = "".join(part["text"] for part in content)
            if not isinstance(content, str | list):
                raise ApiError(400, f"messages[{i}] needs content: a string, or a list of parts", "messages")
            messages.append({"role": role, "content": content})
        return {"messages": messages}


class CompletionRequest(Request):
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def text_or_ids(self) -> str | list[int]:
        listed = isinstance(self.prompt, list) and isinstance(self.prompt[0], str)
        return self.prompt[0] if listed else self.prompt


def parse(kind: type[Request], body: bytes) -> Request:
    """Raises ApiError naming the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        where = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
        of_first = [e["msg"].removeprefix("Value error, ") for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
        message = " or: ".join(dict.fromkeys(of_first[:3]))  # one for each type that a field may have
        raise ApiError(400, f"{where}: {message}" if where else message, where, "invalid_value") from None


def token_entry(tokenizer, token: int, logprob: float) -> dict:
    return {"token": tokenizer.decode([token]), "logprob": logprob, "bytes": list(tokenizer.decode_bytes([token]))}


def chat_logprobs(tokenizer, tokens: list[int], logprobs: list) -> dict:
    return {
        "content": [
            token_entry(tokenizer, token, own)
            | {"top_logprobs": [token_entry(tokenizer, other, value) for other, value in likeliest]}
            for token, (own, likeliest) in zip(tokens, logprobs, strict=True)
        ]
    }


def completion_logprobs(tokenizer, tokens: list[int], logprobs: list) -> dict:
    texts = [tokenizer.decode([token]) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [own for own, _ in logprobs],
        "top_logprobs": [{tokenizer.decode([t]): value for t, value in likeliest} for _, likeliest in logprobs],
        "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
    }


def event(data: dict | str) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


class Writer:
    """An engine's messages as an answer in OpenAI's shape, whole or in events."""

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Request, prompt_tokens: int, n: int):
        self.chat, self.asked, self.tokenizer = isinstance(asked, ChatRequest), asked, tokenizer
        self.streams = [AnswerStream(tokenizer, asked.stops) for _ in range(n)]
        self.parts = [[] for _ in range(n)]
        self.logprobs = [([], []) for _ in range(n)]
        self.reasons = [None] * n
        self.prompt_tokens, self.completion_tokens, self.cached_tokens = prompt_tokens, 0, 0
        object_name = "chat.completion" if self.chat else "text_completion"
        stem = "chatcmpl" if self.chat else "cmpl"
        self.head = {
            "id": f"{stem}-{uuid.uuid4().hex}",
            "object": object_name,
            "created": int(time.time()),
            "model": model,
        }

    def take(self, message: dict) -> list[tuple[int, list[tuple[str, str]]]]:
        """Note a message; the new parts of each choice it brings something for."""
        self.cached_tokens, news = message["cached_tokens"], []
        for choice in message["choices"]:
            i, answer = choice["index"], self.streams[choice["index"]]
            parts = answer.push(*choice["tokens"])
            if choice["finish_reason"]:
                parts += answer.finish()
                self.reasons[i] = choice["finish_reason"]
            self.completion_tokens += len(choice["tokens"])
            self.logprobs[i][0].extend(choice["tokens"])
            self.logprobs[i][1].extend(choice["logprobs"])
            parts = merged(parts)
            self.parts[i] = merged(self.parts[i] + parts)
            news.append((i, parts))
        return news

    @property
    def usage(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def logprobs_of(self, tokens: list[int], logprobs: list) -> dict | None:
        if self.asked.asked_logprobs() is None:
            return None
        shape = chat_logprobs if self.chat else completion_logprobs
        return shape(self.tokenizer, tokens, logprobs)

    def whole(self) -> dict:
        choices = []
        for i, parts in enumerate(self.parts):
            said = "".join(text for _, text in parts)
            choice = {"index": i, "finish_reason": self.reasons[i], "logprobs": self.logprobs_of(*self.logprobs[i])}
            if self.chat:
                listed = [{"type": kind, "text": text} for kind, text in parts]
                choice["message"] = {"role": "assistant", "content": said, "nanochat_parts": listed}
            else:
                choice["text"] = said
            choices.append(choice)
        return self.head | {"choices": choices, "usage": self.usage}

    async def events(self, first: dict, messages: AsyncIterator[dict]) -> AsyncIterator[str]:
        """Server-sent events, all that are known at a time as one text, since each costs a way through Serve.

        A client that goes away closes this generator, and so the engine's.
        """
        due = ""
        if self.chat:
            self.head["object"] = "chat.completion.chunk"
            due = "".join(self.chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.streams)))
        try:
            async for message in chain(first, messages):
                if not message["choices"]:  # a proxy ends a connection that is silent for a minute
                    yield ": keep-alive\n\n"
                    continue
                due += "".join(self.chunks(message))
                if not all(self.reasons):
                    yield due
                    due = ""
        except ApiError as error:
            yield event(error.body)
            return
        finally:
            await messages.aclose()
        if self.asked.stream_options and self.asked.stream_options.include_usage:
            due += event(self.head | {"choices": [], "usage": self.usage})
        yield due + event("[DONE]")

    def chunks(self, message: dict) -> list[str]:
        chunks = []
        for choice, (i, parts) in zip(message["choices"], self.take(message), strict=True):
            logprobs = self.logprobs_of(choice["tokens"], choice["logprobs"])
            if logprobs and not parts:
                parts = [("text", "")]
            for kind, text in parts:
                delta = {"content": text} if kind == "text" else {"content": text, "nanochat_part": kind}
                chunks.append(self.chunk(i, delta, logprobs=logprobs))
                logprobs = None
            if choice["finish_reason"]:
                chunks.append(self.chunk(i, {}, choice["finish_reason"]))
        return chunks

    def chunk(self, index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None) -> str:
        choice = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return event(self.head | {"choices": [choice]})


def merged(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one kind as one."""
    joined = []
    for kind, text in parts:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


async def chain(first: dict, rest: AsyncIterator[dict]) -> AsyncIterator[dict]:
    yield first
    async for message in rest:
        yield message
