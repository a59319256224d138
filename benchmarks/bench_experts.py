"""`experts`: the expert MLP with a finished routing plan, and the grouped GEMM alone, against peers and a ceiling.

Cost model of `expert_mlp`: 2*T*K*H*(I_up + I) FLOPs forward, three times that with backward. Bytes forward: x, y and
the weights of every expert that has rows; backward reads those weights and x again, the gradient of y, and the
pre-activation [T*K, I_up] that forward wrote, and writes the gradients of x and of all weights. Decoding (T = 1 .. 64)
streams weights: read GB/s. Training multiplies: read TFLOP/s. The *dense ceiling* is one pair of dense products with
T*K rows, so of the same FLOPs, without routing, gather, activation or combination; once through torch's `linear` (MKL
in float32), once through oneDNN, which is the faster one on AMD processors.

Cases: router logits are Gaussian, so loads are balanced; "skewed" makes every second token prefer expert 0, which then
holds more than half of the tokens. "cold" decodes with caches that other weights went through, as in a model of many
layers; without it small experts stay in the cache from one call to the next.

Goals on two CPU cores, native: shape "laptop-1024" forward 0.85x of the dense ceiling's speed in float32 and 0.8x in
bfloat16; against transformers' eager loop and grouped_mm 1.5x in float32 and 5x in bfloat16, forward + backward 1.5x;
shape "decode-8" forward 2x against transformers' grouped_mm and batched_mm.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers, shapes
from benchmarks.problems import Problem, each_direction, each_dtype, each_size
from unif2ace.ops import RoutingPlan, expert_mlp, grouped_gemm, route

DECODE_TOKENS = 64
CEILING_ROWS = 16  # per expert; below, products stream weights and one dense pair would stream too few of them
BATCHED_BYTES = 2**29  # transformers' batched_mm copies the weights of an expert for every slot; more is no contest


def make_plan(shape: shapes.ExpertShape, skewed: bool, device: str) -> RoutingPlan:
    """The routing of `shape.tokens` random tokens."""
    logits = torch.randn(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(0))
    if skewed:
        logits[::2, 0] += 8.0  # every second token; a quarter of the others chooses expert 0 of 16 by chance
    return route(logits.to(device), shape.top_k, backend="reference")


def make_problem(
    shape: shapes.ExpertShape, plan: RoutingPlan, dtype: torch.dtype, device: str, backends: list[str]
) -> Problem:
    """x of unit variance, weights that keep it; no biases, which not all peers have."""
    generator = torch.Generator().manual_seed(1)

    def gaussian(scale: float, *size: int) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    inputs = {
        "x": gaussian(1.0, shape.tokens, shape.hidden),
        "weights": plan.weights,
        "w_up": gaussian(shape.hidden**-0.5, shape.experts, shape.up_rows, shape.hidden),
        "w_down": gaussian(shape.inner**-0.5, shape.experts, shape.hidden, shape.inner),
    }

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        def function(x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor]:
            chosen = plan._replace(weights=weights)
            return (expert_mlp(x, chosen, w_up, w_down, activation=shape.activation, backend=backend),)

        return function

    functions = {backend: on(backend) for backend in backends} | peers.present("experts", device, shape, plan)
    slots = shape.tokens * shape.top_k
    if slots * (inputs["w_up"][0].nbytes + inputs["w_down"][0].nbytes) > BATCHED_BYTES:
        functions.pop("transformers: batched_mm", None)
    return Problem(inputs, functions, dense_pair(shape, inputs) if slots >= CEILING_ROWS * shape.experts else {})


def dense_pair(shape: shapes.ExpertShape, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Two dense products with as many rows as there are slots: all the FLOPs of `expert_mlp` and nothing else."""
    rows = inputs["x"].repeat(shape.top_k, 1)
    w_up, w_down = inputs["w_up"][0], inputs["w_down"][0]

    @torch.no_grad()
    def through_torch() -> Tensor:
        return F.linear(F.linear(rows, w_up)[:, : shape.inner], w_down)

    @torch.no_grad()
    def through_onednn() -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(linear(rows, w_up, None, "none", [], "")[:, : shape.inner], w_down, None, "none", [], "")

    pairs = {"ceiling: dense GEMM pair": through_torch}
    if rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
        pairs["ceiling: dense GEMM pair, oneDNN"] = through_onednn
    return pairs


def bytes_moved(shape: shapes.ExpertShape, plan: RoutingPlan, inputs: dict[str, Tensor], direction: str) -> int:
    """The bytes of the cost model."""
    x, w_up, w_down = (inputs[name] for name in ("x", "w_up", "w_down"))
    used = int((plan.load > 0).sum()) * (w_up[0].nbytes + w_down[0].nbytes)
    forward = 2 * x.nbytes + used
    if direction == "forward":
        return forward
    pre_activation = shape.tokens * shape.top_k * shape.up_rows * x.element_size()
    return forward + 3 * x.nbytes + used + 2 * pre_activation + w_up.nbytes + w_down.nbytes


def cases() -> list[tuple[str, str]]:
    """(shape, case): nobody trains on a handful of tokens, and only their weights can be cached between two calls."""
    many, few = ("forward", "forward skewed", "forward+backward"), ("forward", "forward cold")
    return [(name, case) for name, s in shapes.EXPERTS.items() for case in (few if s.tokens <= DECODE_TOKENS else many)]


@each_dtype
@pytest.mark.parametrize(("shape", "case"), cases())
def bench_expert_mlp(
    shape: str, case: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    size, direction = shapes.EXPERTS[shape], case.split()[0]
    plan = make_plan(size, "skewed" in case, device)
    problem = make_problem(size, plan, dtype, device, backends("experts", dtype))
    compare(
        problem.variants(direction),
        baseline="reference",
        op="expert_mlp",
        shape=shape,
        case=case,
        dtype=dtype,
        flops=size.flops * (1 if direction == "forward" else 3),
        bytes=bytes_moved(size, plan, problem.inputs, direction),
        cold="cold" in case,
        gate=problem.gate(direction),
        notes=peers.absent("experts", device),
    )


@each_dtype
@each_direction
@each_size(shapes.EXPERTS)
def bench_grouped_gemm(
    shape: str, direction: str, dtype: torch.dtype, device: str, backends: Callable, compare: Callable
) -> None:
    """The up projection alone, rows sorted already."""
    size = shapes.EXPERTS[shape]
    offsets = make_plan(size, False, device).offsets
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(size.tokens * size.top_k, size.hidden, generator=generator)
    b = torch.randn(size.experts, size.up_rows, size.hidden, generator=generator) * size.hidden**-0.5
    inputs = {"a": a.to(device, dtype), "b": b.to(device, dtype)}

    def on(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda a, b: (grouped_gemm(a, b, offsets, backend=backend),)

    functions = {backend: on(backend) for backend in backends("experts", dtype)}
    problem = Problem(inputs, functions | peers.present("grouped_gemm", device, offsets))
    passes = 1 if direction == "forward" else 3
    compare(
        problem.variants(direction),
        baseline="reference",
        op="grouped_gemm",
        shape=shape,
        case=direction,
        dtype=dtype,
        flops=passes * 2 * len(a) * size.hidden * size.up_rows,
        bytes=passes * (sum(x.nbytes for x in inputs.values()) + len(a) * size.up_rows * inputs["a"].element_size()),
        gate=problem.gate(direction),
    )
