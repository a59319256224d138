"""Fixtures of the benchmark suite: the device, and `compare`, which runs one comparison under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the benchmarks run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.exit("benchmarks: --device cuda, but torch.cuda.is_available() is False", returncode=2)
    return chosen


@pytest.fixture(scope="session")
def timer(device: str) -> timing.Timer:
    return timing.timer_for(device)


@pytest.fixture
def compare(benchmark, device: str, timer: timing.Timer) -> Callable[..., dict[str, timing.Timing]]:
    """compare(variants, baseline, **facts): time variants against each other; the result goes into the JSON file.

    `facts` (op, shape, bytes, flops ...) are stored beside the figures. pytest-benchmark keeps the record and the
    machine's description; the interleaved rounds of `timing` are the figures, since it would time one variant after
    the other.
    """

    def run(variants: dict[str, Callable[[], object]], baseline: str, **facts: object) -> dict[str, timing.Timing]:
        timings = benchmark.pedantic(timing.interleave, args=(variants, timer), rounds=1, iterations=1)
        benchmark.extra_info.update(
            facts,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            baseline=baseline,
            seconds={name: t.median for name, t in timings.items()},
            spread={name: round(t.spread, 3) for name, t in timings.items()},
            ratio={name: timings[baseline].median / t.median for name, t in timings.items() if name != baseline},
        )
        return timings

    return run
