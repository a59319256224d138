"""Shared fixtures: every test starts from the same seed and the automatic back end.

Without a CUDA device the Triton kernels run under Triton's interpreter, so that the tests of the ops reach them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch does for unif2ace.ops

from unif2ace.ops import default_backend, use_backend

# One CPU is shared by many tests: time limits per example only make tests flaky.
settings.register_profile("unif2ace", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("unif2ace")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seed 0 before each test; afterwards the default back end is what it was."""
    torch.manual_seed(0)
    before = default_backend()
    yield
    use_backend(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
