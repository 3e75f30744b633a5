"""nanochat-ray's Transformer for Hugging Face transformers 4.57 and later. It needs only this file, torch and
transformers.

It has rotary positions, QK norm, ReLU² MLP and no biases. It differs from a Llama in these points:

- smear: a little of the previous token's embedding is added to each token's embedding
- value embeddings: on every other layer, a table gives each token a vector that is added to the values
- x0: every layer adds the input embeddings again
- backout: a part of the state after the middle layer is subtracted at the end
- sliding windows: most layers attend to a quarter of the context

Load it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

import math
from dataclasses import fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

SMEAR_CHANNELS = 24  # number of channels of the embedding that gate the previous token
VALUE_GATE_CHANNELS = 12  # number of channels of a layer's input that gate its value embedding
ROTARY_BASE = 100_000
LOGIT_SOFTCAP = 15
# transformers 5.24 renamed past_key_values to cache, in arguments and in outputs.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class NanochatRayConfig(PretrainedConfig):
    model_type = "nanochat_ray"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }

    def __init__(
        self,
        sequence_len: int = 2048,
        vocab_size: int = 32768,
        n_layer: int = 12,
        n_head: int = 6,
        n_kv_head: int = 6,
        n_embd: int = 768,
        window_pattern: str = "SSSL",  # tiled over layers: S a quarter of the context, L all of it; the last is L
        use_cache: bool = True,
        **kwargs,
    ):
        self.sequence_len, self.vocab_size, self.window_pattern = sequence_len, vocab_size, window_pattern
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd = n_layer, n_head, n_kv_head, n_embd
        self.use_cache = use_cache
        options: dict = {"tie_word_embeddings": False} | kwargs
        super().__init__(**options)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def window_sizes(self) -> list[int]:
        """The number of positions before its own that a query sees, per layer."""
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [short if letter == "S" else self.sequence_len for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        return layer % 2 == (self.n_layer - 1) % 2  # every other layer, and always the last one


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding on half-splits. x is (B, T, H, D); cos and sin are (B, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, -a * sin + b * cos], dim=-1)


def visible_keys(T: int, S: int, window: int, attention_mask: torch.Tensor | None, device) -> torch.Tensor | None:
    """Return which of the last min(S, window + T) keys each of the last T positions sees: bool, (B or 1, 1, T, keys).

    S is the number of all positions so far. attention_mask is (B, S), or None without padding. Returns None if a single
    position sees all of these keys.
    """
    if T == 1 and attention_mask is None:
        return None
    keys = min(S, window + T)
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S - keys, S, device=device)
    visible = ((distance >= 0) & (distance <= window))[None, None]
    if attention_mask is not None:  # padding sees itself, because a softmax over nothing is NaN
        visible = visible & attention_mask[:, None, None, -keys:].bool() | (distance == 0)
    return visible


class NanochatRayAttention(nn.Module):
    def __init__(self, config: NanochatRayConfig, layer: int):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.layer, self.head_dim, self.window = layer, D, config.window_sizes[layer]
        self.c_q = nn.Linear(C, config.n_head * D, bias=False)
        self.c_k = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.c_v = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.c_proj = nn.Linear(config.n_head * D, C, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(self, u, value_embedding, cos, sin, visible, cache):
        B, T, _ = u.shape
        q, k, v = (project(u).view(B, T, -1, self.head_dim) for project in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(u[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, -1, self.head_dim)
        q, k = 1.2 * norm(rotate(q, cos, sin)), 1.2 * norm(rotate(k, cos, sin))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
            k, v = (x[:, :, -(self.window + T) :] for x in (k, v))
        causal = visible is None and T > 1
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class NanochatRayMLP(nn.Module):
    def __init__(self, config: NanochatRayConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class NanochatRayBlock(GradientCheckpointingLayer):
    def __init__(self, config: NanochatRayConfig, layer: int):
        super().__init__()
        self.attn = NanochatRayAttention(config, layer)
        self.mlp = NanochatRayMLP(config)

    def forward(self, x, x0, lambdas, value_embedding, cos, sin, visible, cache=None):
        x = lambdas[0] * x + lambdas[1] * x0
        x = x + self.attn(norm(x), value_embedding, cos, sin, visible, cache)
        return x + self.mlp(norm(x))


class NanochatRayPreTrainedModel(PreTrainedModel):
    config_class = NanochatRayConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("NanochatRayBlock",)  # ty: ignore[invalid-assignment]
    _skip_keys_device_placement = ("cache", "past_key_values")  # ty: ignore[invalid-assignment]
    _supports_sdpa = True

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the embeddings as in any model. The value embeddings of new tokens are 0."""
        wte = super().resize_token_embeddings(*args, **kwargs)
        model: Any = self.base_model
        for table in model.value_embeds.values():
            rows = F.pad(table.weight.data, (0, 0, 0, wte.num_embeddings - table.num_embeddings))
            table.weight, table.num_embeddings = nn.Parameter(rows), wte.num_embeddings
        return wte

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights that are in no file, in the same way as nanochat-ray before training."""
        bound = math.sqrt(3 / self.config.n_embd)  # a uniform's bound for a standard deviation of 1/sqrt(C)
        if isinstance(module, NanochatRayAttention):
            for projection in (module.c_q, module.c_k, module.c_v):
                nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.zeros_(module.c_proj.weight)
            if hasattr(module, "ve_gate"):
                nn.init.uniform_(module.ve_gate.weight, 0, 0.02)
        elif isinstance(module, NanochatRayMLP):
            nn.init.uniform_(module.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(module.c_proj.weight)
        elif isinstance(module, NanochatRayModel):
            nn.init.normal_(module.wte.weight, std=0.8)
            for table in module.value_embeds.values():
                nn.init.uniform_(table.weight, -bound, bound)
            nn.init.uniform_(module.smear_gate.weight, 0, 0.02)
            nn.init.zeros_(module.smear_lambda)
            nn.init.constant_(module.backout_lambda, 0.2)
            for lambdas, first, last in ((module.resid_lambdas, 1.15, 1.05), (module.x0_lambdas, 0.20, 0.05)):
                if not getattr(lambdas, "_is_hf_initialized", False):
                    lambdas.copy_(torch.linspace(first, last, len(lambdas)))
        elif isinstance(module, NanochatRayForCausalLM):
            nn.init.normal_(module.lm_head.weight, std=0.001)


class NanochatRayModel(NanochatRayPreTrainedModel):
    """Maps token ids (B, T) to hidden states (B, T, C)."""

    def __init__(self, config: NanochatRayConfig):
        super().__init__(config)
        V, C, L = config.vocab_size, config.n_embd, config.n_layer
        self.wte = nn.Embedding(V, C)
        self.h = nn.ModuleList([NanochatRayBlock(config, layer) for layer in range(L)])
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.zeros(L))
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        kv_dim = config.n_kv_head * config.head_dim
        self.value_embeds: Any = nn.ModuleDict(
            {str(i): nn.Embedding(V, kv_dim) for i in range(L) if config.has_value_embedding(i)}
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, wte: nn.Embedding) -> None:
        self.wte = wte

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) are the tokens after those in the cache. attention_mask (B, S) covers both; 0 is padding."""
        if input_ids is None:
            raise ValueError("nanochat_ray takes input_ids, not inputs_embeds: value embeddings are looked up by id")
        cache = past_key_values if cache is None else cache
        if cache is not None and cache.is_compileable:
            raise ValueError("nanochat_ray takes a DynamicCache, not a cache of fixed size")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            cache = DynamicCache()
        T = input_ids.size(1)
        S = T if cache is None else cache.get_seq_length() + T
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"nanochat_ray takes an attention_mask of (B, S), not {tuple(attention_mask.shape)}")
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = torch.arange(S - T, S, device=input_ids.device)[None]

        x = norm(self.wte(input_ids))
        previous = norm(self.wte(previous_ids(input_ids, cache, self.config.n_layer)))
        previous = previous * (position_ids > 0).unsqueeze(-1)  # the first token has none, also if it follows padding
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        x = x + self.smear_lambda.to(x.dtype) * gate * previous

        D = self.config.head_dim
        frequencies = ROTARY_BASE ** (-torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
        angles = (position_ids[..., None].float() * frequencies).unsqueeze(-2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        visible = {}  # by window
        for window in set(self.config.window_sizes):
            everything = attention_mask is None and S == T and window >= T - 1
            visible[window] = None if everything else visible_keys(T, S, window, attention_mask, x.device)
        lambdas = torch.stack([self.resid_lambdas, self.x0_lambdas], dim=1).to(x.dtype)
        x0 = x_mid = x
        for i, block in enumerate(self.h):
            value_embedding = self.value_embeds[str(i)](input_ids) if str(i) in self.value_embeds else None
            mask = visible[self.config.window_sizes[i]]
            x = block(x, x0, lambdas[i], value_embedding, cos, sin, mask, cache=cache)
            if i == self.config.n_layer // 2:
                x_mid = x
        x = norm(x - self.backout_lambda.to(x) * x_mid.to(x.device))
        cached: dict = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=x, **cached)


def previous_ids(input_ids: torch.Tensor, cache: DynamicCache | None, n_layer: int) -> torch.Tensor:
    """Return the id before each token, (B, T); 0 for the first.

    The cache keeps the ids in a layer after the model's own, so that they are reordered, repeated and cropped together
    with the keys and values.
    """
    T = input_ids.size(1)
    if cache is not None:
        if len(cache.layers) == n_layer:
            cache.layers.append(DynamicLayer())
        as_keys = input_ids[:, None, :, None]
        keys, _ = cache.update(as_keys, as_keys, n_layer)
        input_ids = keys[:, 0, :, 0]
    return F.pad(input_ids, (1, 0))[:, -T - 1 : -1]


class NanochatRayForCausalLM(NanochatRayPreTrainedModel, GenerationMixin):
    def __init__(self, config: NanochatRayConfig):
        super().__init__(config)
        self.model = NanochatRayModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, lm_head: nn.Linear) -> None:
        self.lm_head = lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V) in fp32, softly capped at ±15, of the last logits_to_keep positions; 0 for all.

        With labels (B, T), also return the loss. Labels are not shifted, and −100 is ignored.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, cache, past_key_values, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        logits = LOGIT_SOFTCAP * torch.tanh(logits / LOGIT_SOFTCAP)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)})


# save_pretrained writes these into auto_map; transformers itself registers only the class that was loaded.
NanochatRayConfig.register_for_auto_class()
NanochatRayModel.register_for_auto_class("AutoModel")
NanochatRayForCausalLM.register_for_auto_class("AutoModelForCausalLM")
