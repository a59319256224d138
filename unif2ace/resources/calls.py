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


def _sampling() -> Iterator[Call]:
    """32 faces of 256 tokens, with and without guidance, greedy; text, whose 50295 columns no load divides."""
    images, rows, hidden, codes = 32, 32 * 256, 2048, 8192
    seeds, positions = _meta(rows, dtype=torch.int64), _meta(rows, dtype=torch.int64)
    where = (seeds, positions, _meta(rows, dtype=torch.int32))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits, text, few = (_meta(rows, columns, dtype=dtype) for columns in (codes, 50295, 64))
        yield Call("plain", "sample_tokens", (logits, *where, 1.0, None, 0.0, 0))
        yield Call("guided", "sample_tokens", (logits, *where, 1.0, logits, 3.0, 0))
        yield Call("greedy", "sample_tokens", (logits, *where, 0.0, None, 0.0, 0))
        yield Call("text", "sample_tokens", (text, *where, 1.0, None, 0.0, 2))
        yield Call("short rows", "sample_tokens", (few, *where, 1.0, None, 0.0, 0))
        yield Call("one code", "sample_tokens", (few[:, :1], *where, 1.0, few[:, :1], 1.0, 0))
        states, weight = _meta(rows, hidden, dtype=dtype), _meta(codes, hidden, dtype=dtype)
        yield Call("head", "head_sample", (states, weight, None, *where, 1.0, states, 3.0, 0))
    confidence, counts = _meta(rows, dtype=torch.float32), _meta(images + 1, dtype=torch.int32)
    image = (_meta(images, dtype=torch.int64), positions, counts[:images], _meta(images, dtype=torch.float32))
    yield Call("remask", "remask", (confidence, counts, counts[:images], *image))


def _routing() -> Iterator[Call]:
    """The preset's 2 x 8 experts, and the other tiles that the number of experts asks for."""
    for experts, groups, top_k, dtype, scoring, renormalize, bias in (
        (16, 2, 4, torch.bfloat16, "softmax", True, False),
        (16, 2, 4, torch.float32, "softmax", False, True),
        (64, 1, 8, torch.bfloat16, "sigmoid", True, True),
        (128, 1, 8, torch.bfloat16, "softmax", True, False),
        (256, 8, 8, torch.bfloat16, "sigmoid", False, True),
        (512, 1, 16, torch.bfloat16, "softmax", True, False),
        (512, 2, 16, torch.float16, "sigmoid", True, True),
    ):
        logits = torch.empty(8192, experts, dtype=dtype, device="meta")
        bounds = [g * experts // groups for g in range(groups + 1)]
        group = torch.empty(8192, dtype=torch.int32, device="meta") if groups > 1 else None
        selection_bias = torch.empty(experts, device="meta") if bias else None
        label = f"{experts} experts"
        arguments = (logits, top_k, group, bounds, scoring, selection_bias, renormalize, 1.0, False)
        yield Call(label, "route", arguments)
        grads = [torch.empty(*shape, device="meta") for shape in ((8192, top_k), (experts,), (8192,))]
        chosen = torch.empty(8192, top_k, dtype=torch.int32, device="meta")
        yield Call(label, "route_backward", (*grads, logits, chosen, group, bounds, scoring, renormalize, 1.0))


CALLS: dict[str, Callable[[], Iterator[Call]]] = {"routing": _routing, "sampling": _sampling}
