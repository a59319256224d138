"""`routing`: logits -> experts, weights and the grouping plan, on every back end.

Cost model: T*E logits read, about 16*T*K + 4*T bytes written, 20 FLOPs or so per logit: bound by memory on paper, by
the selection in practice. The GB/s count these bytes, twice for forward + backward.

Goals on two CPU cores: shape "train" (8192 tokens, two groups of 8 experts, k = 4), native against reference: forward
10x, forward + backward 5x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import route
from unif2ace.ops.routing import reference_route


def make_problem(shape: shapes.RoutingShape, dtype: torch.dtype, device: str, backends: list[str]) -> Problem:
    """Gaussian logits, tokens spread evenly over the groups."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape.tokens, shape.experts, generator=generator).to(device, dtype)
    groups = shapes.token_groups(shape)
    token_group = None if groups is None else torch.tensor(groups, dtype=torch.int32, device=device)

    def on(backend: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda logits: route(
            logits, shape.top_k, token_group=token_group, group_bounds=shape.group_bounds, backend=backend
        )

    def definition(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return reference_route(
            logits, shape.top_k, token_group, shape.group_bounds, "softmax", None, True, 1.0, check_finite=False
        )

    functions = {backend: on(backend) for backend in backends} | peers.compiled(definition, device)
    return Problem({"logits": logits}, functions)


@each_dtype
@each_direction
@each_size(shapes.ROUTING)
def bench_routing(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.ROUTING[shape]
    problem = make_problem(size, dtype, device, backends("routing", dtype))
    passes = 1 if direction == "forward" else 2
    compare(
        problem.variants(direction),
        baseline="reference",
        op="route",
        shape=shape,
        case=direction,
        dtype=dtype,
        bytes=passes * (problem.inputs["logits"].nbytes + size.tokens * (16 * size.top_k + 4)),
        gate=problem.gate(direction),
    )
