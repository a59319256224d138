"""Routing on every back end of this machine: indices equal to the reference, weights and gradients by the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import ROUTING_SMALL, RoutingShape, token_groups
from tests.oracle import (
    assert_matches_reference,
    available_backends,
    backend_cases,
    noncontiguous,
    poisoned,
    registered,
    seeded,
)
from unif2ace.errors import UserError
from unif2ace.ops import RoutingPlan, _registry, route
from unif2ace.ops.routing import grouping_plan

BACKENDS = available_backends("routing")
INDICES = ("experts", "offsets", "order", "position", "load")
VARIANTS = {
    "softmax": {},
    "softmax-raw": {"renormalize": False, "scale": 2.5},
    "sigmoid": {"scoring": "sigmoid", "scale": 2.5},
    "sigmoid-raw": {"scoring": "sigmoid", "renormalize": False},
}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_shape = pytest.mark.parametrize("shape", ROUTING_SMALL.values(), ids=ROUTING_SMALL.keys())
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
CASES = backend_cases("routing")
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
# The interpreter takes a second for each of these, and dtypes only differ in how a tile is loaded and stored.
each_case_of_gradients = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if (name, dtype) == ("triton", torch.float16) else [])
        for name, dtype in CASES
    ],
    ids=str,
)


def problem(shape: RoutingShape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, object]]:
    """Random logits, many of them tied, and the group arguments."""
    logits = torch.randn(shape.tokens, shape.experts).mul(2)
    logits[:, ::3] = logits[:, ::3].round()
    groups = token_groups(shape)
    group = None if groups is None else torch.tensor(groups, dtype=torch.int32)
    return logits.to(dtype), {"token_group": group, "group_bounds": shape.group_bounds, "top_k": shape.top_k}


def assert_same_indices(plan: RoutingPlan, expected: RoutingPlan) -> None:
    for name in INDICES:
        found, wanted = getattr(plan, name), getattr(expected, name)
        assert found.dtype == torch.int32
        assert torch.equal(found, wanted), f"{name} differs"


def definition(
    logits: list[list[float]], bounds: list[tuple[int, int]], top_k: int, scoring: str, bias: list[float], raw: bool
) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Experts, weights and logsumexp, token by token, with nothing but Python's numbers."""
    experts, weights, logsumexp = [], [], []
    for row, (low, high) in zip(logits, bounds, strict=True):
        total = sum(math.exp(x) for x in row[low:high])
        score = {
            e: math.exp(row[e]) / total if scoring == "softmax" else 1 / (1 + math.exp(-row[e]))
            for e in range(low, high)
        }
        chosen = sorted(score, key=lambda e: (-(score[e] + bias[e] if any(bias) else row[e]), e))[:top_k]
        divisor = 1.0 if raw else sum(score[e] for e in chosen)
        experts.append(chosen)
        weights.append([score[e] / divisor for e in chosen])
        logsumexp.append(math.log(total))
    return experts, weights, logsumexp


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("raw", [False, True], ids=["renormalised", "raw"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", ["one-token", "unequal-groups", "all-experts"])
@each_backend
def test_against_the_definition_token_by_token(backend: str, name: str, scoring: str, raw: bool, biased: bool):
    shape = ROUTING_SMALL[name]
    logits, groups = problem(shape)
    bias = torch.randn(shape.experts) if biased else torch.zeros(shape.experts)
    plan = route(
        logits,
        scoring=scoring,
        renormalize=not raw,
        selection_bias=bias if biased else None,
        backend=backend,
        **groups,
    )
    group = groups["token_group"].tolist() if groups["token_group"] is not None else [0] * shape.tokens
    seen = [(shape.group_bounds[g], shape.group_bounds[g + 1]) for g in group]
    experts, weights, logsumexp = definition(logits.tolist(), seen, shape.top_k, scoring, bias.tolist(), raw)
    assert plan.experts.tolist() == experts
    torch.testing.assert_close(plan.weights, torch.tensor(weights))
    torch.testing.assert_close(plan.logsumexp, torch.tensor(logsumexp))
    slots = [(e, s) for s, e in enumerate(e for row in experts for e in row)]
    assert plan.order.tolist() == [s for _, s in sorted(slots)]
    assert plan.load.tolist() == [sum(e == wanted for e, _ in slots) for wanted in range(shape.experts)]


@each_variant
@each_shape
@each_case
def test_every_back_end_gives_the_same_plan(backend: str, shape: RoutingShape, options: dict, dtype: torch.dtype):
    logits, groups = problem(shape, dtype)
    expected = route(logits, backend="reference", **groups, **options)
    slots, experts = shape.tokens * shape.top_k, shape.experts
    with registered(), poisoned(4 * slots, 4 * experts, 4 * experts + 4, 4 * shape.tokens):
        plan = route(logits, backend=backend, **groups, **options)
    assert_same_indices(plan, expected)
    assert plan.weights.dtype == plan.importance.dtype == plan.logsumexp.dtype == torch.float32


@each_variant
@each_shape
@each_case_of_gradients
def test_weights_statistics_and_gradients(backend: str, shape: RoutingShape, options: dict, dtype: torch.dtype):
    logits, groups = problem(shape)

    def run(logits: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        plan = route(logits, backend=backend, **groups, **options)
        return plan.weights, plan.importance, plan.logsumexp

    assert_matches_reference(run, {"logits": logits}, dtype, backend)


@each_backend
def test_selection_bias_moves_the_choice_but_not_the_weight(backend: str):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0])
    plan = route(logits, 2, selection_bias=bias, renormalize=False, backend=backend)
    assert plan.experts.tolist() == [[0, 3]]
    torch.testing.assert_close(plan.weights, logits.softmax(-1)[:, [0, 3]])


@each_backend
def test_gradients_with_selection_bias(backend: str):
    shape = ROUTING_SMALL["unequal-groups"]
    logits, groups = problem(shape)
    bias = torch.randn(shape.experts)

    def run(logits: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        plan = route(logits, selection_bias=bias, scoring="sigmoid", backend=backend, **groups)
        return plan.weights, plan.importance, plan.logsumexp

    assert_matches_reference(run, {"logits": logits}, torch.float32, backend)


@each_backend
def test_ties_go_to_the_lower_expert(backend: str):
    plan = route(torch.zeros(3, 6), 4, backend=backend)
    assert plan.experts.tolist() == [[0, 1, 2, 3]] * 3
    plan = route(torch.tensor([[1.0, -0.0, 0.0, 1.0, 2.0]]), 4, backend=backend)
    assert plan.experts.tolist() == [[4, 0, 3, 1]]


@each_backend
def test_all_tokens_to_one_expert(backend: str):
    logits = torch.zeros(1031, 8)
    logits[:, 5] = 9.0
    plan = route(logits, 1, backend=backend)
    assert plan.load.tolist() == [0, 0, 0, 0, 0, 1031, 0, 0]
    assert plan.offsets.tolist() == [0, 0, 0, 0, 0, 0, 1031, 1031, 1031]
    assert torch.equal(plan.order, torch.arange(1031, dtype=torch.int32))


@each_backend
def test_group_without_tokens_has_no_importance(backend: str):
    plan = route(
        torch.randn(5, 6), 2, token_group=torch.zeros(5, dtype=torch.int64), group_bounds=(0, 4, 6), backend=backend
    )
    assert plan.importance[4:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(plan.importance[:4].sum(), torch.tensor(1.0))


@each_backend
def test_extreme_logits_stay_finite(backend: str):
    logits = torch.tensor([[-3e4, -2e4, -2.5e4], [3e4, -3e4, 0.0]], requires_grad=True)
    for options in VARIANTS.values():
        plan = route(logits, 2, backend=backend, **options)
        (grad,) = torch.autograd.grad(plan.weights.sum() + plan.importance.sum() + plan.logsumexp.sum(), logits)
        assert plan.experts.tolist() == [[1, 2], [0, 2]]
        assert all(x.isfinite().all() for x in (plan.weights, plan.importance, plan.logsumexp, grad))
        if options.get("renormalize", True):
            torch.testing.assert_close(plan.weights.sum(1), torch.full((2,), options.get("scale", 1.0)))


@each_backend
def test_noncontiguous_logits(backend: str):
    logits, groups = problem(ROUTING_SMALL["unequal-groups"])
    expected = route(logits, backend=backend, **groups)
    for strided in (noncontiguous(logits), logits.t().contiguous().t()):
        plan = route(strided, backend=backend, **groups)
        assert all(torch.equal(found, wanted) for found, wanted in zip(plan, expected, strict=True))


@each_backend
def test_rows_do_not_depend_on_the_batch_around_them(backend: str):
    logits, groups = problem(ROUTING_SMALL["chunks"])
    whole = route(logits, backend=backend, **groups)
    for rows in (slice(0, 1), slice(1000, 1003), slice(17, 1500)):
        part = route(logits[rows], backend=backend, **{**groups, "token_group": groups["token_group"][rows]})
        for name in ("weights", "experts", "logsumexp"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


@given(
    tokens=st.integers(0, 70),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
)
def test_plan_invariants(tokens: int, widths: list[int], data: st.DataObject, scoring: str):
    bounds = [sum(widths[:g]) for g in range(len(widths) + 1)]
    top_k = data.draw(st.integers(1, min(widths)), label="top_k")
    generator = seeded(data.draw(st.integers(0, 1000), label="seed"))
    logits = torch.randint(-3, 4, (tokens, bounds[-1]), generator=generator).float()
    group = torch.randint(len(widths), (tokens,), generator=generator)
    options = {"token_group": group, "group_bounds": bounds, "scoring": scoring}
    expected = route(logits, top_k, backend="reference", **options)
    for backend in BACKENDS:
        plan = route(logits, top_k, backend=backend, **options)
        assert_same_indices(plan, expected)
        slots = tokens * top_k
        by_slot = plan.experts.flatten().long()
        low, high = torch.tensor(bounds)[group], torch.tensor(bounds)[group + 1]
        assert ((plan.experts >= low[:, None]) & (plan.experts < high[:, None])).all()
        assert torch.equal(plan.position[plan.order.long()], torch.arange(slots, dtype=torch.int32))
        assert (by_slot[plan.order.long()].diff() >= 0).all()
        assert torch.equal(plan.load.long(), torch.bincount(by_slot, minlength=bounds[-1]))
        assert plan.offsets[0] == 0
        assert torch.equal(plan.offsets.diff(), plan.load)
        torch.testing.assert_close(plan.weights.sum(1), torch.ones(tokens))


def test_grouping_plan_puts_sentinels_last():
    experts = torch.tensor([[2, 0], [7, 1], [0, 9]], dtype=torch.int32)
    offsets, order, position, load = grouping_plan(experts, 4)
    assert offsets.tolist() == [0, 2, 3, 4, 4]
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert position.tolist() == [3, 0, 4, 2, 1, 5]
    assert load.tolist() == [2, 1, 1, 0]


@each_variant
def test_gradcheck(options: dict):
    logits, groups = problem(RoutingShape(5, (0, 3, 7), 2), torch.float64)
    logits = (logits + 0.01 * torch.rand_like(logits)).requires_grad_(True)  # no ties: the choice must not flip

    def floats(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plan = route(logits, backend="reference", **groups, **options)
        return plan.weights, plan.importance, plan.logsumexp

    assert torch.autograd.gradcheck(floats, logits)
    assert torch.autograd.gradgradcheck(floats, logits)
    with registered():
        assert torch.autograd.gradcheck(floats, logits)


@each_backend
def test_opcheck(backend: str):
    logits, groups = problem(ROUTING_SMALL["unequal-groups"])
    bounds = list(groups["group_bounds"])
    arguments = (logits, groups["top_k"], groups["token_group"], bounds, "softmax", None, True, 1.5, True)
    torch.library.opcheck(_registry.registered(backend, "route"), arguments)
    plan = RoutingPlan(*_registry.registered(backend, "route")(*arguments))
    grads = [torch.randn_like(x) for x in (plan.weights, plan.importance, plan.logsumexp)]
    arguments = (*grads, logits, plan.experts, groups["token_group"], bounds, "softmax", True, 1.5)
    torch.library.opcheck(_registry.registered(backend, "route_backward"), arguments)


@each_backend
def test_compiles_into_one_graph(backend: str):
    logits, groups = problem(ROUTING_SMALL["unequal-groups"])
    logits.requires_grad_(True)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        plan = route(2 * logits, backend=backend, **groups)
        return plan.weights.square().sum() + plan.importance.square().sum() + plan.logsumexp.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(logits), logits)
    (expected,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(found, expected)


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(backend: str, bad: float):
    logits = torch.zeros(40, 4)
    logits[31, 2] = bad
    with pytest.raises(UserError, match="route: logits must be finite"):
        route(logits, 2, backend=backend)
    with pytest.raises(UserError, match="route: logits must be finite"):
        route(logits.requires_grad_(True), 2, backend=backend)


@each_backend
def test_nan_without_the_check_stays_inside_the_plan(backend: str):
    logits = torch.full((5, 4), math.nan)
    plan = route(logits, 2, check_finite=False, backend=backend)
    assert ((plan.experts >= 0) & (plan.experts < 4)).all()
    assert plan.offsets[-1] == 10
    assert sorted(plan.order.tolist()) == list(range(10))


@each_backend
@pytest.mark.parametrize("group", [-1, 2])
def test_token_group_out_of_range_is_refused(backend: str, group: int):
    groups = torch.tensor([0, 1, group])
    with pytest.raises(UserError, match=r"route: token_group must be 0 ?\.\. ?1"):
        route(torch.zeros(3, 4), 1, token_group=groups, group_bounds=(0, 2, 4), backend=backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(4)}, r"logits must be \[T, E\] floating point, got \[4\] float32"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, r"logits must be .* got \[3, 4\] int64"),
        ({"top_k": 0}, r"top_k must be 1 \.\. 4"),
        ({"top_k": 5}, r"top_k must be 1 \.\. 4 \(the size of the smallest group\), got 5"),
        ({"group_bounds": (0, 2, 4)}, "token_group is needed with 2 expert groups"),
        ({"group_bounds": (0, 3)}, "group_bounds must increase strictly from 0 to E = 4"),
        ({"group_bounds": (0, 2, 2, 4)}, "group_bounds must increase strictly"),
        ({"token_group": torch.zeros(2, dtype=torch.int64)}, r"token_group must be \[3\] integer, got \[2\] int64"),
        ({"token_group": torch.zeros(3)}, r"token_group must be \[3\] integer, got \[3\] float32"),
        ({"scoring": "tanh"}, "scoring must be one of softmax, sigmoid, got 'tanh'"),
        ({"selection_bias": torch.zeros(3)}, r"selection_bias must be \[4\], got \[3\] float32"),
        ({"backend": "cuda"}, "unknown back end 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], message: str):
    arguments = {"logits": torch.zeros(3, 4), "top_k": 2, **changes}
    with pytest.raises(UserError, match=message):
        route(**arguments)
