"""Fuzz of `rotate_heads`: any number of heads and dimensions, strided projections, spoilt shapes refused."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import Source, assert_refused, compare_runs, dtypes, fuzz, marks, resized, sizes, some
from unif2ace.ops import rotate_heads

pytestmark = marks("rotary")


@fuzz
@given(tokens=sizes, heads=st.integers(0, 4), dim=some, dtype=dtypes, special=st.booleans(), data=st.data())
def test_well_formed(tokens, heads, dim, dtype, special, data):
    source = Source(data)
    half = source.draw(st.integers(0, dim // 2), "half")
    # Differences of equal numbers are 0 / sqrt(eps): a large eps keeps the gradient from amplifying their rounding.
    eps = source.draw(st.sampled_from([1e-2, 1.0]), "eps")
    inputs = {
        "x": source.floats("x", tokens, heads, dim, dtype=dtype, special=special),
        "weight": source.floats("weight", dim, dtype=dtype),
        "bias": source.floats("bias", dim, dtype=dtype),
    }
    angles = torch.randn(tokens, half, generator=source.generator)
    cos, sin = (source.layout(x.to(dtype), "angles") for x in (angles.cos(), angles.sin()))

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        dtype = tensors["x"].dtype
        return (rotate_heads(**tensors, cos=cos.to(dtype), sin=sin.to(dtype), eps=eps, backend=backend),)

    compare_runs(run, source, inputs, slack=1e-3)


@fuzz
@given(
    tokens=some,
    heads=st.integers(1, 3),
    dim=some.filter(lambda n: n > 1),
    what=st.integers(0, 4),
    backward=st.booleans(),
    data=st.data(),
)
def test_malformed(tokens, heads, dim, what, backward, data):
    source = Source(data)
    half = dim // 2
    arguments = [torch.zeros(tokens, heads, dim), torch.zeros(dim), torch.zeros(dim)]
    arguments += [torch.zeros(tokens, half), torch.zeros(tokens, half)]
    grad = arguments[0]
    spoilt = resized(source, arguments[what])
    if spoilt.numel() == arguments[what].numel() or (what == 0 and spoilt.dim() == 3):
        return  # the same numbers in another shape, or other heads, which only the gradient notices
    arguments[what] = spoilt
    if backward:
        assert_refused("rotate_heads_backward", grad, *arguments, 1e-5)
    else:
        assert_refused("rotate_heads", *arguments, 1e-5)
