"""Write a model as a folder that Hugging Face transformers loads with trust_remote_code.

The folder includes the model's code, modeling_nanochat_ray.py. The type `nanochat` in transformers is the architecture
of October 2025, without smear, value embeddings and backout. So the type of this model is `nanochat_ray`.
"""

from importlib.resources import files
from itertools import pairwise

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save

from nanochat_ray import storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.model.gpt import GPT, GPTConfig

SHARD_BYTES = 2 * 10**9  # at most; a whole shard is held in memory
MODELING = "modeling_nanochat_ray"
PLAIN = "<|\ue000"  # the chat template writes a message's "<|" like this, so it begins no special token


def write(out: str, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json, weights in shards, generation_config.json, the tokenizer, the chat template and the code.

    out: a folder or a URI. dtype: type of the written weights; the model's are fp32. Raises OSError if a file can't be
    written.
    """

    def put(name: str, text: str) -> None:
        storage.write_bytes(storage.join(out, name), text.encode())

    _write_weights(out, model, dtype)
    package = files("nanochat_ray.export")
    for name in (f"{MODELING}.py", "chat_template.jinja"):
        put(name, package.joinpath(name).read_text("utf-8"))
    documents = {
        "config.json": _config(model.config, tokenizer, dtype),
        "generation_config.json": _generation_config(tokenizer),
        "tokenizer.json": fast_tokenizer(tokenizer),
        "tokenizer_config.json": _tokenizer_config(model.config),
    }
    for name, document in documents.items():
        put(name, storage.to_json(document, indent=2, ensure_ascii=False) + "\n")


def _write_weights(out: str, model: GPT, dtype: torch.dtype) -> None:
    """Write the weights in shards. Tables have one row per token, without the padding to a multiple of 64 rows."""
    weights = {}
    for name, weight in model.named_parameters():
        if name.endswith(("wte.weight", "lm_head.weight")) or name.startswith("value_embeds."):
            weight = weight[: model.config.vocab_size]
        name = name if name.startswith("lm_head.") else f"model.{name.removeprefix('transformer.')}"
        weights[name] = weight.detach().to("cpu", dtype)
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        shard = save({name: weights[name].contiguous() for name in names}, {"format": "pt"})
        storage.write_bytes(storage.join(out, file), shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        storage.write_json(storage.join(out, "model.safetensors.index.json"), index)


def _config(config: GPTConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    classes = {
        "AutoConfig": "NanochatRayConfig",
        "AutoModel": "NanochatRayModel",
        "AutoModelForCausalLM": "NanochatRayForCausalLM",
    }
    return {
        "model_type": "nanochat_ray",
        "architectures": ["NanochatRayForCausalLM"],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in classes.items()},
        **vars(config),
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4 and 5 both know this name
        **_token_ids(tokenizer),
    }


def _token_ids(tokenizer: Tokenizer) -> dict:
    """Return the special ids. bos also ends an answer, because it begins the next document. It is the padding, too."""
    bos, end = tokenizer.bos_id, tokenizer.special("<|assistant_end|>")
    return {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": bos}


def _generation_config(tokenizer: Tokenizer) -> dict:
    """Return the sampling of `nanochat-ray chat` without options."""
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 512}
    return _token_ids(tokenizer) | sampling


def _tokenizer_config(config: GPTConfig) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "padding_side": "left",  # generate() needs it
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def fast_tokenizer(tokenizer: Tokenizer) -> dict:
    """Return tokenizer.json for the library `tokenizers`. It gives bos and then the ids of Tokenizer.encode.

    Names of special tokens in a text become special tokens, because the chat template needs this. The template marks
    those in messages, so they stay plain text.
    """
    names = _byte_names()

    def named(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    by_rank = sorted(tokenizer.ranks, key=lambda token: tokenizer.ranks[token])
    merges = [merge for token in by_rank if (merge := last_merge(token, tokenizer.ranks))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token} | special
            for token, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": PLAIN}, "content": "<|"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # like tiktoken: a piece that is a token needs no merges
            "vocab": {named(token): tokenizer.ranks[token] for token in by_rank},
            "merges": [[named(left), named(right)] for left, right in merges],
        },
    }


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the pair of parts that BPE merges last to get this token. Only merges of lower rank come before.

    Returns None for a byte. Also returns None if these merges do not lead to two parts: then BPE gives the token only
    for a piece that equals it.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= ranks[token]:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_names() -> list[str]:
    """Return GPT-2's visible character for each byte: the byte's own if it is visible, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
