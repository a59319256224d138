"""For each op the calls whose launches cover every shipped launch configuration, on meta tensors.

A call names a registered op and its arguments, as `unif2ace.kernels.<op>` gets them. Sizes are those of the
`unif2ace-1.8b` preset, and whatever else makes a launcher choose a configuration of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call: `label` tells a reader of the table what it stands for."""

    label: str
    function: str
    arguments: tuple


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sequence_mix() -> Iterator[Call]:
    """Images of 258 rows: generation mixes one feature, understanding two. Sizes of 1 are constants of a kernel."""
    cases = [
        ("generation", 1, 32 * 258, 2048, 32),
        ("understanding", 2, 32 * 258, 2048, 32),
        ("narrow", 1, 16 * 66, 192, 16),
        ("one row", 0, 1, 1, 1),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, count, rows, hidden, images in cases:
            x, *features = (_meta(rows, hidden, dtype=dtype) for _ in range(1 + count))
            factors = (_meta(images, dtype=dtype), features, _meta(images, count, dtype=dtype))
            arguments = (*factors, _meta(images + 1, dtype=torch.int32))
            layer_scale = _meta(dtype=dtype)
            yield Call(label, "mix_sequences", (x, *arguments, x, layer_scale))
            yield Call(label, "mix_sequences_backward", (x, x, *arguments, layer_scale))


def _diffusion_loss() -> Iterator[Call]:
    """D3Diff over the codes and over everything, and the next token; the head without a bias, values alone."""
    vocabulary, codes = 58498, (50305, 58497)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight, bias = _meta(vocabulary, 2048, dtype=dtype), _meta(vocabulary, dtype=dtype)
        for label, rows, columns, b, with_mass, with_grads in (
            ("D3Diff, codes", 8192, codes, bias, False, True),
            ("D3Diff, all columns", 8192, (0, vocabulary), bias, True, True),
            ("next token", 4096, (0, vocabulary), bias, False, True),
            ("no bias", 4096, (0, vocabulary), None, False, True),
            ("values", 4096, (0, vocabulary), bias, False, False),
        ):
            hidden, weights = _meta(rows, 2048, dtype=dtype), _meta(rows, dtype=torch.float32)
            heads = (hidden, weight, b, _meta(rows, dtype=torch.int64))
            arguments = (*heads, weights, weights if with_mass else None, list(columns), list(codes), with_grads)
            yield Call(label, "linear_loss", arguments)


def _rotary() -> Iterator[Call]:
    """Queries as views of a fused projection; all of a head turned, or nothing of it; a head of an odd size."""
    cases = [("text to face", 16512, 32, 64, 16), ("avatars-tiny", 2112, 6, 32, 8)]
    cases += [("whole head", 8192, 16, 128, 64), ("no rotation", 8192, 16, 128, 0), ("odd", 67, 3, 29, 5)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, tokens, heads, dim, r in cases:
            query = _meta(tokens, 3, heads, dim, dtype=dtype)[:, 0]
            weight, angles = _meta(dim, dtype=dtype), _meta(tokens, r, dtype=dtype)
            arguments = (query, weight, weight, angles, angles, 1e-5)
            yield Call(label, "rotate_heads", arguments)
            yield Call(label, "rotate_heads_backward", (_meta(tokens, heads, dim, dtype=dtype), *arguments))


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "diffusion_loss": _diffusion_loss,
    "sequence_mix": _sequence_mix,
    "rotary": _rotary,
}
