"""`omni_attention`: packed sequences, text causal and image rows seeing everything, as plain attention calls.

Cost model: 4*q*k*dim FLOPs per head and block of q queries and k keys (causal: half of that), 3.5 times as many with
backward, which computes the scores again. Bytes: q, k and v read, the result written; with backward those and their
gradients once more. The peer hands one boolean mask for all sequences to the same attention function: it needs equal
sequences, reads the mask, and multiplies what the mask hides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import omni_attention
from unif2ace.ops.omni_attention import AttentionBlocks


def make_blocks(shape: shapes.AttentionShape) -> AttentionBlocks:
    """Text to face, one sequence behind the other: text causal, image rows see text and image."""
    rows = shape.text + shape.image
    blocks = []
    for start in range(0, shape.sequences * rows, rows):
        middle, end = start + shape.text, start + rows
        blocks += [(start, middle, start, middle, True), (middle, end, start, end, False)]
    return tuple(blocks)


def make_mask(shape: shapes.AttentionShape, device: str) -> Tensor:
    """[rows, rows] of one sequence, True where a row sees a key."""
    rows = shape.text + shape.image
    mask = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    mask[shape.text :] = True
    return mask


def make_problem(shape: shapes.AttentionShape, dtype: torch.dtype, device: str, backends: list[str]) -> Problem:
    """Gaussian queries, keys and values: scores of unit variance."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.sequences * (shape.text + shape.image), shape.heads, shape.head_dim)
    blocks = make_blocks(shape)

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda q, k, v: (omni_attention(q, k, v, blocks, backend=backend),)

    inputs = {name: torch.randn(size, generator=generator).to(device, dtype) for name in "qkv"}
    rivals = peers.present("omni_attention", device, shape.sequences, make_mask(shape, device))
    return Problem(inputs, {backend: on(backend) for backend in backends} | rivals)


@each_dtype
@each_direction
@each_size(shapes.ATTENTION)
def bench_omni_attention(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.ATTENTION[shape]
    problem = make_problem(size, dtype, device, backends("omni_attention", dtype))
    rows = size.text + size.image
    forward = 4 * size.head_dim * size.heads * size.sequences * (size.text**2 // 2 + size.image * rows)
    passes = 1 if direction == "forward" else 2
    compare(
        problem.variants(direction),
        baseline="reference",
        op="omni_attention",
        shape=shape,
        case=direction,
        dtype=dtype,
        flops=forward if direction == "forward" else 7 * forward // 2,
        bytes=passes * 4 * problem.inputs["q"].nbytes,
        gate=problem.gate(direction),
    )
