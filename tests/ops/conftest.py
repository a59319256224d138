"""Fixtures that several op tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle


@pytest.fixture
def fast_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's flash kernels for CPU take an exponential that is 20 units in the last place wide: allow for it."""
    rule = oracle.tolerance

    def tolerance(truth: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
        return rule(truth, plain, dtype) + 20 * 2.0**-24 * truth.abs().max().item()

    monkeypatch.setattr(oracle, "tolerance", tolerance)
