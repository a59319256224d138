"""`sequence_mix`: y = residual + s * (a_b x + sum_j c_bj S_j) over packed image rows.

Cost model: bound by memory. Forward reads x, J features and the residual and writes y: (J + 3)*R*H elements. Backward
reads the gradient, x and the features, and writes the gradients of x and of the features: 2*(J + 1) + 1 times R*H (the
gradient of the residual is the incoming one). 2*(J + 1)*R*H FLOPs forward, three times that with backward.

Inputs: gates and coefficients between 0 and 1, layer scale 0.01 as a model starts with.

Goal on two CPU cores: forward + backward 2x against reference, native, shapes "laptop" and "laptop-256px".
Goal on an H200: 85 % of the speed of a copy, triton, both directions, shapes "generate-64" and "train-512px".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import mix_sequences
from unif2ace.ops.sequence_mix import reference_mix_sequences


def make_problem(shape: shapes.MixShape, dtype: torch.dtype, device: str, backends: list[str]) -> Problem:
    """Scalars stay in float32, as the router makes them."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor(list(accumulate(shape.lengths, initial=0)), dtype=torch.int32, device=device)
    size, count = (shape.rows, shape.hidden), len(shape.lengths)
    streams = ("x", "residual", *(f"feature_{j}" for j in range(shape.features)))
    inputs = {name: torch.randn(size, generator=generator).to(device, dtype) for name in streams}
    inputs["scale"] = torch.rand(count, generator=generator).to(device)
    inputs["coefficients"] = torch.rand(count, shape.features, generator=generator).to(device)
    inputs["layer_scale"] = torch.full((1,), 0.01, device=device)

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        def function(
            x: Tensor, residual: Tensor, scale: Tensor, coefficients: Tensor, layer_scale: Tensor, **features: Tensor
        ) -> tuple[Tensor]:
            streams = list(features.values())
            return (mix_sequences(x, scale, streams, coefficients, offsets, residual, layer_scale, backend=backend),)

        return function

    def definition(
        x: Tensor, residual: Tensor, scale: Tensor, coefficients: Tensor, layer_scale: Tensor, **features: Tensor
    ) -> tuple[Tensor]:
        streams = list(features.values())
        return (reference_mix_sequences(x, scale, streams, coefficients, offsets, residual, layer_scale),)

    return Problem(inputs, {backend: on(backend) for backend in backends} | peers.compiled(definition, device))


@each_dtype
@each_direction
@each_size(shapes.SEQUENCE_MIX)
def bench_sequence_mix(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.SEQUENCE_MIX[shape]
    problem = make_problem(size, dtype, device, backends("sequence_mix", dtype))
    streams = size.features + 3 + (0 if direction == "forward" else 2 * size.features + 3)
    compare(
        problem.variants(direction),
        baseline="reference",
        op="mix_sequences",
        shape=shape,
        case=direction,
        dtype=dtype,
        bytes=streams * problem.inputs["x"].nbytes,
        flops=2 * (size.features + 1) * size.rows * size.hidden * (1 if direction == "forward" else 3),
        gate=problem.gate(direction),
    )
