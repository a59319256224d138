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


def _diffusion_loss() -> Iterator[Call]:
    """D3Diff over the codes and over everything, and the next token; the head without a bias, values alone."""
    vocabulary, codes = 58498, (50305, 58497)
    cases = [
        ("D3Diff, all columns", 8192, (0, vocabulary), True, True, True),
        ("D3Diff, codes", 8192, codes, True, False, True),
        ("next token", 4096, (0, vocabulary), True, False, True),
        ("no bias", 4096, (0, vocabulary), False, False, True),
        ("values", 4096, (0, vocabulary), True, False, False),
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight, bias = _meta(vocabulary, 2048, dtype=dtype), _meta(vocabulary, dtype=dtype)
        for label, rows, columns, with_bias, with_mass, with_grads in cases if dtype == torch.bfloat16 else cases[:1]:
            hidden, weights = _meta(rows, 2048, dtype=dtype), _meta(rows, dtype=torch.float32)
            head = (hidden, weight, bias if with_bias else None, _meta(rows, dtype=torch.int64))
            arguments = (*head, weights, weights if with_mass else None, list(columns), list(codes), with_grads)
            yield Call(label, "linear_loss", arguments)


def _rotary() -> Iterator[Call]:
    """Queries as views of a fused projection; all of a head turned, or nothing of it; a head of an odd size."""
    cases = [("text to face", 16512, 32, 64, 16), ("avatars-tiny", 2112, 6, 32, 8)]
    cases += [("whole head", 8192, 16, 128, 64), ("no rotation", 8192, 16, 128, 0), ("odd", 67, 3, 29, 5)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for label, tokens, heads, dim, r in cases if dtype == torch.bfloat16 else cases[:2]:
            query = _meta(tokens, 3, heads, dim, dtype=dtype)[:, 0]
            weight, angles = _meta(dim, dtype=dtype), _meta(tokens, r, dtype=dtype)
            arguments = (query, weight, weight, angles, angles, 1e-5)
            yield Call(label, "rotate_heads", arguments)
            yield Call(label, "rotate_heads_backward", (_meta(tokens, heads, dim, dtype=dtype), *arguments))


CALLS: dict[str, Callable[[], Iterator[Call]]] = {"diffusion_loss": _diffusion_loss, "rotary": _rotary}
