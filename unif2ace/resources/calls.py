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


CALLS: dict[str, Callable[[], Iterator[Call]]] = {"sequence_mix": _sequence_mix}
