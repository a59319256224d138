"""Shared fixtures: every test starts from the same seed and the automatic back end.

`--device cuda` moves the tests of the ops to a GPU: their tensors are made on torch's default device, and the back ends
they ask for are those of that device. Without a CUDA device the Triton kernels run under Triton's interpreter, so that
the same tests reach them.
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tests of the ops run")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False")
        torch.set_default_device(device)  # before the test files, which ask for its back ends, are read


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
