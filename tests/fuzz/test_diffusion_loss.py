"""Fuzz of `linear_loss` and `d3diff_loss`: ignored rows, columns in ranges, values out of any range, spoilt targets."""

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
from unif2ace.ops import d3diff_loss, linear_loss
from unif2ace.ops.diffusion_loss import SCORE_COLUMNS, SCORE_WEIGHTS

pytestmark = marks("diffusion_loss")

columns_ = st.sampled_from([1, 2, 7, 16, 17, 33, 64, 257, 300, 1031])


def head(source: Source, rows: int, hidden: int, columns: int, dtype: torch.dtype, special: bool) -> dict[str, Tensor]:
    inputs = {
        "hidden": source.floats("hidden", rows, hidden, dtype=dtype, special=special),
        "weight": source.floats("weight", columns, hidden, dtype=dtype, special=special),
    }
    if source.draw(st.booleans(), "with bias"):
        inputs["bias"] = source.floats("bias", columns, dtype=dtype, special=special)
    return inputs


def draw_targets(source: Source, rows: int, start: int, end: int) -> Tensor:
    targets = torch.randint(start, end, (rows,), generator=source.generator)
    ignored = torch.rand(rows, generator=source.generator) < source.draw(st.sampled_from([0.0, 0.4, 1.0]), "ignored")
    targets[ignored] = -100
    dtype = source.draw(st.sampled_from([torch.int32, torch.int64]), "dtype of targets")
    return source.layout(targets.to(dtype), "targets")


@fuzz
@given(rows=sizes, hidden=some, columns=columns_, dtype=dtypes, special=st.booleans(), data=st.data())
def test_linear_loss(rows, hidden, columns, dtype, special, data):
    source = Source(data)
    start = source.draw(st.integers(0, columns - 1), "start")
    end = source.draw(st.integers(start + 1, columns), "end")
    targets = draw_targets(source, rows, start, end)
    row_weight = source.floats("row_weight", rows)
    inputs = head(source, rows, hidden, columns, dtype, special)

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        tensors.setdefault("bias", None)
        options = {"targets": targets, "row_weight": row_weight, "columns": (start, end)}
        return linear_loss(**tensors, **options, backend=backend)[:1]

    compare_runs(run, source, inputs, slack=2e-3 if special else 1e-4)


@fuzz
@given(rows=sizes, hidden=some, columns=columns_, dtype=dtypes, data=st.data())
def test_d3diff_loss(rows, hidden, columns, dtype, data):
    source = Source(data)
    start = source.draw(st.integers(0, columns - 1), "start")
    end = source.draw(st.integers(start + 1, columns), "end")
    options = {
        "targets": draw_targets(source, rows, start, end),
        "mask_ratio": torch.rand(rows, generator=source.generator),
        "num_image_tokens": source.draw(st.sampled_from([1, 2, 16, 256]), "num_image_tokens"),
        "code_columns": (start, end),
        "alpha": source.draw(st.sampled_from([0.0, 0.01, 1.0]), "alpha"),
        "score_weight": source.draw(st.sampled_from(SCORE_WEIGHTS), "score_weight"),
        "score_columns": source.draw(st.sampled_from(SCORE_COLUMNS), "score_columns"),
    }
    inputs = head(source, rows, hidden, columns, dtype, False)

    def run(backend: str, **tensors: Tensor) -> tuple[Tensor]:
        tensors.setdefault("bias", None)
        return (d3diff_loss(**tensors, **options, backend=backend).total,)

    compare_runs(run, source, inputs, slack=1e-3)


@fuzz
@given(
    rows=some,
    hidden=some,
    columns=columns_,
    what=st.sampled_from(
        ["targets", "columns", "mass_columns", "hidden", "weight", "bias", "row_weight", "mass_weight"]
    ),
    data=st.data(),
)
def test_malformed(rows, hidden, columns, what, data):
    source = Source(data)
    arguments = {
        "hidden": torch.zeros(rows, hidden),
        "weight": torch.zeros(columns, hidden),
        "bias": torch.zeros(columns),
        "targets": torch.zeros(rows, dtype=source.draw(st.sampled_from([torch.int32, torch.int64]))),
        "row_weight": torch.ones(rows),
        "mass_weight": torch.ones(rows),
        "columns": [0, columns],
        "mass_columns": [0, columns],
        "with_grads": source.draw(st.booleans(), "with_grads"),
    }
    if what == "targets":
        wrong = (-(2**31), -101, -99, -1, columns, 2**31 - 1)
        arguments["targets"] = spoil_one(source, arguments["targets"], wrong)
    elif what in ("columns", "mass_columns"):
        arguments[what] = source.draw(
            st.sampled_from(
                [[], [0], [0, columns, 1], [-1, columns], [0, columns + 1], [columns, 0], [-(2**63), 2**63 - 1]]
            ),
            "range",
        )
    else:
        spoilt = resized(source, arguments[what])
        if spoilt.numel() == arguments[what].numel() and what not in ("hidden", "weight"):
            return  # the same numbers in another shape
        if what == "weight" and spoilt.dim() == 2 and spoilt.shape[1] == hidden:
            spoilt = spoilt.new_zeros(0, hidden)
        arguments[what] = spoilt
    assert_refused("linear_loss", *arguments.values())
