"""The Transformer: rotary positions, QK norm, ReLU² MLP, value embeddings, smear and backout, no biases.

The same module trains and generates. Weights load from nanochat unchanged.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat_ray.model.attention import attention, available_backends, window_mask
from nanochat_ray.model.compiling import STATIC, compile_static, raise_recompile_limit
from nanochat_ray.model.embedding import embed, order_for_gradients
from nanochat_ray.model.loss import IGNORED, cross_entropy, softcap

SMEAR_CHANNELS = 24  # channels of the embedding that decide how much of the previous token is mixed in
VALUE_GATE_CHANNELS = 12  # channels of a layer's input that gate its value embedding
ROTARY_REACH = 10  # the longest input, as a multiple of sequence_len


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # repeated over layers. S sees a quarter of the context, L all of it. The last is L

    def __post_init__(self):
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must be an even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} must divide n_head {self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern {self.window_pattern!r} may hold only the letters S and L")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / 64) * 64  # so that matmuls and shards divide evenly

    @property
    def window_sizes(self) -> list[int]:
        """Return for each layer how many positions before its own a query sees."""
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [short if letter == "S" else self.sequence_len for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        return layer % 2 == (self.n_layer - 1) % 2  # every other layer, including the last


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Holds fp32 master weights and multiplies in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions (arXiv:2104.09864) on half-splits. x is (B, T, H, D); cos, sin are (…, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, -a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.layer, self.head_dim, self.window = layer, D, config.window_sizes[layer]
        self.backend = "sdpa"  # used in compiled code
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)
        gated = config.has_value_embedding(layer)
        self.ve_gate: Any = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if gated else None

    def project(self, u):
        return self.c_q(u), self.c_k(u), self.c_v(u)

    def forward(self, u, value_embedding, cos, sin, cache, mask):
        B, T, _ = u.shape
        q, k, v = (x.view(B, T, -1, self.head_dim) for x in self.project(u))
        if value_embedding is not None:
            # Value residual (arXiv:2410.17897): the token's own embedding, gated per head between 0 and 3.
            gate = 3 * torch.sigmoid(self.ve_gate(u[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.view(B, T, -1, self.head_dim)
        # QK norm. The factors of 1.2 make attention a little sharper.
        q, k = 1.2 * norm(rotate(q, cos, sin)), 1.2 * norm(rotate(k, cos, sin))
        if cache is None:
            y = attention(q, k, v, self.window, self.backend, mask)
        else:
            y = cache.attention(self.layer, q, k, v, self.window)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())  # ReLU² (arXiv:2109.08668)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, x0, lambdas, value_embedding, cos, sin, cache, mask):
        x = lambdas[0].to(x.dtype) * x + lambdas[1].to(x.dtype) * x0
        x = x + self.attn(norm(x), value_embedding, cos, sin, cache, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The whole model. It maps token ids (B, T) to logits (B, T, V) in fp32, or to the loss if targets are given."""

    # Any: a type checker doesn't know what a ModuleDict or a ModuleList holds.
    transformer: Any  # wte: nn.Embedding; h: the blocks
    value_embeds: Any  # an nn.Embedding for each layer that has one, by the layer's index as a string
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compiled = False
        self.recompute = False  # activation checkpointing: the backward recomputes each block from its input
        # hidden() calls it with a layer before it reads the layer's weights, and with inf before the head's. They may
        # still be arriving from other ranks.
        self.wait_for_weights: Callable[[float], None] | None = None
        V, C, L = config.padded_vocab_size, config.n_embd, config.n_layer
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(V, C), "h": nn.ModuleList([Block(config, layer) for layer in range(L)])}
        )
        self.lm_head = Linear(C, V)
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.zeros(L))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        kv_dim = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(V, kv_dim) for i in range(L) if config.has_value_embedding(i)}
        )
        cos, sin = self._rotary()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        D = self.config.head_dim
        frequencies = 100_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
        angles = torch.outer(torch.arange(ROTARY_REACH * self.config.sequence_len, dtype=torch.float32), frequencies)
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def init_weights(self) -> None:
        bound = math.sqrt(3 / self.config.n_embd)  # a uniform distribution then has a standard deviation of 1/sqrt(C)
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for projection in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(projection.weight, -bound, bound)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)  # every block starts as the identity
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0, 0.02)
        for embedding in self.value_embeds.values():
            nn.init.uniform_(embedding.weight, -bound, bound)
        nn.init.uniform_(self.smear_gate.weight, 0, 0.02)
        self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, self.config.n_layer))
        self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, self.config.n_layer))
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)

    def set_compute_dtype(self, dtype: torch.dtype) -> "GPT":
        """Set the dtype of matmuls and stored embeddings. All other weights stay fp32. Returns self."""
        for embedding in (self.transformer.wte, *self.value_embeds.values()):
            embedding.to(dtype)
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.transformer.wte.weight.dtype

    def hidden(self, idx: torch.Tensor, cache=None) -> torch.Tensor:
        """Return the final hidden states (B, T, C), before the head.

        cache: for idx (1, N) with tokens of several sequences: their positions, the ids before them for the smear, and
        their attention. The engine's has earlier tokens (Step in inference/model_runner.py); in reinforcement learning
        answers share their question (SharedPrompts in train/policy_gradient.py).
        Raises ValueError if T is more than ROTARY_REACH · sequence_len.
        """
        T = idx.size(1)
        if T > self.cos.size(0):
            raise ValueError(f"input of {T} tokens is longer than {self.cos.size(0)}, the reach of rotary positions")
        wait = self.wait_for_weights or (lambda layer: None)
        wait(0)
        positions = slice(0, T) if cache is None else cache.at
        order = order_for_gradients(idx)
        embedded = embed(idx, self.transformer.wte.weight, order)
        cos = self.cos[positions].unsqueeze(-2).to(embedded.dtype)
        sin = self.sin[positions].unsqueeze(-2).to(embedded.dtype)
        compiled = self.compiled and cache is None
        smear, finish = _compiled_ends() if compiled and idx.is_cuda else (GPT.smear, GPT.finish)
        previous = None
        if cache is not None:
            table = self.transformer.wte.weight
            previous = norm(embed(cache.previous, table, order_for_gradients(cache.previous)))
            previous = previous * (cache.at > 0).unsqueeze(-1)
        x = smear(self, embedded, previous)
        # Pad each layer's row to 16 bytes: compiled code copies an argument whose address is not a multiple of 16.
        lambdas = F.pad(torch.stack([self.resid_lambdas, self.x0_lambdas], dim=1), (0, 2)).unbind()
        x0, x_mid = x.view_as(x), x  # if x0 were x itself, the first block would need its own graph
        for i, block in enumerate(self.transformer.h):
            wait(i)
            table = self.value_embeds[str(i)].weight if str(i) in self.value_embeds else None
            value_embedding = None if table is None else embed(idx, table, order)
            mask = window_mask(block.attn.backend, T, block.attn.window, idx.device) if compiled else None
            inputs = x, x0, lambdas[i], value_embedding, cos, sin, cache, mask
            keeps = not (self.recompute and torch.is_grad_enabled())
            x = block(*inputs) if keeps else checkpoint(block, *inputs, use_reentrant=False)
            if i == self.config.n_layer // 2:
                x_mid = x
        wait(math.inf)  # for the head's weights
        return finish(self, x, x_mid)

    def smear(self, embedded: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize the embeddings (B, T, C) and mix in the embedding of each previous token.

        previous: the normalized embeddings of the previous tokens, if those are not the ones before in `embedded`.
        """
        x = norm(embedded)
        previous = F.pad(x, (0, 0, 1, -1)) if previous is None else previous
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + self.smear_lambda.to(x.dtype) * gate * previous

    def finish(self, x: torch.Tensor, x_mid: torch.Tensor) -> torch.Tensor:
        """Subtract the middle layer's output (backout) and apply the last norm."""
        return norm(x - self.backout_lambda.to(x.dtype) * x_mid)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits (…, V) in fp32, softly capped at ±15, from hidden states (…, C)."""
        return softcap(self.lm_head(hidden)[..., : self.config.vocab_size])

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, loss_reduction: str = "mean"):
        """Return logits (B, T, V) in fp32 or, with targets (B, T), the cross entropy in nats.

        loss_reduction: "mean" and "sum" return (), "none" returns (B, T). Targets of −1 are ignored: their loss is 0,
        and the mean leaves them out.
        """
        hidden = self.hidden(idx)
        if targets is None:
            return self.logits(hidden)
        flat = targets.reshape(-1)
        if loss_reduction == "none" and torch.is_grad_enabled():  # cross_entropy() has no gradient of single losses
            logits = self.logits(hidden).flatten(0, 1)
            return F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="none").view(targets.shape)
        head = self.lm_head.weight[: self.config.vocab_size]
        total, losses = cross_entropy(hidden.flatten(0, 1), head, flat, self.compiled)
        if loss_reduction == "none":
            return losses.view(targets.shape)
        return total if loss_reduction == "sum" else total / (flat != IGNORED).sum()

    def compile_for_training(self, attention: str | None = None) -> None:
        """Compile the blocks and the loss. Blocks of one kind share a graph, whatever the depth.

        attention: one of available_backends(), by default the first. Raises ValueError for any other.
        """
        available = available_backends(self.cos.device, self.compute_dtype)
        if attention is not None and attention not in available:
            raise ValueError(f"no attention back end {attention} here: there are {', '.join(available)}")
        raise_recompile_limit()
        for block in self.transformer.h:
            block.attn.backend = attention or available[0]
            block.compile(**STATIC)
        self.compiled = True

    @contextmanager
    def uncompiled(self) -> Generator[None]:
        """Run everything in this context uncompiled. Inputs of many lengths need it: each would be compiled."""
        compiled, self.compiled = self.compiled, False
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.compiled = compiled

    def convert_to_fp8(self) -> None:
        """Convert the blocks' matmuls to float8 by torchao, forward and backward. Needs a Hopper GPU or later.

        Its speed in training was not measured yet. Raises ImportError without torchao.
        """
        from torchao.float8 import convert_to_float8_training

        def divisible(module: nn.Linear, name: str) -> bool:  # false for the gates
            return module.in_features % 16 == 0 and module.out_features % 16 == 0

        convert_to_float8_training(self.transformer.h, module_filter_fn=divisible)


@lru_cache(maxsize=1)
def _compiled_ends():
    """Compile the parts before and after the blocks. On GPUs this saves launches of small kernels."""
    return compile_static(GPT.smear), compile_static(GPT.finish)
