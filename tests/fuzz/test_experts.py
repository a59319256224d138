"""Fuzz of `expert_mlp` and `grouped_gemm`: empty experts, sentinels, strided weights; spoilt plans refused."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import (
    Source,
    assert_refused,
    compare_runs,
    dtypes,
    fuzz,
    marks,
    resized,
    sizes,
    some,
    spoil_one,
)
from unif2ace.ops import RoutingPlan, expert_mlp, grouped_gemm
from unif2ace.ops.experts import ACTIVATIONS, GATED
from unif2ace.ops.routing import grouping_plan

pytestmark = marks("experts")

BACKWARD = ("grad", "pre")  # arguments that only the backward of the MLP has

experts_ = st.integers(1, 6)
widths_ = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 64])


def draw_experts(source: Source, tokens: int, top_k: int, experts: int) -> Tensor:
    """Ids of any experts, few or all of them; `experts` and more are sentinels."""
    low = source.draw(st.integers(0, experts), "lowest id")
    high = source.draw(st.integers(low + 1, experts + 3), "ids below")
    return torch.randint(low, high, (tokens, top_k), generator=source.generator)


@fuzz
@given(
    tokens=sizes,
    hidden=widths_,
    inner=widths_,
    experts=experts_,
    top_k=st.integers(1, 4),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=dtypes,
    biases=st.booleans(),
    special=st.booleans(),
    data=st.data(),
)
def test_mlp_well_formed(tokens, hidden, inner, experts, top_k, activation, dtype, biases, special, data):
    source = Source(data)
    offsets, order, position, load = grouping_plan(draw_experts(source, tokens, top_k, experts), experts)
    up_rows = 2 * inner if activation in GATED else inner
    inputs = {
        "x": source.floats("x", tokens, hidden, dtype=dtype, special=special),
        "weights": source.floats("weights", tokens, top_k),
        "w_up": source.floats("w_up", experts, up_rows, hidden, dtype=dtype, scale=hidden**-0.5),
        "w_down": source.floats("w_down", experts, hidden, inner, dtype=dtype, scale=inner**-0.5),
    }
    if biases:
        inputs["b_up"] = source.floats("b_up", experts, up_rows, dtype=dtype)
        inputs["b_down"] = source.floats("b_down", experts, hidden, dtype=dtype)

    few = source.draw(st.none() | st.booleans(), "few")

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        plan = RoutingPlan(tensors.pop("weights"), None, offsets, order, position, load, None, None)
        return (expert_mlp(tensors.pop("x"), plan, **tensors, activation=activation, few=few, backend=backend),)

    compare_runs(run, source, inputs, slack=2e-3)


@fuzz
@given(
    rows=sizes,
    spare=st.integers(0, 3),
    length=widths_,
    width=widths_,
    experts=experts_,
    dtype=dtypes,
    bias=st.booleans(),
    gathered=st.booleans(),
    special=st.booleans(),
    data=st.data(),
)
def test_grouped_gemm_well_formed(rows, spare, length, width, experts, dtype, bias, gathered, special, data):
    source = Source(data)
    offsets = torch.tensor(source.cut(rows, experts, "offsets"))
    offsets = source.layout(offsets.to(source.draw(st.sampled_from([torch.int32, torch.int64]))), "offsets", False)
    count = source.draw(some, "rows of a") if gathered else rows + spare
    gather = source.integers("gather", 0, count, rows + spare) if gathered else None
    inputs = {
        "a": source.floats("a", count, length, dtype=dtype, special=special and not spare),
        "b": source.floats("b", experts, width, length, dtype=dtype, scale=length**-0.5),
    }
    if bias:
        inputs["bias"] = source.floats("bias", experts, width, dtype=dtype)

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        return (grouped_gemm(**tensors, offsets=offsets, gather=gather, backend=backend),)

    compare_runs(run, source, inputs, slack=1e-3)


def spoil_offsets(source: Source, offsets: Tensor, rows: int) -> Tensor:
    """Offsets that do not rise from 0 to at most `rows`."""
    offsets = offsets.clone()
    big = source.draw(st.sampled_from([1, 2**16, 2**30]), "by")
    place = source.draw(st.integers(0, len(offsets) - 1), "place")
    offsets[place] = -big if source.draw(st.booleans(), "negative") else rows + big
    return offsets


@fuzz
@given(
    rows=some,
    length=widths_,
    width=widths_,
    experts=experts_,
    what=st.sampled_from(["offsets", "gather", "a", "b", "bias", "grad", "shape of offsets"]),
    backward=st.booleans(),
    data=st.data(),
)
def test_grouped_gemm_malformed(rows, length, width, experts, what, backward, data):
    source = Source(data)
    arguments = {
        "grad": torch.zeros(rows, width),
        "a": torch.zeros(rows, length),
        "b": torch.zeros(experts, width, length),
        "offsets": torch.tensor(source.cut(rows, experts, "offsets"), dtype=torch.int32),
        "bias": torch.zeros(experts, width),
        "gather": torch.arange(rows, dtype=torch.int32),
    }
    if what == "offsets":
        arguments["offsets"] = spoil_offsets(source, arguments["offsets"], rows)
    elif what == "gather":
        arguments["gather"] = spoil_one(source, arguments["gather"], (-(2**31), -1, rows, 2**31 - 1))
    else:
        name = what.removeprefix("shape of ")
        spoilt = resized(source, arguments[name])
        if spoilt.numel() == arguments[name].numel() or (name == "a" and spoilt.shape[1:] == (length,)):
            return  # the same numbers in another shape, or other rows to gather from
        arguments[name] = spoilt
        backward = backward or what == "grad"
    if backward:
        assert_refused("grouped_gemm_backward", *arguments.values())
    else:
        assert_refused("grouped_gemm", *list(arguments.values())[1:])


@fuzz
@given(
    tokens=some,
    hidden=widths_,
    inner=widths_,
    experts=experts_,
    top_k=st.integers(1, 3),
    what=st.sampled_from(["offsets", "order", "position", "activation", "shape", "dtype"]),
    backward=st.booleans(),
    data=st.data(),
)
def test_mlp_malformed(tokens, hidden, inner, experts, top_k, what, backward, data):
    source = Source(data)
    slots = tokens * top_k
    offsets, order, position, _ = grouping_plan(draw_experts(source, tokens, top_k, experts), experts)
    arguments = {
        "grad": torch.zeros(tokens, hidden),
        "x": torch.zeros(tokens, hidden),
        "pre": torch.zeros(slots, inner),
        "weights": torch.ones(tokens, top_k),
        "offsets": offsets,
        "order": order,
        "position": position,
        "w_up": torch.zeros(experts, inner, hidden),
        "w_down": torch.zeros(experts, hidden, inner),
        "b_up": torch.zeros(experts, inner),
        "b_down": torch.zeros(experts, hidden),
        "activation": "gelu",
    }
    if what == "offsets":
        arguments["offsets"] = spoil_offsets(source, offsets, slots)
    elif what in ("order", "position"):
        arguments[what] = spoil_one(source, arguments[what], (-(2**31), -1, slots, 2**31 - 1))
    elif what == "activation":
        arguments["activation"] = source.draw(st.sampled_from(["", "tanh", "gelu\0", "swiglu"]), "activation")
    elif what == "dtype":
        name = source.draw(st.sampled_from(["x", "weights", "order", "w_up", "b_down"]), "name")
        arguments[name] = arguments[name].double()
    else:
        names = [name for name, x in arguments.items() if isinstance(x, Tensor) and (backward or name not in BACKWARD)]
        name = source.draw(st.sampled_from(names), "name")
        spoilt = resized(source, arguments[name])
        if spoilt.numel() == arguments[name].numel():
            return  # the same numbers in another shape
        arguments[name] = spoilt
    if backward:
        assert_refused("expert_mlp_backward", *arguments.values())
    else:
        forward = [x for name, x in arguments.items() if name not in BACKWARD]
        save, few = source.draw(st.booleans(), "save"), source.draw(st.none() | st.booleans(), "few")
        assert_refused("expert_mlp", *forward, save, few)
