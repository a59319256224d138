"""Fuzz of `linear`: any size, strides and values; spoilt shapes refused."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import Source, assert_refused, compare_runs, dtypes, fuzz, marks, resized, sizes, some
from unif2ace.ops import linear

pytestmark = marks("linear")


@fuzz
@given(rows=sizes, width=sizes, columns=sizes, dtype=dtypes, bias=st.booleans(), special=st.booleans(), data=st.data())
def test_well_formed(rows, width, columns, dtype, bias, special, data):
    source = Source(data)
    inputs = {
        "x": source.floats("x", rows, width, dtype=dtype, special=special),
        "weight": source.floats("weight", columns, width, dtype=dtype, special=special),
    }
    if bias:
        inputs["bias"] = source.floats("bias", columns, dtype=dtype, special=special)

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        return (linear(**tensors, backend=backend),)

    compare_runs(run, source, inputs, slack=1e-4)


@fuzz
@given(rows=some, width=some, columns=some, dtype=dtypes, which=st.integers(0, 2), data=st.data())
def test_malformed(rows, width, columns, dtype, which, data):
    source = Source(data)
    x, weight, bias = torch.zeros(rows, width), torch.zeros(columns, width), torch.zeros(columns)
    arguments = [x.to(dtype), weight.to(dtype), bias.to(dtype)]
    spoilt = resized(source, arguments[which])
    if which == 2 and spoilt.numel() == columns:
        return  # the same numbers in another shape
    if which < 2 and spoilt.dim() == 2 and spoilt.shape[1] == width:
        spoilt = spoilt.new_zeros(*spoilt.shape[:1], width + 1)  # another number of rows would fit
    arguments[which] = spoilt
    assert_refused("linear", *arguments)


@fuzz
@given(rows=some, width=some, columns=some, dtype=dtypes, which=st.integers(0, 2), data=st.data())
def test_malformed_backward(rows, width, columns, dtype, which, data):
    source = Source(data)
    arguments = [torch.zeros(rows, columns), torch.zeros(rows, width), torch.zeros(columns, width)]
    arguments = [x.to(dtype) for x in arguments]
    arguments[which] = resized(source, arguments[which])
    assert_refused("linear_backward", *arguments)
