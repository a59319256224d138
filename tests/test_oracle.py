"""The oracle itself: it must refuse what is wrong, or green tests mean nothing."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracle import assert_close, noncontiguous, poisoned, tolerance


def test_accepts_rounding_and_refuses_twice_and_more():
    truth = torch.rand(1000, dtype=torch.float64)
    plain = truth.bfloat16()
    assert_close("rounded", truth.bfloat16(), truth, plain)
    allowed = tolerance(truth, plain, torch.bfloat16)
    wrong = plain.clone()
    wrong[17] += 4 * allowed
    with pytest.raises(AssertionError, match=r"wrong: error .* at flat index 17"):
        assert_close("wrong", wrong, truth, plain)


def test_tolerance_scales_with_the_dtype():
    truth = torch.rand(1000, dtype=torch.float64)
    sizes = [tolerance(truth, truth.to(d), d) for d in (torch.float32, torch.float16, torch.bfloat16)]
    assert 0 < sizes[0] < 1e-6 < sizes[1] < sizes[2] < 0.05


def test_refuses_nan_shape_and_dtype():
    truth = torch.zeros(3, dtype=torch.float64)
    plain = truth.float()
    with pytest.raises(AssertionError, match="1 of 3 elements are NaN"):
        assert_close("nan", torch.tensor([0.0, math.nan, 0.0]), truth, plain)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("shape", torch.zeros(4), truth, plain)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close("dtype", plain.half(), truth, plain)


def test_poison_shows_what_nobody_wrote():
    with poisoned(400):
        assert torch.empty(100).isnan().all()
        assert (torch.empty(100, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_noncontiguous_keeps_the_values():
    x = torch.randn(3, 4)
    strided = noncontiguous(x)
    assert not strided.is_contiguous()
    assert torch.equal(strided, x)
