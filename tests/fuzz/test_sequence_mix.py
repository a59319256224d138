"""Fuzz of `mix_sequences`: ragged and empty sequences, strided streams, spoilt offsets refused."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.strategies import Source, assert_refused, compare_runs, dtypes, fuzz, marks, resized, sizes, some
from unif2ace.ops import mix_sequences

pytestmark = marks("sequence_mix")


def numbers(source: Source, rows: int, hidden: int, batch: int, count: int, dtype: torch.dtype, special: bool):
    """x, the J streams and the factors, by name."""
    inputs = {"x": source.floats("x", rows, hidden, dtype=dtype, special=special)}
    inputs |= {f"s{j}": source.floats(f"s{j}", rows, hidden, dtype=dtype, special=special) for j in range(count)}
    factors = source.draw(st.sampled_from([torch.float32, dtype]), "dtype of factors")
    inputs["scale"] = source.floats("scale", batch, dtype=factors)
    inputs["coefficients"] = source.floats("coefficients", batch, count, dtype=factors)
    return inputs


@fuzz
@given(
    rows=sizes,
    hidden=sizes,
    batch=st.integers(1, 5),
    count=st.integers(0, 3),
    spare=st.integers(0, 3),
    dtype=dtypes,
    special=st.booleans(),
    data=st.data(),
)
def test_well_formed(rows, hidden, batch, count, spare, dtype, special, data):
    source = Source(data)
    offsets = source.layout(torch.tensor(source.cut(rows, batch, "row_offsets")), "row_offsets", expand=False)
    inputs = numbers(source, rows + spare, hidden, batch, count, dtype, special)
    if source.draw(st.booleans(), "with residual"):
        inputs["residual"] = source.floats("residual", rows + spare, hidden, dtype=dtype, special=special)
    if source.draw(st.booleans(), "with layer_scale"):
        inputs["layer_scale"] = source.floats("layer_scale", 1)
    if special and spare:
        # Rows of no sequence: the reference multiplies them by zero, a kernel need not read them.
        for name in ("x", *(f"s{j}" for j in range(count))):
            inputs[name] = inputs[name].clone()
            inputs[name][rows:] = 0.0

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        features = [tensors.pop(f"s{j}") for j in range(count)]
        return (mix_sequences(**tensors, features=features, row_offsets=offsets, backend=backend),)

    compare_runs(run, source, inputs, slack=1e-4)


@fuzz
@given(
    rows=sizes,
    hidden=sizes,
    batch=st.integers(1, 5),
    count=st.integers(0, 3),
    more=st.integers(1, 9),
    dtype=dtypes,
    data=st.data(),
)
def test_shared_features(rows, hidden, batch, count, more, dtype, data):
    source = Source(data)
    cut = source.cut(rows, batch, "row_offsets")
    offsets = source.layout(torch.tensor(cut), "row_offsets", expand=False)
    inputs = numbers(source, rows, hidden, batch, count, dtype, False)
    lengths = [end - start for start, end in pairwise(cut)]
    shared = max(lengths) + more
    inputs |= {f"s{j}": source.floats(f"shared{j}", shared, hidden, dtype=dtype) for j in range(count)}
    starts = [source.draw(st.integers(0, shared - length), "start") for length in lengths]
    feature_starts = source.layout(torch.tensor(starts), "feature_starts", expand=False)

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        features = [tensors.pop(f"s{j}") for j in range(count)]
        options = {"row_offsets": offsets, "feature_starts": feature_starts, "backend": backend}
        return (mix_sequences(**tensors, features=features, **options),)

    compare_runs(run, source, inputs, slack=1e-4)


def spoil_offsets(source: Source, offsets: list[int], rows: int) -> Tensor:
    """Offsets that do not rise from 0 to at most `rows`."""
    kind = source.draw(st.sampled_from(["start", "end", "fall"]), "spoilt offsets")
    big = source.draw(st.sampled_from([1, 2**16, 2**30]), "by")
    if kind == "start":
        offsets[0] += source.draw(st.sampled_from([-big, big]), "start")
    elif kind == "end":
        offsets[-1] = rows + big
    else:
        offsets[source.draw(st.integers(1, len(offsets) - 1), "place")] = -big
    return torch.tensor(offsets, dtype=torch.int32)


@fuzz
@given(
    rows=some,
    hidden=some,
    batch=st.integers(1, 4),
    count=st.integers(0, 2),
    what=st.sampled_from(
        ["offsets", "dtype", "x", "scale", "features", "coefficients", "residual", "layer_scale", "feature_starts"]
    ),
    backward=st.booleans(),
    data=st.data(),
)
def test_malformed(rows, hidden, batch, count, what, backward, data):
    source = Source(data)
    cut = source.cut(rows, batch, "row_offsets")
    arguments = {
        "x": torch.zeros(rows, hidden),
        "scale": torch.zeros(batch),
        "features": [torch.zeros(rows, hidden) for _ in range(count)],
        "coefficients": torch.zeros(batch, count),
        "row_offsets": torch.tensor(cut, dtype=torch.int32),
        "residual": torch.zeros(rows, hidden),
        "layer_scale": torch.ones(1),
        "feature_starts": None,
    }
    if what == "offsets":
        arguments["row_offsets"] = spoil_offsets(source, cut, rows)
    elif what == "dtype":
        arguments["row_offsets"] = arguments["row_offsets"].long()
    elif what == "layer_scale":
        arguments["layer_scale"] = torch.ones(source.draw(st.sampled_from([0, 2]), "length"))
    elif what == "feature_starts":
        bad = source.draw(st.sampled_from([-(2**31), -1, rows + 1, 2**31 - 1]), "start")
        arguments["features"] = [torch.zeros(rows, hidden)]
        arguments["coefficients"] = torch.zeros(batch, 1)
        arguments["feature_starts"] = torch.full((batch,), bad, dtype=torch.int32)
        backward = False  # has no such argument
    elif what == "features":
        arguments["features"].append(torch.zeros(rows, hidden + 1))
    else:
        arguments[what] = resized(source, arguments[what])
    if backward:
        grad = torch.zeros(rows, hidden)
        if what == "residual":
            grad = arguments["residual"]
        del arguments["residual"], arguments["feature_starts"]
        assert_refused("mix_sequences_backward", grad, *arguments.values())
    else:
        assert_refused("mix_sequences", *arguments.values())
