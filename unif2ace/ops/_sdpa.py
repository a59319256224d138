"""Attention of packed sequences by PyTorch's scaled_dot_product_attention: one call per run of equal blocks.

Blocks of one shape whose queries and keys lie in even distances are one batch of strided views, so nothing is copied,
padded or masked. It serves what no variable-length kernel takes (`_varlen.py`): CPUs, float32, odd head sizes.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace.ops._varlen import Block, deterministic


class Run(NamedTuple):
    """`count` blocks of one shape: block i has queries q_start + i * q_step .. and keys k_start + i * k_step .."""

    q_start: int
    q_len: int
    q_step: int
    k_start: int
    k_len: int
    k_step: int
    causal: bool
    count: int


@lru_cache(maxsize=512)
def runs_of(blocks: tuple[Block, ...]) -> tuple[Run, ...]:
    """Group equal blocks whose queries and keys lie in even distances: each run is one call on strided views."""
    by_shape: dict[tuple[int, int, bool], list[Run]] = {}
    for q_start, q_end, k_start, k_end, causal in sorted(blocks):
        q_len, k_len = q_end - q_start, k_end - k_start
        if q_len == 0:
            continue
        causal = causal and q_len > 1  # the last row alone sees every key
        runs = by_shape.setdefault((q_len, k_len, causal), [])
        if runs:
            run = runs[-1]
            q_step = q_start - run.q_start - (run.count - 1) * run.q_step
            k_step = k_start - run.k_start - (run.count - 1) * run.k_step
            # Keys of a run must not overlap: their gradients are added through one view.
            if k_step >= k_len and (run.count == 1 or (q_step, k_step) == (run.q_step, run.k_step)):
                runs[-1] = run._replace(q_step=q_step, k_step=k_step, count=run.count + 1)
                continue
        runs.append(Run(q_start, q_len, q_len, k_start, k_len, k_len, causal, 1))
    return tuple(run for runs in by_shape.values() for run in runs)


class SdpaCalls:
    """One call of PyTorch's attention per run, on views [count, heads, length, dim] without a copy."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._runs = runs_of(blocks)

    def queries(self, x: Tensor) -> list[Tensor]:
        """Query rows of each call."""
        return [_rows(x, r.count, r.q_start, r.q_len, r.q_step) for r in self._runs]

    def keys(self, x: Tensor) -> list[Tensor]:
        """Rows of k or v of each call."""
        return [_rows(x, r.count, r.k_start, r.k_len, r.k_step) for r in self._runs]

    def attend(self, i: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Call i."""
        causal = self._runs[i].causal
        missing = key.shape[2] - query.shape[2] if causal else 0
        if missing:
            # is_causal is aligned top-left: rows in front, dropped again, align it bottom-right without a mask.
            query = F.pad(query, (0, 0, missing, 0))
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)[:, :, missing:]

    def gradients(self, results: list[Tensor], leaves: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the leaves of recorded calls, whose results have the gradients `grads`."""
        found: list[Tensor] = []
        for i, (result, grad) in enumerate(zip(results, grads, strict=True)):
            # Fused kernels of a GPU split the keys, and add the shares of dq as they arrive, unless told otherwise.
            # Plain products are in order anyway, and would refuse to run under the setting.
            told = result.device.type == "cuda" and is_fused(result)
            with deterministic() if told else contextlib.nullcontext():
                found += torch.autograd.grad(result, leaves[3 * i : 3 * i + 3], grad)
        return tuple(found)

    def join_queries(self, like: Tensor, parts: list[Tensor]) -> Tensor:
        """Results, or gradients of the queries, of all calls as one tensor."""
        out = like.new_empty(like.shape)
        for target, part in zip(self.queries(out), parts, strict=True):
            target.copy_(part)
        return out

    def join_keys(self, like: Tensor, parts: list[Tensor]) -> Tensor:
        """Sum of the gradients that the calls give k or v, in their order."""
        out = like.new_zeros(like.shape)
        for target, part in zip(self.keys(out), parts, strict=True):
            target.add_(part)
        return out


def is_fused(result: Tensor) -> bool:
    """Did one of PyTorch's fused kernels make this, and not plain products? Its node of the graph has their name."""
    node = result.grad_fn
    while node.name().startswith(("Slice", "Alias")):
        node = node.next_functions[0][0]
    return node.name().startswith("ScaledDotProduct")


def _rows(x: Tensor, count: int, start: int, length: int, step: int) -> Tensor:
    rows, heads, dims = x.stride()
    size = (count, x.shape[1], length, x.shape[2])
    return x.as_strided(size, (step * rows, heads, rows, dims), x.storage_offset() + start * rows)
