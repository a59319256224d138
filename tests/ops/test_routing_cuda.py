"""csrc/cuda/routing.cu on the emulator: rows with the bits of the CPU kernels, and the promises of a GPU kernel."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import ROUTING_SMALL, RoutingShape, token_groups
from tests import emulated
from tests.bits import needs_native
from tests.oracle import noncontiguous, poisoned
from unif2ace import native
from unif2ace.ops import RoutingPlan

pytestmark = [
    needs_native,
    pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or ""),
]

SHAPES = {
    **{name: shape for name, shape in ROUTING_SMALL.items() if name not in ("primes", "chunks", "many-experts")},
    "passes": RoutingShape(1301, (0, 8, 16), 4),  # three times 256 tokens for two blocks
    "many-experts": RoutingShape(19, (0, 257), 8),
    "widest": RoutingShape(10, (0, 512), 16),
    "many-groups": RoutingShape(150, tuple(range(0, 101, 2)), 2),
}


@pytest.fixture
def cuda() -> SimpleNamespace:
    native.load()
    ops = emulated.load("routing", "route", "route_backward")
    ops.setup(2, 0)
    return ops


def problem(shape: RoutingShape, dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, object]:
    """Arguments of the registered `route`, in order; many logits are tied."""
    logits = torch.randn(shape.tokens, shape.experts).mul(2)
    logits[:, ::3] = logits[:, ::3].round()
    groups = token_groups(shape)
    if groups is not None:
        groups = torch.tensor(groups, dtype=torch.int32)[torch.randperm(shape.tokens)]
    arguments = {
        "logits": logits.to(dtype),
        "top_k": shape.top_k,
        "token_group": groups,
        "group_bounds": list(shape.group_bounds),
        "scoring": "softmax",
        "selection_bias": None,
        "renormalize": True,
        "scale": 1.5,
        "check_finite": False,
    }
    return {**arguments, **changes}


def run(ops: object, arguments: dict[str, object]) -> tuple[RoutingPlan, torch.Tensor]:
    """The plan, and the gradient for cotangents that depend on the sizes alone."""
    plan = RoutingPlan(*ops.route(*arguments.values()))
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator) for y in (plan.weights, plan.importance, plan.logsumexp)]
    names = ("token_group", "group_bounds", "scoring", "renormalize", "scale")
    rest = [arguments[name] for name in names]
    return plan, ops.route_backward(*grads, arguments["logits"], plan.experts, *rest)


def assert_same(found: RoutingPlan, wanted: RoutingPlan) -> None:
    """All fields but importance bit for bit: its sum over the tokens runs in another order."""
    for name, one, other in zip(RoutingPlan._fields, found, wanted, strict=True):
        if name == "importance":
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(one, other), name


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", SHAPES)
def test_bits_of_the_cpu_kernels(cuda, name: str, scoring: str, renormalize: bool, biased: bool):
    shape = SHAPES[name]
    bias = torch.randn(shape.experts) if biased else None
    arguments = problem(shape, scoring=scoring, renormalize=renormalize, selection_bias=bias)
    with poisoned():
        plan, grad = run(cuda, arguments)
    wanted, wanted_grad = run(torch.ops.unif2ace_native, arguments)
    assert_same(plan, wanted)
    assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["unequal-groups", "passes"])
def test_bits_in_other_dtypes(cuda, name: str, dtype: torch.dtype):
    arguments = problem(SHAPES[name], dtype)
    plan, grad = run(cuda, arguments)
    wanted, wanted_grad = run(torch.ops.unif2ace_native, arguments)
    assert_same(plan, wanted)
    assert torch.equal(grad, wanted_grad)


def test_order_of_threads_and_number_of_blocks(cuda):
    """Nothing depends on the order of the threads, and only the bits of importance on the number of blocks."""
    arguments = problem(SHAPES["passes"])
    first, first_grad = run(cuda, arguments)
    for multiprocessors, backwards in ((2, 1), (1, 0), (5, 1), (100, 0)):
        cuda.setup(multiprocessors, backwards)
        plan, grad = run(cuda, arguments)
        assert_same(plan, first)
        assert torch.equal(grad, first_grad)
        if multiprocessors == 2:
            assert torch.equal(plan.importance, first.importance)


@pytest.mark.parametrize("name", ["no-token", "one-token", "passes", "widest"])
def test_one_launch_in_each_direction(cuda, name: str):
    before = cuda.launches()
    run(cuda, problem(SHAPES[name]))
    assert cuda.launches() - before == (1 if name == "no-token" else 2)


def test_strided_logits_and_gradients(cuda):
    arguments = problem(SHAPES["unequal-groups"])
    wanted, wanted_grad = run(cuda, arguments)
    for strided in (noncontiguous(arguments["logits"]), arguments["logits"].t().contiguous().t()):
        plan, grad = run(cuda, {**arguments, "logits": strided})
        assert all(torch.equal(one, other) for one, other in zip(plan, wanted, strict=True))
        assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_logits_that_are_not_finite_stay_inside_the_plan(cuda, bad: float, biased: bool):
    shape = SHAPES["unequal-groups"]
    arguments = problem(shape, selection_bias=torch.full((shape.experts,), bad) if biased else None)
    arguments["logits"][::2] = bad
    arguments["logits"][1::2, ::2] = bad
    plan, _ = run(cuda, arguments)
    bounds, group = torch.tensor(shape.group_bounds), arguments["token_group"].long()
    assert ((plan.experts >= bounds[group][:, None]) & (plan.experts < bounds[group + 1][:, None])).all()
    assert all(len(set(row)) == shape.top_k for row in plan.experts.tolist())
    assert torch.equal(plan.order.sort().values, torch.arange(shape.tokens * shape.top_k, dtype=torch.int32))
    arguments["check_finite"] = True
    with pytest.raises(RuntimeError, match=r"^route: logits must be finite .* which token 0 violates"):
        cuda.route(*arguments.values())


def test_not_a_number_is_chosen_first_whatever_its_bits(cuda):
    """The NaN of all ones would have the key of a taken column."""
    logits = torch.zeros(3, 4)
    logits.view(torch.int32)[1, 2] = -1
    arguments = {**problem(RoutingShape(3, (0, 4), 2)), "logits": logits}
    for ops in (cuda, torch.ops.unif2ace_native, torch.ops.unif2ace_reference):
        assert ops.route(*arguments.values())[1].tolist() == [[0, 1], [2, 0], [0, 1]]


@pytest.mark.parametrize("group", [-(2**31), -1, 3, 2**31 - 1])
def test_group_out_of_range_counts_as_the_nearest(cuda, group: int):
    arguments = problem(SHAPES["unequal-groups"])
    nearest = arguments["token_group"].clone()
    arguments["token_group"][30], nearest[30] = group, 0 if group < 0 else 2
    plan, grad = run(cuda, arguments)
    wanted, wanted_grad = run(cuda, {**arguments, "token_group": nearest})
    assert_same(plan, wanted)
    assert torch.equal(grad, wanted_grad)
    with pytest.raises(RuntimeError, match=r"^route: .* token_group 0..2, which token 30 violates"):
        cuda.route(*{**arguments, "check_finite": True}.values())


def test_experts_out_of_range_are_harmless_in_the_backward(cuda):
    arguments = problem(SHAPES["unequal-groups"])
    experts = torch.full((61, 3), 2**31 - 1, dtype=torch.int32)
    experts[::2] = -(2**31)
    rest = [arguments[name] for name in ("token_group", "group_bounds", "scoring", "renormalize", "scale")]
    grads = [torch.ones(61, 3), torch.ones(31), torch.ones(61)]
    assert cuda.route_backward(*grads, arguments["logits"], experts, *rest).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (RoutingShape(3, (0, 513), 2), r"^route: the number of experts must be 1\.\.512, got 513"),
        (RoutingShape(3, (0, 32), 17), r"^route: the CUDA kernels take top_k up to 16, got 17"),
    ],
)
def test_more_than_a_team_can_hold_is_refused(cuda, shape: RoutingShape, message: str):
    with pytest.raises(RuntimeError, match=message):
        cuda.route(*problem(shape).values())
