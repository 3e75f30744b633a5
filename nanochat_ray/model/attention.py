"""Causal attention with an optional sliding window.

Compiled blocks use the back end that GPT.compile_for_training chose among available_backends(). Uncompiled calls have
varying lengths and use PyTorch's scaled_dot_product_attention (SDPA) on every device.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128  # queries per block of the back end "blocks"
FULL_WINDOW_BACKEND = "sdpa"  # "sdpa" or "flex": the back end "flex" uses it for layers without a window
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,  # on Hopper about twice as fast as PyTorch's FlashAttention 2
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    backend: str = "sdpa",
    mask: BlockMask | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute causal self-attention over whole sequences, as in training. Returns (B, T, H, D).

    q is (B, T, H, D); k and v are (B, T, K, D), where K divides H. Each head of q and k has a norm of at most 1.2·√D.
    A position sees itself and the `window` positions before it. The softmax scale is 1/sqrt(D).
    backend: one of available_backends(). mask: from window_mask(). Uncompiled calls ignore both.
    """
    full = window >= q.size(1) - 1
    if not torch.compiler.is_compiling():
        backend, mask = "sdpa", None
    elif backend == "flex" and full:
        backend = FULL_WINDOW_BACKEND
    if backend in FLASH:
        return FLASH[backend](q, k, v, -1 if full else window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "blocks":
        y = _attention_by_blocks(q, k, v, window)
    elif backend == "flex" and mask is not None:
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))  # ty: ignore[no-matching-overload]
    else:
        y = _sdpa(q, k, v, window, mask)  # ty: ignore[invalid-argument-type]
    return y.transpose(1, 2)


@lru_cache(maxsize=8)
def available_backends(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    """Return the back ends that compiled blocks can use on a device, the best first.

    flash-attn-4: the package flash-attn-4, on Hopper and Blackwell. flash-attn-3: a kernel from the Hugging Face Hub,
    loaded by the package `kernels`, on Hopper. flash-attn-2: PyTorch's own. flex: FlexAttention. sdpa: SDPA chooses.
    blocks: plain matmuls for CPUs. A package is listed only if a small forward and backward succeed with it. The order
    is a guess: only flex was timed, on an H200.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "blocks", "sdpa"
    if device.type != "cuda":
        return ("sdpa",)
    major, half = torch.cuda.get_device_capability(device)[0], dtype in (torch.bfloat16, torch.float16)
    packages = []
    if half and major >= 9 and _runs("flash-attn-4", device, dtype):
        packages.append("flash-attn-4")
    if half and major == 9 and _load_flash_attention_3() and _runs("flash-attn-3", device, dtype):
        packages.append("flash-attn-3")
    return (*packages, "flex", *(["flash-attn-2"] if half and major >= 8 else []), "sdpa")


def window_mask(backend: str, T: int, window: int, device: torch.device) -> BlockMask | torch.Tensor | None:
    """Return the `mask` that attention() needs for T positions, or None if the back end needs no mask.

    Call it outside compiled code. Masks are cached.
    """
    full = window >= T - 1
    if backend == "flex" and not (full and FULL_WINDOW_BACKEND == "sdpa"):
        return _block_mask(T, window, str(device))
    return _boolean_mask(T, window, str(device)) if backend == "sdpa" and not full else None


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # autograd can't save tensors made in inference mode
def _block_mask(T: int, window: int, device: str) -> BlockMask:
    """Return FlexAttention's mask. It skips blocks of keys outside the window; SDPA with a mask computes them."""

    def visible(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    return create_block_mask(visible, B=None, H=None, Q_LEN=T, KV_LEN=T, device=device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _boolean_mask(T: int, window: int, device: str) -> torch.Tensor:
    positions = torch.arange(T, device=device)
    return sliding_window_mask(positions, positions, window)


def _sdpa(q, k, v, window: int, mask: torch.Tensor | None) -> torch.Tensor:
    T, grouped = q.size(2), q.size(1) != k.size(1)
    if window < T - 1:
        if mask is None:
            positions = torch.arange(T, device=q.device)
            mask = sliding_window_mask(positions, positions, window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    if not (q.is_cuda and torch.compiler.is_compiling()):  # cuDNN would make a plan for each length
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(SDPA_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _attention_by_blocks(q, k, v, window: int) -> torch.Tensor:
    """Attend from each block of queries to the keys it can see, by plain matmuls. Inductor fuses the softmax.

    On CPUs this is faster than SDPA: SDPA's backward is slow there, and it also computes the masked scores.
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.size(1), dim=1) if x.size(1) < H else x for x in (k, v))
    q, k, v = (x.reshape(B * H, T, D) for x in (q / math.sqrt(D), k, v))
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = max(0, start - window) // BLOCK * BLOCK
        visible = sliding_window_mask(torch.arange(start, stop), torch.arange(first, stop), window)
        # exp needs no maximum subtracted: the norms of q and k limit scores to 1.44·√D.
        weights = torch.where(visible, torch.exp((q[:, start:stop] @ k[:, first:stop].mT).float()), 0)
        y = (weights.to(v.dtype) @ v[:, first:stop]) / weights.sum(-1, keepdim=True)
        blocks.append(y.to(v.dtype))
    return torch.cat(blocks, dim=1).view(B, H, T, D)


def attend_visible(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Attend where `visible` (B, T, S) says so: each query to one key at least. Returns (B, H, T, D).

    q is (B, H, T, D); k and v are (B, K, S, D), where K divides H. Norms and the scale are as in attention().
    On CPUs these are plain matmuls, because SDPA's backward is slow there.
    """
    if q.is_cuda:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) if x.size(1) < q.size(1) else x for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1))
    (B, H, T, D), K = q.shape, k.size(1)
    queries = (q * D**-0.5).reshape(B, K, -1, D)  # the query heads of a key head as more queries
    scores = (queries @ k.mT).float().view(B, K, H // K, T, -1)
    weights = torch.where(visible[:, None, None], scores.exp(), 0)  # no maximum subtracted, as below
    y = (weights.to(v.dtype).flatten(2, 3) @ v).view(B, H, T, D)
    return (y / weights.sum(-1).view(B, H, T, 1)).to(v.dtype)


def sliding_window_mask(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Return (…, Tq, Tk) booleans: whether each query sees each key. Takes their positions, (…, Tq) and (…, Tk)."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (distance >= 0) & (distance <= window)


# FlashAttention (arXiv:2407.08608 and its successors): functions of q, k, v (B, T, H, D) and a window, -1 for none.


def _flash_attention_2(q, k, v, window: int) -> torch.Tensor:
    """Call PyTorch's FlashAttention 2 directly, because SDPA has no argument for windows."""
    T, left = q.size(1), None if window < 0 else window
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, T, T, dropout_p=0.0, is_causal=True, return_debug_mask=False, window_size_left=left
    )[0]


FLASH: dict[str, Callable] = {
    "flash-attn-2": _flash_attention_2,
    "flash-attn-4": lambda q, k, v, window: flash_attention_4(q, k, v, window)[0],
}


def _load_flash_attention_3() -> bool:
    """Add the Hub's FlashAttention 3 to FLASH and return True, or return False if it can't be loaded.

    Call it before anything is compiled.
    """
    try:
        from kernels import get_kernel

        kernel = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
    except Exception:  # no package, no network, or no build for this version of PyTorch
        return False
    FLASH["flash-attn-3"] = lambda q, k, v, window: kernel(q, k, v, causal=True, window_size=(window, 0))
    return True


@torch.library.custom_op("nanochat_ray::flash_attention_4", mutates_args=())
def flash_attention_4(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output (B, T, H, D), logsumexp of the scores (B, H, T)).

    It is a custom operator, because torch.compile can't trace the package's own function.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v, causal=True, return_lse=True, **_window_size_4(window))[:2]


@torch.library.custom_op("nanochat_ray::flash_attention_4_backward", mutates_args=())
def flash_attention_4_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd(q, k, v, y, grad.contiguous(), lse, causal=True, **_window_size_4(window))[:3]


def _window_size_4(window: int) -> dict[str, int]:
    return {} if window < 0 else {"window_size_left": window, "window_size_right": 0}


@flash_attention_4.register_fake
def _(q, k, v, window):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@flash_attention_4_backward.register_fake
def _(grad, q, k, v, y, lse, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    *qkv, ctx.window = inputs
    ctx.save_for_backward(*qkv, *output)


def _backward(ctx, grad, _):
    return *flash_attention_4_backward(grad, *ctx.saved_tensors, ctx.window), None


flash_attention_4.register_autograd(_backward, setup_context=_save_for_backward)


def _runs(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a back end traces and runs forward and backward. A package may be broken or not fit the GPU."""
    shapes = (1, 256, 2, 128), (1, 256, 1, 128), (1, 256, 1, 128)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
            traced = torch.compile(attention, backend="aot_eager", dynamic=False, fullgraph=True)
            traced(q, k, v, 128, backend).sum().backward()
    except Exception:
        return False
    return True
