"""Messages of a conversation in OpenAI's format, and their conversion to the model's turns.

An extension of OpenAI's format: nanochat_parts of an assistant's message has its calls of the calculator and their
results beside the text.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from serving.protocol import ApiError, Body, Ignored

TEXT = ("text", "input_text", "output_text", "refusal")  # all of these types are text
BETWEEN = "\n\n"  # put between messages that are joined to one turn


class Part(Body):
    """A part of a message's content: text, or in an assistant's message a calculator's input or output."""

    type: Literal["text", "input_text", "output_text", "refusal", "python", "python_output"]
    text: str | None = None
    refusal: str | None = None
    annotations: Ignored
    cache_control: Ignored
    logprobs: Ignored
    prompt_cache_breakpoint: Ignored

    @field_validator("type", mode="wrap")
    @classmethod
    def one_name(cls, kind, check):
        try:
            return "text" if check(kind) in TEXT else kind
        except ValueError:
            raise ValueError("a part that is not text is not supported") from None


class Called(Body):
    name: str
    arguments: str = ""


class ToolCall(Body):
    function: Called
    id: Ignored
    index: Ignored
    type: Literal["function"] = "function"


class Message(Body):
    nullable: ClassVar = {"content"}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | list[Part] | None, Field(description="null is no text; only an assistant's is optional")
    ] = None
    nanochat_parts: list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Called | None = None
    annotations: Ignored
    name: Ignored
    phase: Ignored
    provider_specific_fields: Ignored
    reasoning_content: Ignored
    refusal: Ignored
    tool_call_id: Ignored
    type: Ignored

    def parts(self, path: str) -> list[tuple[str, str]]:
        """Return (kind, text) of each part that is not empty. Raises ApiError for a part that the role can't have."""
        key = "content" if self.nanochat_parts is None else "nanochat_parts"
        content = getattr(self, key)
        if isinstance(content, str) or content is None:
            parts = [("text", content or "")]
        else:
            parts = [(part.type, part.text if part.refusal is None else part.refusal) for part in content]
        if key == "content" and key not in self.model_fields_set and self.role != "assistant":
            raise ApiError(400, f"{path}.{key}: Field required", f"{path}.{key}", "invalid_value")
        for i, (kind, text) in enumerate(parts):
            at = f"{path}.{key}[{i}]"
            if text is None:
                raise ApiError(400, f"{at}.text: Field required", f"{at}.text", "invalid_value")
            if kind != "text" and self.role != "assistant":
                raise ApiError(400, f"{at}.type: only an assistant's message has {kind}", f"{at}.type", "invalid_value")
        calls = [call.function for call in self.tool_calls or []] + ([self.function_call] if self.function_call else [])
        parts += [("text", f"{call.name}({call.arguments})") for call in calls]
        return [(kind, text) for kind, text in merged(parts) if text]


def merged(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join neighbours of the same kind."""
    joined = []
    for kind, text in parts:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def listed(parts: Iterable[tuple[str, str]]) -> list[dict]:
    """Return the parts as dictionaries, the form of JSON and of the tokenizer."""
    return [{"type": kind, "text": text} for kind, text in parts]


def turns_of(messages: Iterable[tuple[str, Message]]) -> list[dict]:
    """Convert messages, each given with its path, to alternating turns that begin with the user.

    The model knows only user and assistant, so every other role becomes the user. Neighbours of one role are joined.
    """
    turns = [("user", [])]
    for path, message in messages:
        role, parts = "assistant" if message.role == "assistant" else "user", message.parts(path)
        if turns[-1][0] != role:
            turns.append((role, []))
        content = turns[-1][1]
        content += [("text", BETWEEN), *parts] if content and parts else parts
    return [{"role": role, "content": listed(merged(parts))} for role, parts in turns]
