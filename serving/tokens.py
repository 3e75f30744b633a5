"""/tokenize, /detokenize and /tokenizer_info as in vLLM. lm-eval uses them to count the tokens of a context."""

from typing import Annotated

from pydantic import Field

from nanochat_ray.data.tokenizer import Tokenizer
from serving.protocol import ApiError, Body, Ignored


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: Annotated[bool, Field(description="Whether bos comes first, as in a completion.")] = True
    return_token_strs: Ignored


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


def tokenize(tokenizer: Tokenizer, asked: TokenizeRequest, context_length: int) -> dict:
    bos = [tokenizer.bos_id] if asked.add_special_tokens else []
    tokens = bos + tokenizer.encode(asked.prompt)
    return {"count": len(tokens), "max_model_len": context_length, "tokens": tokens}


def detokenize(tokenizer: Tokenizer, asked: DetokenizeRequest) -> dict:
    """Raises ApiError for ids outside the vocabulary."""
    for i, token in enumerate(asked.tokens):
        if not 0 <= token < tokenizer.vocab_size:
            path = f"tokens[{i}]"
            raise ApiError(400, f"{path}: token ids are 0 … {tokenizer.vocab_size - 1}", path, "invalid_value")
    return {"prompt": tokenizer.decode(asked.tokens)}


def about(tokenizer: Tokenizer) -> dict:
    names = {name: tokenizer.decode([tokenizer.special(f"<|{name}|>")]) for name in ("bos", "assistant_end")}
    return {"tokenizer_class": "nanochat", "bos_token": names["bos"], "eos_token": names["assistant_end"]}
