"""Omni-attention layer and the key/value cache.

    qkv = W_qkv h + b           one matrix product, rows [q | k | v]
    q, k = LN_q(q), LN_k(k)     affine LayerNorm over each head, shared by the heads
    q, k = rotary(q, k)         first `rotary_dim` of every head, halves paired (i, i + rotary_dim / 2)
    out = W_o omni_attention(q, k, v, blocks) + b_o

Cost per row: 4 H^2 multiply-adds in the projections, 2 H per key seen. Rows of all sequences share one projection; only
the attention itself knows about sequences, through the blocks of the layout.

The cache holds keys *after* LayerNorm and rotary, so a cached row is never touched again. It is one buffer
[layers, rows, max_length, heads, head_dim]; a layer's slice, flattened to [rows * max_length, ...], is what the
attention blocks of a decoding step address. The rows of an image being generated see the text's keys there and their
own, which are never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unif2ace.config import UniF2aceConfig
from unif2ace.errors import UserError
from unif2ace.layout import CacheAccess, Layout
from unif2ace.model.linear import Linear
from unif2ace.ops import omni_attention, rotate_heads


class KVCache:
    """Keys and values of all layers for up to `batch` sequences of up to `max_length` rows that stay valid.

    Image rows of generation change every step, so they are never stored. `lengths[row]` is the number of rows stored;
    the model advances it after each pass. A sequence with `cached == 0` starts its cache row anew.
    Memory: 2 * layers * batch * max_length * hidden elements.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_length: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.keys = torch.empty(num_layers, batch, max_length, heads, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * batch
        self.max_length = max_length

    def check(self, layout: Layout) -> None:
        """Raise `UserError` unless every sequence of `layout` fits its cache row and continues what lies there."""
        rows = [sequence.cache_row for sequence in layout.sequences]
        if len(set(rows)) != len(rows) or any(row < 0 or row >= len(self.lengths) for row in rows):
            raise UserError(f"KVCache: sequences need distinct cache rows below {len(self.lengths)}, got {rows}")
        for sequence in layout.sequences:
            if sequence.kept > self.max_length:
                raise UserError(
                    f"KVCache: a sequence of {sequence.kept} rows to keep does not fit max_length = {self.max_length}"
                )
            if sequence.cached not in (0, self.lengths[sequence.cache_row]):
                raise UserError(
                    f"KVCache: cache row {sequence.cache_row} holds {self.lengths[sequence.cache_row]} rows, got a "
                    f"sequence that continues {sequence.cached}"
                )

    def advance(self, layout: Layout) -> None:
        """Record the rows that one pass over `layout` has added for good."""
        for sequence in layout.sequences:
            self.lengths[sequence.cache_row] = sequence.kept

    def read_row(self, row: int) -> tuple[Tensor, Tensor]:
        """A copy of what row `row` holds for good: keys and values [layers, length, heads, head_dim]."""
        length = self.lengths[row]
        return self.keys[:, row, :length].clone(), self.values[:, row, :length].clone()

    def write_row(self, row: int, stored: tuple[Tensor, Tensor]) -> None:
        """Let row `row` start with what `read_row` gave: a prompt shared by several images is run once."""
        self.lengths[row] = length = stored[0].shape[1]
        for buffer, rows in zip((self.keys, self.values), stored, strict=True):
            buffer[:, row, :length] = rows

    def extend(self, layer: int, access: CacheAccess, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of the new rows [T, heads, head_dim] that stay; the layer's flattened keys and values."""
        layer_keys, layer_values = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)
        for stored, new in ((layer_keys, key), (layer_values, value)):
            if len(access.slots):
                stored.index_copy_(
                    0, access.slots, new if access.stored is None else new.index_select(0, access.stored)
                )
        return layer_keys, layer_values


class Attention(nn.Module):
    """Multi-head omni-attention with per-head q/k LayerNorm and partial rotary embedding."""

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.heads, self.head_dim = config.num_heads, dim
        self.qkv = Linear(hidden, 3 * hidden)
        self.q_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.k_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.out = Linear(hidden, hidden)

    def project(self, h: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """h [T, H] (already normalised) -> queries, keys, values, each [T, heads, head_dim]. Each row by itself."""
        query, key, value = self.qkv(h).view(len(h), 3, self.heads, self.head_dim).unbind(1)
        query = rotate_heads(query, self.q_norm.weight, self.q_norm.bias, *rotary, eps=self.q_norm.eps)
        key = rotate_heads(key, self.k_norm.weight, self.k_norm.bias, *rotary, eps=self.k_norm.eps)
        return query, key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, cache: KVCache | None, layer: int
    ) -> Tensor:
        """What `project` gave -> [T, H]."""
        blocks, past = layout.blocks, None
        if cache is not None:
            access = layout.cache_access(cache.max_length)
            blocks, stored = access.blocks, cache.extend(layer, access, key, value)
            if access.stored is None:
                key, value = stored
            elif access.past:
                past = stored
        return self.out(omni_attention(query, key, value, blocks, past=past).flatten(1))
