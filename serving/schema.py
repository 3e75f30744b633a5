"""The API's description, as /openapi.json and as the page /docs, generated from the models that validate requests."""

from functools import cache
from html import escape

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.requests import ChatRequest, CompletionRequest
from serving.responses import ResponsesRequest
from serving.tokens import DetokenizeRequest, TokenizeRequest

POSTS = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation"),
    "/v1/completions": (CompletionRequest, "Go on from a text, or score one"),
    "/v1/responses": (ResponsesRequest, "Answer a conversation, in the shape of the Responses API"),
    "/tokenize": (TokenizeRequest, "The token ids of a text"),
    "/detokenize": (DetokenizeRequest, "The text of token ids"),
}
GETS = {
    "/v1/models": "The names that `model` may take; the first is the default",
    "/v1/models/{model}": "One of them",
    "/tokenizer_info": "What the first model's tokenizer calls a text's beginning and an answer's end",
    "/health": "Whether the service answers",
    "/metrics": "Figures for Prometheus",
}
REFUSALS = {
    "400": "Invalid JSON, or a field with a wrong value",
    "401": "No valid API key",
    "403": "A host's name or a site that the service does not know",
    "404": "No such model",
    "408": "The body comes too slowly",
    "413": "The body is too large",
    "415": "The body is not JSON by its Content-Type, or is compressed",
    "429": "Too many requests; Retry-After says when to ask again",
    "503": "The model is not there; Retry-After says when to ask again",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


@cache
def document() -> dict:
    """OpenAPI 3.1."""
    models: list = [(model, "validation") for model, _ in POSTS.values()] + [(Error, "serialization")]
    refs, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")

    def answers(**kinds) -> dict:
        error = {"application/json": {"schema": refs[Error, "serialization"]}}
        refused = {status: {"description": said, "content": error} for status, said in REFUSALS.items()}
        return {"200": {"description": "The answer", "content": kinds}} | refused

    paths: dict[str, dict] = {}
    for path, (model, said) in POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": refs[model, "validation"]}}}
        kinds = {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        }
        paths[path] = {"post": {"summary": said, "requestBody": body, "responses": answers(**kinds)}}
    for path, said in GETS.items():
        kind = {"text/plain": {"schema": {"type": "string"}}} if path == "/metrics" else {"application/json": {}}
        paths[path] = {"get": {"summary": said, "responses": answers(**kind)}}
        if "{" in path:
            named = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            paths[path]["get"]["parameters"] = [named]
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat-ray", "version": "1", "description": "OpenAI's API for a small chat model."},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


@cache
def page() -> str:
    """Return document() as a page of tables that loads nothing else."""
    api = document()
    sections = [
        f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['summary'])}</p>{fields_of(operation, api)}"
        for path, operations in api["paths"].items()
        for method, operation in operations.items()
    ]
    return PAGE.format(sections="\n".join(sections))


def fields_of(operation: dict, api: dict) -> str:
    """Return a table of a body's fields. The fields of a nested object follow the object."""
    if "requestBody" not in operation:
        return ""
    rows = []

    def walk(schema: dict, prefix: str, above: tuple[str, ...]) -> None:
        for name, field in schema.get("properties", {}).items():
            needed = "required" if name in schema.get("required", []) else ""
            rows.append((prefix + name, kind_of(field), needed, field.get("description", "")))
            for inner in referred(field):
                if inner not in above:
                    dots = f"{prefix}{name}[]." if "array" in kind_of(field) else f"{prefix}{name}."
                    walk(api["components"]["schemas"][inner], dots, (*above, inner))

    [root] = referred(operation["requestBody"]["content"]["application/json"]["schema"])
    walk(api["components"]["schemas"][root], "", (root,))
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr><th>field</th><th>type</th></tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def referred(schema: dict) -> list[str]:
    """Return the names of the definitions that a field's schema refers to."""
    inner = [schema.get("items"), *schema.get("anyOf", [])]
    names = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema else []
    return names + [name for part in inner if isinstance(part, dict) for name in referred(part)]


BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "minItems": "{} items or more",
    "maxItems": "at most {} items",
    "minLength": "{} characters or more",
    "maxLength": "at most {} characters",
    "pattern": "as {}",
}


def kind_of(schema: dict) -> str:
    """Describe a field's type in words."""
    if "anyOf" in schema:
        return " or ".join(kind_of(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " | ".join(map(repr, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "object" if "$ref" in schema else "any")
    if kind == "array":
        kind += f" of {kind_of(schema.get('items', {}))}"
    return ", ".join([kind, *(said.format(schema[bound]) for bound, said in BOUNDS.items() if bound in schema)])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nanochat-ray: API</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
table {{ border-collapse: collapse }}
td {{ border-top: 1px solid #8884; padding: 0.2rem 0.8rem 0.2rem 0; vertical-align: top }}
td:first-child {{ font-family: ui-monospace, monospace }}
</style>
<main>
<h1>What this service takes</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a>. null is the same as no field at all. A field that is
not listed is refused.</p>
{sections}
</main>
</html>
"""
