"""Blocks, inputs and the rule in words, for the tests of `omni_attention` and of the calls it makes."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from unif2ace.ops.omni_attention import AttentionBlocks


def generation(texts: list[int], image: int) -> AttentionBlocks:
    """Text to face: text is causal over text, image rows see text and image."""
    blocks = []
    for start, text in zip(accumulate([t + image for t in texts], initial=0), texts, strict=False):
        blocks.append((start, start + text, start, start + text, True))
        blocks.append((start + text, start + text + image, start, start + text + image, False))
    return tuple(blocks)


def understanding(image: int, texts: list[int]) -> AttentionBlocks:
    """Image rows see each other, text is causal over everything before it."""
    blocks = []
    for start, text in zip(accumulate([image + t for t in texts], initial=0), texts, strict=False):
        blocks.append((start, start + image, start, start + image, False))
        blocks.append((start + image, start + image + text, start, start + image + text, True))
    return tuple(blocks)


LAYOUTS = {
    "equal-texts": generation([5, 5, 5], 7),
    "ragged-texts": generation([3, 11, 1, 6], 9),
    "understanding": understanding(6, [4, 1, 9]),
    "unordered": tuple(reversed(generation([4, 2], 3))),
    "empty-text": generation([0, 3], 4),
    "shared-keys": ((0, 4, 2, 9, False), (4, 8, 2, 9, False), (8, 9, 0, 9, True)),
    "primes": generation([11, 11, 13], 19),
}
each_layout = pytest.mark.parametrize("blocks", LAYOUTS.values(), ids=LAYOUTS.keys())


def num_rows(blocks: AttentionBlocks) -> int:
    return max((block[1] for block in blocks), default=0)


def problem(
    rows: int, keys: int, heads: int = 3, dim: int = 8, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {"q": rows, "k": keys, "v": keys}
    return {name: torch.randn(n, heads, dim, dtype=dtype) for name, n in shapes.items()}


def with_one_mask(q: Tensor, k: Tensor, v: Tensor, blocks: AttentionBlocks, scale: float) -> Tensor:
    """The whole batch as one dense attention with a [T, S] mask, row by row from the rule in words."""
    mask = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for q_start, q_end, k_start, k_end, causal in blocks:
        for i in range(q_end - q_start):
            seen = i + 1 + (k_end - k_start) - (q_end - q_start) if causal else k_end - k_start
            mask[q_start + i, k_start : k_start + seen] = True
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


def any_partition(data: st.DataObject, keys: int) -> list[tuple[int, int, int, int, bool]]:
    """Blocks of up to six rows, of both kinds, whose keys may overlap."""
    blocks, start = [], 0
    for length in data.draw(st.lists(st.integers(0, 6), max_size=6)):
        k_start = data.draw(st.integers(0, keys - 7))
        k_end = data.draw(st.integers(k_start + max(1, length), keys))
        blocks.append((start, start + length, k_start, k_end, data.draw(st.booleans())))
        start += length
    return blocks
