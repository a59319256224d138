"""Calls of PyTorch's attention: which blocks make one call, and which kernel has answered."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.ops.attention import generation
from unif2ace.ops._sdpa import is_fused, runs_of


@pytest.mark.parametrize("dropped", [0, 3])
@pytest.mark.parametrize(("kind", "fused"), [(SDPBackend.FLASH_ATTENTION, True), (SDPBackend.MATH, False)], ids=str)
def test_results_of_fused_kernels_are_known(kind: SDPBackend, fused: bool, dropped: int):
    q = torch.randn(2, 3, 8, 16, requires_grad=True, device="cpu")
    with sdpa_kernel(kind):
        assert is_fused(torch.nn.functional.scaled_dot_product_attention(q, q, q)[:, :, dropped:]) == fused


def test_equal_blocks_in_even_distance_are_one_call():
    assert len(runs_of(generation([5] * 32, 7))) == 2
    assert len(runs_of(generation([5] * 16 + [6] * 16, 7))) == 4
    assert len(runs_of(tuple((b, b + 1, 100 * b, 100 * b + 40, False) for b in range(32)))) == 1
    # shared or overlapping keys are not one run: their gradients are added in turn
    assert len(runs_of(((0, 4, 2, 9, False), (4, 8, 2, 9, False)))) == 2
