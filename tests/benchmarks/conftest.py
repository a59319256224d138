"""The suite of benchmarks runs pytest within pytest; it times nothing where it takes itself for a parallel worker."""

import pytest


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark asks this variable of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
