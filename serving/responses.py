"""OpenAI's Responses API for text: its request body, and its answers, whole or as events."""

import uuid
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.sampling import MAX_LOGPROBS
from serving.answers import Piece, TextToken, Writer, chat_logprobs
from serving.messages import Message, listed, turns_of
from serving.protocol import ApiError, Body, Ignored, event
from serving.requests import Conversing, JsonSchema, format_grammar

LOGPROBS = "message.output_text.logprobs"


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Ignored


class ResponsesStreamOptions(Body):
    include_obfuscation: Ignored


class InputMessage(Message):
    type: Literal["message"] = "message"
    id: Ignored
    status: Ignored


class ResponsesRequest(Conversing):
    prompt_path: ClassVar = "input"

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    text: TextOptions | None = None
    stream_options: ResponsesStreamOptions | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    max_tool_calls: Ignored
    reasoning: Ignored

    def asked_tokens(self) -> int | None:
        return self.max_output_tokens

    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or []) else None

    def format_grammar(self) -> str | None:
        form = (self.text.format if self.text else None) or TextFormat(type="text")
        return format_grammar(form.type, form.schema_, "text.format.schema")

    @cached_property
    def turns(self) -> list[dict]:
        given = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [(f"input[{i}]", message) for i, message in enumerate(given)]
        if self.instructions:
            messages.insert(0, ("instructions", Message(role="system", content=self.instructions)))
        return turns_of(messages)


class ResponsesWriter(Writer):
    object_name, stem = "response", "resp_"

    def __init__(self, model: str, tokenizer: Tokenizer, asked: ResponsesRequest, prompts: list[list[int]]):
        super().__init__(model, tokenizer, asked, prompts)
        self.item_id, self.num_events = f"msg_{uuid.uuid4().hex}", 0

    @property
    def cut(self) -> bool:
        return self.choices[0].reason == "length"

    def response(self, status: str, output: list[dict], error: dict | None = None) -> dict:
        asked, finished = self.asked, status in ("completed", "incomplete")
        usage = {
            "input_tokens": self.usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": sum(self.cached_tokens), "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.usage["total_tokens"],
        }
        form = (asked.text and asked.text.format) or TextFormat(type="text")
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "model": self.head["model"],
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.sampled_temperature,
            "text": {"format": {"type": form.type}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": usage if finished else None,
        }

    def item(self, status: str, content: list[dict]) -> dict:
        item = {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}
        return item | ({"nanochat_parts": listed(self.choices[0].parts)} if status != "in_progress" else {})

    def part(self, text: str, tokens: list[TextToken]) -> dict:
        logprobs = chat_logprobs(self.tokenizer, tokens) if self.logs else []
        return {"type": "output_text", "annotations": [], "text": text, "logprobs": logprobs}

    def finished(self) -> tuple[str, dict, dict]:
        """Return the status, the part with the text, and the item that holds the part."""
        choice, status = self.choices[0], "incomplete" if self.cut else "completed"
        part = self.part(choice.text, choice.tokens)
        return status, part, self.item(status, [part])

    def answer(self) -> dict:
        status, _, item = self.finished()
        return self.response(status, [item])

    def event(self, kind: str, **fields) -> str:
        self.num_events += 1
        return event({"type": kind, "sequence_number": self.num_events - 1} | fields, kind)

    def of_part(self, kind: str, **fields) -> str:
        return self.event(kind, item_id=self.item_id, output_index=0, content_index=0, **fields)

    def opening(self) -> str:
        begun = self.response("in_progress", [])
        return (
            self.event("response.created", response=begun)
            + self.event("response.in_progress", response=begun)
            + self.event("response.output_item.added", output_index=0, item=self.item("in_progress", []))
            + self.of_part("response.content_part.added", part=self.part("", []))
        )

    def chunk(self, index: int, piece: Piece) -> str:
        if piece.kind != "text":
            return ""
        logprobs = self.part("", piece.tokens)["logprobs"]
        return self.of_part("response.output_text.delta", delta=piece.text, logprobs=logprobs)

    def ending(self, index: int) -> str:
        _, part, item = self.finished()
        return (
            self.of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            + self.of_part("response.content_part.done", part=part)
            + self.event("response.output_item.done", output_index=0, item=item)
        )

    def failing(self, error: ApiError) -> str:
        said = error.body["error"]
        return self.event("error", code=said["code"], message=said["message"], param=said["param"])

    def closing(self) -> str:
        status, _, item = self.finished()
        return self.event(f"response.{status}", response=self.response(status, [item]))
