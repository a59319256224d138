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


def _experts() -> Iterator[Call]:
    """Training, decoding and what lies between; every activation; with biases and the pre-activation, and without."""
    hidden, inner, experts, top_k = 2048, 512, 16, 4
    activations = ("gelu_tanh", "swiglu", "gelu", "silu", "relu2", "geglu")
    loads = {"training": 8192, **{f"{rows} rows per expert": rows * experts // top_k for rows in (128, 64, 32)}}
    loads["decoding"] = 1
    cases = [(load, name) for load in loads for name in activations[: None if load == "training" else 2]]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        offsets = _meta(experts + 1, dtype=torch.int32)
        for load, activation in cases if dtype == torch.bfloat16 else cases[:2]:
            slots, up_rows = loads[load] * top_k, inner * (2 if "glu" in activation else 1)
            x, weights = _meta(loads[load], hidden, dtype=dtype), _meta(loads[load], top_k, dtype=torch.float32)
            index = _meta(slots, dtype=torch.int32)
            w_up, w_down = _meta(experts, up_rows, hidden, dtype=dtype), _meta(experts, hidden, inner, dtype=dtype)
            biases = _meta(experts, up_rows, dtype=dtype), _meta(experts, hidden, dtype=dtype)
            plan = (x, weights, offsets, index, index, w_up, w_down)
            label = f"{load}, {activation}"
            yield Call(f"{label}, saved", "expert_mlp", (*plan, *biases, activation, True))
            yield Call(label, "expert_mlp", (*plan, None, None, activation, False))
            if load in ("training", "decoding"):  # the backward knows many rows and few
                saved = (x, x, _meta(slots, up_rows, dtype=dtype), *plan[1:])  # gradient of y, x, pre-activation, ..
                yield Call(label, "expert_mlp_backward", (*saved, *biases, activation))
        for rows in (32768, 64):
            a, b, index = _meta(rows, hidden, dtype=dtype), w_up, _meta(rows, dtype=torch.int32)
            yield Call(f"{rows} rows", "grouped_gemm", (a, b, offsets, None, None))
            yield Call(f"{rows} rows gathered", "grouped_gemm", (a, b, offsets, None, index))
            grad, bias = _meta(rows, b.shape[1], dtype=dtype), _meta(*b.shape[:2], dtype=dtype)
            yield Call(f"{rows} rows", "grouped_gemm_backward", (grad, a, b, offsets, bias, None))
            yield Call(f"{rows} rows gathered", "grouped_gemm_backward", (grad, a, b, offsets, bias, index))
    yield from _tuned_experts()


def _tuned_experts() -> Iterator[Call]:
    """For each measured configuration of kernels/tuning/experts-*.json a call that takes it on its chip."""
    from unif2ace.kernels import experts_config  # here: Triton is not installed everywhere

    keys = {key for path in experts_config.FOLDER.glob("experts-*.json") for key in experts_config.table(path)}
    for key in sorted(keys):
        experts, dtype = 16, torch.bfloat16 if key.bits == 16 else torch.float32
        rows = experts * key.rows_per_expert
        offsets, index = _meta(experts + 1, dtype=torch.int32), _meta(rows, dtype=torch.int32)
        weights = _meta(rows, 1, dtype=torch.float32)
        hidden, inner = (key.depth, key.width) if key.gather else (key.width, key.depth)
        w_up = _meta(experts, key.parts * inner, hidden, dtype=dtype)
        plan = (_meta(rows, hidden, dtype=dtype), weights, offsets, index, index, w_up)
        w_down = _meta(experts, hidden, inner, dtype=dtype)
        activation = "swiglu" if key.parts == 2 else "gelu_tanh"
        for save in (False, True):
            yield Call(f"measured {tuple(key)}", "expert_mlp", (*plan, w_down, None, None, activation, save))


CALLS: dict[str, Callable[[], Iterator[Call]]] = {"experts": _experts}
