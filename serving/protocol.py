"""Shared by all endpoints: errors in OpenAI's shape, validation of bodies, strict JSON, server-sent events."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

Ignored = Annotated[Any, Field(None, description="Taken and ignored: it changes nothing in the answer.")]


MESSAGES = {  # by pydantic's error type, in the terms of JSON instead of Python
    "dict_type": "Input should be an object",
    "extra_forbidden": "this field is not supported",
    "list_type": "Input should be a valid array",
    "model_type": "Input should be an object",
}


class ApiError(Exception):
    """An error response in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status, self.headers = status, {"Retry-After": str(retry)} if retry else {}
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body(BaseModel):
    """A JSON object in a request. A null field counts as absent; an undeclared field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    nullable: ClassVar[set[str]] = set()  # optional fields where null differs from absent

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        if not isinstance(given, dict):
            return given
        kept = {name for name, field in cls.model_fields.items() if field.is_required()} | cls.nullable
        return {name: value for name, value in given.items() if value is not None or name in kept}


Kind = TypeVar("Kind", bound=Body)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Validate a body. Raises ApiError with the path of the wrong field."""
    try:
        given = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # If a field has several types, report the errors of the type that the value matches best.
        errors = [e for e in errors if not e["type"].endswith("_type")] or errors
        deepest = max((path_of(e, given) for e in errors), key=len)
        said = [message_of(e) for e in errors if path_of(e, given) == deepest]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in deepest).removeprefix(".")
        message = " or: ".join(dict.fromkeys(said[:3]))  # one message per type of the field
        path, message = path[:100], message[:180]
        raise ApiError(400, f"{path}: {message}" if path else message, path or None, "invalid_value") from None


def path_of(error: Mapping, given) -> tuple:
    """Return the path of an error in the body. pydantic's own path also has the names of a union's types."""
    path = []
    for i, part in enumerate(error["loc"]):
        there = part in given if isinstance(given, dict) else isinstance(given, list) and isinstance(part, int)
        missing = error["type"] == "missing" and i == len(error["loc"]) - 1
        if there or missing:
            path.append(part)
        if there:
            given = given[part]
    return tuple(path)


def message_of(error: Mapping) -> str:
    if error["type"] in MESSAGES:
        return MESSAGES[error["type"]]
    return error["msg"].removeprefix("Value error, ")


def dumps(data) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def event(data: dict | str, name: str | None = None) -> str:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else dumps(data)}\n\n"
