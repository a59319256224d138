"""`rotary`: LayerNorm over every head and rotary embedding, between projection and attention.

Cost model: bound by memory where it is one pass. Forward reads x and writes the result, 2*T*heads*dim elements; with
backward the incoming gradient and x are read and the gradient written, three more. Some 20 FLOPs a number forward.
Inputs: the queries of a fused projection (a strided view), half of each head rotated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import rotate_heads
from unif2ace.ops.rotary import reference_rotate_heads


def make_problem(shape: shapes.RotaryShape, dtype: torch.dtype, device: str, backends: list[str]) -> Problem:
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(shape.tokens, 3, shape.heads, shape.head_dim, generator=generator).to(device, dtype)
    inputs = {"x": projection[:, 0]}
    inputs |= {name: torch.randn(shape.head_dim, generator=generator).to(device, dtype) for name in ("weight", "bias")}
    angle = torch.arange(shape.tokens, device=device)[:, None] * torch.logspace(0, -4, shape.head_dim // 4).to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda x, weight, bias: (
            rotate_heads(x, weight, bias, cos.to(x.dtype), sin.to(x.dtype), backend=backend),
        )

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (reference_rotate_heads(x, weight, bias, cos.to(x.dtype), sin.to(x.dtype), 1e-5),)

    return Problem(inputs, {backend: on(backend) for backend in backends} | peers.compiled(definition, device))


@each_dtype
@each_direction
@each_size(shapes.ROTARY)
def bench_rotary(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.ROTARY[shape]
    problem = make_problem(size, dtype, device, backends("rotary", dtype))
    elements = size.tokens * size.heads * size.head_dim
    compare(
        problem.variants(direction),
        baseline="reference",
        op="rotate_heads",
        shape=shape,
        case=direction,
        dtype=dtype,
        bytes=elements * dtype.itemsize * (2 if direction == "forward" else 5),
        flops=20 * elements * (1 if direction == "forward" else 3),
        gate=problem.gate(direction),
    )
