"""`linear`: dense products, where the back end is the choice of a library.

Cost model: 2*M*N*K FLOPs, three times that with backward; x, weight and result once over memory, with backward the
gradients of all three as well and x and the weight again. No goal of its own: it stands here because whole models spend
most of their time in it. Inputs: Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import linear


def make_problem(shape: shapes.LinearShape, dtype: torch.dtype, device: str, backends: list[str]) -> Problem:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (shape.rows, shape.width), "weight": (shape.columns, shape.width), "bias": (shape.columns,)}
    inputs = {name: torch.randn(size, generator=generator).to(device, dtype) for name, size in sizes.items()}

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda x, weight, bias: (linear(x, weight, bias, backend=backend),)

    return Problem(inputs, {backend: on(backend) for backend in backends})


@each_dtype
@each_direction
@each_size(shapes.LINEAR)
def bench_linear(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.LINEAR[shape]
    problem = make_problem(size, dtype, device, backends("linear", dtype))
    operands = size.rows * size.width + size.columns * size.width + size.rows * size.columns
    compare(
        problem.variants(direction),
        baseline="reference",
        op="linear",
        shape=shape,
        case=direction,
        dtype=dtype,
        bytes=operands * dtype.itemsize * (1 if direction == "forward" else 3),
        flops=2 * size.rows * size.width * size.columns * (1 if direction == "forward" else 3),
        gate=problem.gate(direction),
    )
