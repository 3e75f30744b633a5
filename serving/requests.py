"""Request bodies: the part of OpenAI's API that suits a small chat model, and some fields of vLLM.

The fields declared here are the only ones that are accepted; /openapi.json is generated from them. Not in OpenAI's API
are top_k, min_p, repetition_penalty, guided_json, guided_regex, guided_choice, structured_outputs,
add_generation_prompt and continue_final_message.
"""

import json
import secrets
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference import grammar
from nanochat_ray.inference.sampling import MAX_LOGPROBS, SamplingParams
from serving.messages import Message, turns_of
from serving.protocol import ApiError, Body, Ignored

DEFAULT_MAX_TOKENS = 512
MAX_PROMPTS = 2048


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Ignored


class JsonSchema(Body):
    name: Ignored
    description: Ignored
    strict: Ignored
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = True


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """Exactly one of these fields."""

    json_: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    json_object: bool = False


def built(make, source, path: str) -> str:
    """Return make(source), a grammar. Raises ApiError for an invalid source."""
    try:
        if make is grammar.from_json_schema and isinstance(source, str):
            source = json.loads(source)
        return make(source)
    except (ValueError, TypeError, RecursionError) as error:
        raise ApiError(400, f"{path}: {str(error)[:180]}", path, "invalid_value") from None


def format_grammar(kind: str, schema: dict | bool, path: str) -> str | None:
    """Return the grammar of a response format, or None for text. kind: text, json_object or json_schema."""
    if kind == "json_schema":
        return built(grammar.from_json_schema, schema, path)
    return grammar.json_object() if kind == "json_object" else None


class Request(Body):
    """Fields of all endpoints. The default temperature, 0.6, suits small models; the default seed is random."""

    prompt_path: ClassVar[str]  # name of the field with the prompt

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, description="0 and -1 are off.")] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, description="0 is greedy.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(description="By token id, in decimal."),
        ]
        | None
    ) = None
    seed: int | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    metadata: Ignored
    prompt_cache_key: Ignored
    prompt_cache_options: Ignored
    prompt_cache_retention: Ignored
    safety_identifier: Ignored
    service_tier: Ignored
    store: Ignored
    user: Ignored

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampled_temperature(self) -> float:
        return 0.6 if self.temperature is None else self.temperature

    @property
    def samples(self) -> int:
        return 1

    @property
    def wants_usage(self) -> bool:
        return False

    def asked_tokens(self) -> int | None:
        raise NotImplementedError

    def asked_logprobs(self) -> int | None:
        return None

    def asked_prompt_logprobs(self) -> int | None:
        return None

    def format_grammar(self) -> str | None:
        return None

    def asked_grammar(self) -> str | None:
        """Return the grammar of the answer, or None. Raises ApiError for an invalid one, or for more than one."""
        own = self.structured_outputs or StructuredOutputs()
        given = [
            (grammar.from_json_schema, self.guided_json, "guided_json"),
            (grammar.from_regex, self.guided_regex, "guided_regex"),
            (grammar.from_choices, self.guided_choice, "guided_choice"),
            (grammar.from_json_schema, own.json_, "structured_outputs.json"),
            (grammar.from_regex, own.regex, "structured_outputs.regex"),
            (grammar.from_choices, own.choice, "structured_outputs.choice"),
        ]
        grammars = {path: built(make, source, path) for make, source, path in given if source is not None}
        if own.json_object:
            grammars["structured_outputs.json_object"] = grammar.json_object()
        if (of_format := self.format_grammar()) is not None:
            grammars["response_format"] = of_format
        if len(grammars) > 1:
            first, second = list(grammars)[:2]
            raise ApiError(400, f"{second}: there is {first} already; give one of them", second, "invalid_value")
        return next(iter(grammars.values()), None)

    def biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        biases = {int(token): float(bias) for token, bias in (self.logit_bias or {}).items()}
        if biases and max(biases) >= vocab_size:
            path = f"logit_bias.{max(biases)}"
            raise ApiError(400, f"{path}: token ids are 0 … {vocab_size - 1}", path, "invalid_value")
        return tuple(sorted(biases.items()))

    def sampling(self, vocab_size: int, cache_salt: str) -> dict:
        """Return the fields of SamplingParams except max_tokens. Raises ApiError for an invalid field."""
        asked = {
            "temperature": self.sampled_temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.biases(vocab_size) or None,
            "seed": secrets.randbits(63) if self.seed is None else self.seed % 2**63,
            "n": self.samples,
            "stop": self.stops,
            "logprobs": self.asked_logprobs(),
            "prompt_logprobs": self.asked_prompt_logprobs(),
            "grammar": self.asked_grammar(),
            "cache_salt": cache_salt or None,
        }
        return {name: value for name, value in asked.items() if value is not None}  # the others keep their defaults

    def params(self, fields: dict, room: int) -> SamplingParams:
        """Return SamplingParams whose max_tokens is at most `room`, the tokens that the prompt leaves."""
        asked = self.asked_tokens()
        return SamplingParams(max_tokens=min(DEFAULT_MAX_TOKENS if asked is None else asked, room), **fields)


class Completing(Request):
    """Fields of chats and completions."""

    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def asked_tokens(self) -> int | None:
        return self.max_tokens

    def format_grammar(self) -> str | None:
        form = self.response_format or ResponseFormat(type="text")
        if form.type == "json_schema" and form.json_schema is None:
            path = "response_format.json_schema"
            raise ApiError(400, f"{path}: Field required", path, "invalid_value")
        schema = form.json_schema or JsonSchema()
        return format_grammar(form.type, schema.schema_, "response_format.json_schema.schema")


class CompletionRequest(Completing):
    prompt_path: ClassVar = "prompt"

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def of_one_kind(cls, prompt):
        for i, item in enumerate(prompt if isinstance(prompt, list) else []):
            if type(item) is not type(prompt[0]) or not isinstance(item, str | int | list):
                said = "prompts are a text, a list of texts, a list of token ids, or a list of such lists"
                raise ApiError(400, f"prompt[{i}]: {said}", f"prompt[{i}]", "invalid_value")
        return prompt

    @field_validator("best_of", "suffix")
    @classmethod
    def nothing(cls, asked, info: ValidationInfo):
        if asked not in (1, ""):
            raise ValueError(f"{info.field_name} is not supported")
        return asked

    def asked_logprobs(self) -> int | None:
        return self.logprobs

    def asked_prompt_logprobs(self) -> int | None:
        return (self.logprobs or 0) if (self.echo and self.logprobs is not None) or self.max_tokens == 0 else None

    @property
    def is_text(self) -> bool:
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], str)

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return each prompt's token ids; a text gets bos first. Raises ApiError for ids outside the vocabulary."""
        listed = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        given: list = self.prompt if listed else [self.prompt]
        for i, prompt in enumerate(given):
            if isinstance(prompt, list) and (min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size):
                path = f"prompt[{i}]" if listed else "prompt"
                raise ApiError(400, f"{path}: prompt has token ids outside 0 … {tokenizer.vocab_size - 1}", path)
        return [p if isinstance(p, list) else [tokenizer.bos_id, *tokenizer.encode(p)] for p in given]


class Conversing(Request):
    """Base of requests whose prompt is a conversation."""

    tool_choice: Literal["none", "auto"] | None = None
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: Ignored

    @field_validator("tools", "functions", check_fields=False)
    @classmethod
    def no_tools_but_for_none(cls, tools, info: ValidationInfo):
        choice = "tool_choice" if info.field_name == "tools" else "function_call"
        if tools and info.data.get(choice) != "none":
            raise ValueError(f'{info.field_name} is not supported, but taken and not used with {choice} "none"')
        return tools

    @property
    def turns(self) -> list[dict]:
        """Return the conversation's turns. Raises ApiError for invalid messages."""
        raise NotImplementedError

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Return one prompt. It ends where the assistant's turn begins, or after the assistant's unfinished message."""
        turns = self.turns
        if turns[-1]["role"] == "user":
            return [tokenizer.render_for_completion({"messages": turns})]
        ids, _ = tokenizer.render_conversation({"messages": turns}, max_tokens=None)
        return [ids[:-1]]  # drop assistant_end


class ChatRequest(Conversing, Completing):
    prompt_path: ClassVar = "messages"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    function_call: Literal["none", "auto"] | None = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Ignored
    reasoning_effort: Ignored
    verbosity: Ignored

    @field_validator("top_logprobs")
    @classmethod
    def with_logprobs(cls, most, info: ValidationInfo):
        if most and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs to be true")
        return most

    @field_validator("continue_final_message", "add_generation_prompt")
    @classmethod
    def as_the_last_message_says(cls, asked, info: ValidationInfo):
        if messages := info.data.get("messages"):
            continued = messages[-1].role == "assistant"
            if asked != (continued if info.field_name == "continue_final_message" else not continued):
                raise ValueError("an assistant's message at the end is continued, and no other")
        return asked

    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @cached_property
    def turns(self) -> list[dict]:
        return turns_of((f"messages[{i}]", message) for i, message in enumerate(self.messages))
