"""`routing`: every back end that can run here against the reference, forward and forward + backward.

A variant is timed only after its plan has passed against the reference: equal indices, close weights and gradients.
Cost model: T*E logits read, about 16*T*K + 4*T bytes written; the table's GB/s count these bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import shapes
from unif2ace.ops import RoutingPlan, route

INDICES = ("experts", "offsets", "order", "position", "load")
VALUES = ("weights", "importance", "logsumexp")


def make_call(shape: shapes.RoutingShape, dtype: torch.dtype, device: str) -> Callable[..., RoutingPlan]:
    """call(logits, backend) -> plan, and the logits as its attribute."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape.tokens, shape.experts, generator=generator).to(device, dtype)
    groups = shapes.token_groups(shape)
    token_group = None if groups is None else torch.tensor(groups, dtype=torch.int32, device=device)

    def call(backend: str, logits: torch.Tensor = logits) -> RoutingPlan:
        return route(logits, shape.top_k, token_group=token_group, group_bounds=shape.group_bounds, backend=backend)

    call.logits = logits
    return call


def forward_backward(call: Callable[..., RoutingPlan], backend: str, grads: list[torch.Tensor]) -> torch.Tensor:
    """One training step of the op: all three differentiable outputs."""
    logits = call.logits.detach().requires_grad_(True)
    plan = call(backend, logits)
    torch.autograd.backward([getattr(plan, name) for name in VALUES], grads)
    return logits.grad


def check(call: Callable[..., RoutingPlan], backend: str, grads: list[torch.Tensor]) -> None:
    """The gate: a wrong kernel has no speed."""
    want, got = call("reference"), call(backend)
    for name in INDICES:
        assert torch.equal(getattr(want, name), getattr(got, name)), f"{backend}: {name} differ from the reference"
    for name in VALUES:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    want, got = forward_backward(call, "reference", grads), forward_backward(call, backend, grads)
    step = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=4 * step, atol=max(4 * step, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", list(shapes.ROUTING))
def bench_routing(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size = shapes.ROUTING[shape]
    call = make_call(size, dtype, device)
    plan = call("reference")
    grads = [torch.randn_like(getattr(plan, field)) for field in VALUES]

    def variant(backend: str) -> Callable[[], object]:
        if direction == "forward":
            return lambda: call(backend)
        return lambda: forward_backward(call, backend, grads)

    passes = 1 if direction == "forward" else 2
    compare(
        {backend: variant(backend) for backend in backends("routing", dtype)},
        baseline="reference",
        op="routing",
        shape=shape,
        case=direction,
        dtype=dtype,
        bytes=passes * (call.logits.nbytes + size.tokens * (16 * size.top_k + 4)),
        gate=lambda backend: check(call, backend, grads),
    )
