"""Every number of the 16-bit dtypes through `mix_sequences`.

With a factor of 1 it is a conversion to float32 and back: so this tests csrc/cpu/convert.h for all kernels that use it.
"""

from __future__ import annotations

import pytest
import torch

from tests.oracle import backend_cases
from unif2ace.ops import mix_sequences

CASES = [case for case in backend_cases("sequence_mix") if case[1].itemsize == 2]
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)


def bit_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit dtype, in rows of 257: no multiple of any vector."""
    patterns = torch.arange(256 * 257, dtype=torch.int32).remainder(65536).to(torch.int16)
    return patterns.view(dtype).reshape(256, 257)


def scaled(x: torch.Tensor, factor: float, backend: str) -> torch.Tensor:
    rows = torch.tensor([0, len(x)])
    return mix_sequences(x, torch.tensor([factor]), [], torch.zeros(1, 0), rows, backend=backend)


def assert_equal_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


@each_case
def test_every_number_passes_unchanged(backend: str, dtype: torch.dtype):
    x = bit_patterns(dtype)
    assert_equal_bits(scaled(x, 1.0, backend), x)


# Thirds have all mantissa bits set one way or the other; 1 + 2^-9 and 1 + 2^-12 make ties; the large and small factors
# push bfloat16 and float16 over and under their range, through the subnormals.
@pytest.mark.parametrize("factor", [1 / 3, -2 / 3, 1 + 2**-9, 1 + 2**-12, 40000.0, 3e38, 2.0**-13, 3e-6, 1e-30])
@each_case
def test_results_round_as_torch_rounds(backend: str, dtype: torch.dtype, factor: float):
    x = bit_patterns(dtype)
    assert_equal_bits(scaled(x, factor, backend), (x.float() * torch.tensor(factor)).to(dtype))
