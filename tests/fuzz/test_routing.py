"""Fuzz of `route`: identical plans, weights and gradients as the reference has them, spoilt plans refused."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import (
    Source,
    assert_agrees,
    assert_refused,
    attempt,
    compare_runs,
    dtypes,
    fuzz,
    marks,
    refuse_alike,
    resized,
    spoil_one,
)
from unif2ace.ops import route

pytestmark = marks("routing")

tokens_ = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 33, 255, 256, 257, 300])
widths_ = st.lists(st.integers(1, 19), min_size=1, max_size=4)
SCORINGS = ("softmax", "sigmoid")


def bounds_of(widths: list[int]) -> list[int]:
    return [sum(widths[:g]) for g in range(len(widths) + 1)]


def options_of(source: Source, tokens: int, widths: list[int]) -> dict[str, object]:
    """Everything but the logits. Biases are 0 or far apart: where they decide, rounding of a score does not."""
    options = {
        "top_k": source.draw(st.integers(1, min(widths)), "top_k"),
        "group_bounds": bounds_of(widths),
        "scoring": source.draw(st.sampled_from(SCORINGS), "scoring"),
        "renormalize": source.draw(st.booleans(), "renormalize"),
        "scale": source.draw(st.sampled_from([1.0, 2.5, -1.0, 0.0]), "scale"),
    }
    if len(widths) > 1 or source.draw(st.booleans(), "with groups"):
        options["token_group"] = source.integers("token_group", 0, len(widths), tokens)
    if source.draw(st.booleans(), "with bias"):
        order = torch.randperm(sum(widths), generator=source.generator)
        options["selection_bias"] = source.layout(4.0 * order.float(), "bias", expand=False)
    return options


def assert_plan(plan, tokens: int, options: dict[str, object]) -> None:
    """What holds whatever the logits are."""
    experts, slots = options["group_bounds"][-1], tokens * options["top_k"]
    group = options.get("token_group", torch.zeros(tokens, dtype=torch.int64)).long()
    bounds = torch.tensor(options["group_bounds"])
    assert ((plan.experts >= bounds[group][:, None]) & (plan.experts < bounds[group + 1][:, None])).all()
    assert all(len(set(row)) == len(row) for row in plan.experts.tolist())
    assert torch.equal(plan.order.long().sort().values, torch.arange(slots))
    assert torch.equal(plan.position[plan.order.long()].long(), torch.arange(slots))
    assert torch.equal(plan.load.long(), torch.bincount(plan.experts.flatten().long(), minlength=experts))
    assert plan.offsets.tolist() == [0, *plan.load.cumsum(0).tolist()]


@fuzz
@given(tokens=tokens_, widths=widths_, dtype=dtypes, special=st.booleans(), data=st.data())
def test_well_formed(tokens, widths, dtype, special, data):
    source = Source(data)
    logits = source.floats("logits", tokens, sum(widths), dtype=dtype, special=special)
    options = options_of(source, tokens, widths)
    found = attempt(lambda: route(logits, **options, backend="native"))
    wanted = attempt(lambda: route(logits, **options, backend="reference"))
    if refuse_alike(found, wanted):
        assert not logits.isfinite().all()
        return
    assert_plan(found, tokens, options)
    for name in ("experts", "offsets", "order", "position", "load"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name

    def floats(logits: Tensor, backend: str) -> tuple[Tensor, ...]:
        plan = route(logits, **options, backend=backend)
        return plan.weights, plan.importance, plan.logsumexp

    # Where exp(x - logsumexp) has lost its digits, PyTorch's gradient of logsumexp is wrong, even in float64.
    gradients = not (logits.abs() > 1e6).any()
    compare_runs(floats, source, {"logits": logits}, gradients=gradients, slack=1e-5)


@fuzz
@given(tokens=tokens_, widths=widths_, dtype=dtypes, data=st.data())
def test_unchecked_values_stay_inside_the_plan(tokens, widths, dtype, data):
    source = Source(data)
    logits = source.floats("logits", tokens, sum(widths), dtype=dtype, special=True)
    options = options_of(source, tokens, widths)
    if "selection_bias" in options and source.draw(st.booleans(), "bad bias"):
        bias = options["selection_bias"].clone()
        bias[0] = source.draw(st.sampled_from([math.nan, math.inf, -math.inf]), "value")
        options["selection_bias"] = bias
    plan = route(logits, **options, check_finite=False, backend="native")
    assert_plan(plan, tokens, options)
    plain = route(logits, **options, check_finite=False, backend="reference")
    truth = route(logits.double(), **options, check_finite=False, backend="reference")
    assert_agrees("logsumexp", plan.logsumexp, plain.logsumexp, truth.logsumexp, 1e-5)


def registered_arguments(source: Source, tokens: int, widths: list[int]) -> dict[str, object]:
    """Arguments of the registered `route`, in order."""
    bounds = bounds_of(widths)
    return {
        "logits": torch.randn(tokens, bounds[-1], generator=source.generator),
        "top_k": source.draw(st.integers(1, min(widths)), "top_k"),
        "token_group": torch.randint(len(widths), (tokens,), generator=source.generator, dtype=torch.int32),
        "group_bounds": bounds,
        "scoring": source.draw(st.sampled_from(SCORINGS), "scoring"),
        "selection_bias": torch.zeros(bounds[-1]),
        "renormalize": source.draw(st.booleans(), "renormalize"),
        "scale": 1.0,
        "check_finite": False,
    }


def spoil_bounds(source: Source, bounds: list[int]) -> list[int]:
    """Bounds that do not rise from 0 to the number of experts."""
    kind = source.draw(st.sampled_from(["start", "end", "equal", "huge", "negative", "none"]), "spoilt bounds")
    if kind == "none":
        return bounds[: source.draw(st.integers(0, 1), "left")]
    if kind == "start":
        return [bounds[0] + source.draw(st.sampled_from([-1, 1, 2**40]), "by"), *bounds[1:]]
    if kind == "end":
        return [*bounds[:-1], bounds[-1] + source.draw(st.sampled_from([-1, 1, 2**31, 2**62]), "by")]
    wrong = {"equal": 0, "huge": source.draw(st.sampled_from([2**31, 2**63 - 1]), "huge"), "negative": -(2**63)}
    return [bounds[0], wrong[kind], *bounds[1:]]


@fuzz
@given(
    tokens=tokens_.filter(bool),
    widths=widths_,
    what=st.sampled_from(["top_k", "group", "no group", "bounds", "scoring", "bias", "logits", "shape of group"]),
    data=st.data(),
)
def test_malformed(tokens, widths, what, data):
    source = Source(data)
    arguments = registered_arguments(source, tokens, widths)
    if what == "top_k":
        arguments["top_k"] = source.draw(st.sampled_from([0, -1, min(widths) + 1, 2**31, 2**62, -(2**63)]), "top_k")
    elif what == "group":
        wrong = (-(2**31), -1, len(widths), 2**31 - 1)
        arguments["token_group"] = spoil_one(source, arguments["token_group"], wrong)
    elif what == "no group":
        arguments["token_group"] = None if len(widths) > 1 else torch.zeros(tokens, dtype=torch.int64)
    elif what == "bounds":
        arguments["group_bounds"] = spoil_bounds(source, arguments["group_bounds"])
    elif what == "scoring":
        arguments["scoring"] = source.draw(st.sampled_from(["", "tanh", "softmax " * 100, "sigmoid\0"]), "scoring")
    else:
        name = {"bias": "selection_bias", "logits": "logits", "shape of group": "token_group"}[what]
        arguments[name] = resized(source, arguments[name])
        if arguments[name].numel() == source_size(what, tokens, widths):
            return  # the same numbers in another shape are the same argument
    assert_refused("route", *arguments.values())


def source_size(what: str, tokens: int, widths: list[int]) -> int:
    return {"bias": sum(widths), "logits": -1, "shape of group": tokens}[what]


@fuzz
@given(
    tokens=tokens_.filter(bool),
    widths=widths_,
    what=st.sampled_from(["experts", "group", "bounds", "shape"]),
    data=st.data(),
)
def test_malformed_backward(tokens, widths, what, data):
    source = Source(data)
    forward = registered_arguments(source, tokens, widths)
    bounds, top_k = forward["group_bounds"], forward["top_k"]
    group = forward["token_group"].long()
    arguments = {
        "grad_weights": torch.ones(tokens, top_k),
        "grad_importance": torch.ones(bounds[-1]),
        "grad_logsumexp": torch.ones(tokens),
        "logits": forward["logits"],
        "experts": (torch.tensor(bounds)[group][:, None] + torch.arange(top_k)).int(),
        **{name: forward[name] for name in ("token_group", "group_bounds", "scoring", "renormalize", "scale")},
    }
    if what == "experts":
        wrong = (-(2**31), -1, bounds[-1], 2**31 - 1)
        arguments["experts"] = spoil_one(source, arguments["experts"], wrong)
    elif what == "group":
        arguments["token_group"] = spoil_one(source, arguments["token_group"], (-1, len(widths), 2**31 - 1))
    elif what == "bounds":
        arguments["group_bounds"] = spoil_bounds(source, bounds)
    else:
        name = source.draw(st.sampled_from(["grad_weights", "grad_importance", "grad_logsumexp", "experts"]), "name")
        spoilt = resized(source, arguments[name])
        if spoilt.numel() == arguments[name].numel():
            return
        arguments[name] = spoilt
    assert_refused("route_backward", *arguments.values())
