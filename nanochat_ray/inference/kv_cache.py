"""Keys, values and smear state of the sequences being generated: one row each, at any mix of lengths."""

import torch
import torch.nn.functional as F

from nanochat_ray.model.attention import attention, sliding_window_mask
from nanochat_ray.model.gpt import GPTConfig


class KVCache:
    """Room for batch_size sequences of max_len tokens, allocated once. Rows in use are kept next to each other, from 0.

    keys and values are (layers, batch_size, kv heads, max_len, head_dim), so that a batch of rows up to some length
    is a view; previous is (batch_size, C), each row's last embedding before the smear; lengths is on the host.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, device="cpu", dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.n_kv_head, max_len, config.head_dim)
        # Zeros, since attention multiplies what it masks by 0 and 0 · NaN would spread.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.previous = torch.zeros(batch_size, config.n_embd, device=device, dtype=dtype)
        self.lengths = [0] * batch_size
        self.max_len = max_len

    def clear_rows(self, rows: slice) -> None:
        self.lengths[rows] = [0] * len(self.lengths[rows])

    def copy_row(self, source: int, target: int) -> None:
        """Let target continue where source is: another sample of its prompt, or its new place in the batch."""
        length = self.lengths[source]
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]
        self.previous[target] = self.previous[source]
        self.lengths[target] = length

    def chunk(self, first_row: int, counts: list[int]) -> "Chunk":
        """The `cache` of one model.hidden call: row first_row + i takes counts[i] further tokens, padded on the right.

        Raises ValueError when a row, with its padding, would be longer than max_len.
        """
        rows = slice(first_row, first_row + len(counts))
        starts = self.lengths[rows]
        if (end := max(starts) + max(counts)) > self.max_len:
            raise ValueError(f"a sequence of {end} tokens does not fit the cache's rows of {self.max_len}")
        self.lengths[rows] = [start + count for start, count in zip(starts, counts, strict=True)]
        return Chunk(self, rows, starts, counts)


class Chunk:
    """The next tokens of some rows of a cache, as the model sees them in one forward."""

    def __init__(self, cache: KVCache, rows: slice, starts: list[int], counts: list[int]):
        device = cache.keys.device
        self.cache, self.rows, self.starts, self.counts = cache, rows, starts, counts
        self.index = torch.arange(len(counts), device=device)
        self.first = torch.tensor(starts, device=device)
        self.last = torch.tensor(counts, device=device) - 1
        self.masks = {}  # by window: the layers share a few

    def positions(self, T: int) -> torch.Tensor:
        self.at = self.first.unsqueeze(1) + torch.arange(T, device=self.first.device)
        return self.at

    def last_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, C): each row at its last token that is not padding."""
        return hidden[self.index, self.last]

    def previous_embedding(self, x: torch.Tensor) -> torch.Tensor:
        before = self.cache.previous[self.rows] * (self.first > 0).unsqueeze(1)
        self.cache.previous[self.rows] = self.last_hidden(x)
        return torch.cat([before.unsqueeze(1), x[:, :-1]], dim=1)

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k and v (B, T, K, D), let q (B, T, H, D) attend to all its row has within the window: (B, T, H, D).

        Padding is stored too, after the row's last token: no query sees it before a real token takes its place.
        """
        keys, values = self.cache.keys[layer, self.rows], self.cache.values[layer, self.rows]
        keys[self.index.unsqueeze(1), :, self.at] = k
        values[self.index.unsqueeze(1), :, self.at] = v
        if not any(self.starts):
            return attention(q, k, v, window)
        if window not in self.masks:
            self.masks[window] = self._visible(q.size(1), window)
        seen, mask = self.masks[window]
        # A group of query heads shares a key head: as further queries of that head, no key is copied.
        B, T, H, D = q.shape
        K, G = k.size(2), H // k.size(2)
        q = q.view(B, T, K, G, D).transpose(1, 2).reshape(B, K, T * G, D)
        mask = mask.repeat_interleave(G, dim=2)
        y = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen], attn_mask=mask)
        return y.view(B, K, T, G, D).transpose(1, 2).reshape(B, T, H, D)

    def _visible(self, T: int, window: int) -> tuple[slice, torch.Tensor]:
        """The span of positions that any query sees, and within it the mask (B, 1, T, span)."""
        begin, end = max(0, min(self.starts) - window), max(self.starts) + T
        mask = sliding_window_mask(self.at, torch.arange(begin, end, device=self.at.device), window)
        return slice(begin, end), mask.unsqueeze(1)
