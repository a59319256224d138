"""Options and fixtures of the benchmark suite.

A benchmark file parametrises over the names of its table in `benchmarks.shapes`, under the argument name `shape`, asks
`backends(op, dtype)` who can run, and hands one call per variant to `compare`. Which shapes run is decided here: those
of `shapes.SHORT`, on a GPU in bfloat16 alone; those named by `--shapes`; or all with `--full`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache, partial

import pytest
import torch

from benchmarks import machine, shapes, timing
from benchmarks.ceilings import Ceilings
from unif2ace.evaluation import tracing
from unif2ace.memory import keep_freed_memory
from unif2ace.ops import BACKENDS, _registry

_STARTED = pytest.StashKey[float]()
PEERS = "peers"  # in --backends: the variants that are not ours, whose names hold a colon ("torch: grouped_mm")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unif2ace benchmarks")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the benchmarks run")
    group.addoption("--full", action="store_true", help="every shape, not only the short list of benchmarks/shapes.py")
    group.addoption("--shapes", type=_names, default=[], metavar="NAME,...", help="only these shapes")
    group.addoption(
        "--backends", type=_names, default=[], metavar="NAME,...", help=f"only these back ends ('{PEERS}': the others')"
    )
    group.addoption("--seconds", type=float, metavar="S", help="start no further benchmark after S seconds")
    group.addoption("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    group.addoption("--trace-file", metavar="PATH", help="write a Chrome trace with one call of every variant")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()
    keep_freed_memory()
    threads = config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the chosen shapes; a benchmark without a shape always runs."""
    named, full, device = (config.getoption(name) for name in ("--shapes", "--full", "--device"))

    def parameters(item: pytest.Item) -> dict[str, object]:
        return item.callspec.params if hasattr(item, "callspec") else {}

    def shape_of(item: pytest.Item) -> str | None:
        return parameters(item).get("shape")

    def chosen(item: pytest.Item) -> bool:
        shape = shape_of(item)
        if device == "cuda" and "cold" in parameters(item).get("case", ""):
            return False  # every measurement on a GPU is cold
        if named:
            return shape is None or shape in named
        if shape is None or full:
            return device == "cuda" or shape not in shapes.GPU_ONLY
        short = shapes.SHORT[device].get(item.path.stem.removeprefix("bench_"))
        dtype = parameters(item).get("dtype", torch.bfloat16)
        return (short is None or shape in short) and (device == "cpu" or dtype == torch.bfloat16)

    known = list(dict.fromkeys(shape for item in items if (shape := shape_of(item)) is not None))
    for name in named:
        if name not in known:
            raise pytest.UsageError(f"bench: expected shapes among {', '.join(known)}; got {name!r}")
    kept = [item for item in items if chosen(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - item.config.stash[_STARTED] > limit:
        pytest.skip("no time left")


def is_chosen(variant: str, wanted: list[str]) -> bool:
    """Does `--backends` ask for this variant?"""
    return not wanted or variant in wanted or (PEERS in wanted and ":" in variant)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the inputs belong: "cpu" or "cuda"."""
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.exit("benchmarks: --device cuda, but torch.cuda.is_available() is False", returncode=2)
    return chosen


@pytest.fixture(scope="session")
def backends(request: pytest.FixtureRequest, device: str) -> Callable[[str, torch.dtype], list[str]]:
    """backends(op, dtype): the names of ours that run this op here and were asked for; the reference always."""
    wanted = request.config.getoption("--backends")

    def available(op: str, dtype: torch.dtype) -> list[str]:
        named = [b for b in BACKENDS if b == "reference" or is_chosen(b, wanted)]
        return [b for b in named if _registry.why_not(op, b, device, (dtype,)) is None]

    return available


@pytest.fixture(scope="session")
def ceilings(device: str) -> Ceilings:
    """Bandwidth and product rates of this session."""
    return Ceilings(device)


@pytest.fixture(scope="session")
def facts(device: str) -> dict[str, object]:
    """Commit, date and machine of this session."""
    return machine.facts(device)


@pytest.fixture(scope="session")
def clock_for(device: str) -> Callable[[bool], timing.Clock]:
    """clock_for(cold); each is made once and when first asked for, since a cold one holds a large buffer."""
    return cache(partial(timing.clock_for, device))


@pytest.fixture(scope="session")
def trace(request: pytest.FixtureRequest) -> list[tracing.Event]:
    """Events of every traced call; written as one file when the session ends."""
    events: list[tracing.Event] = []
    yield events
    path = request.config.getoption("--trace-file")
    if path is not None and events:
        tracing.write_trace(path, events)


def check(names: Iterable[str], gate: Callable[[str], None]) -> None:
    """Let every variant through the gate; AssertionError with the name of the first that is wrong."""
    for name in names:
        try:
            gate(name)
        except AssertionError as error:
            raise AssertionError(f"{name} is wrong: {error}") from error


@pytest.fixture
def compare(request, benchmark, device, clock_for, ceilings, facts, trace) -> Callable[..., dict[str, timing.Timing]]:
    """Check every variant, then time them against each other; the result goes into pytest-benchmark's JSON file.

    pytest-benchmark keeps the record. It would time one variant after the other, so the figures are those of the
    interleaved rounds, under "extra_info"; its own "stats" time the comparison as a whole.
    """

    def run(
        variants: dict[str, Callable[[], object]],
        *,
        baseline: str,
        op: str,
        shape: str,
        case: str,
        bytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype | None = None,
        cold: bool = False,
        gate: Callable[[str], None] | None = None,
        notes: dict[str, str] | None = None,
        items: tuple[float, str] | None = None,
    ) -> dict[str, timing.Timing]:
        """One row of the table per variant.

        Args:
            variants: name -> call. Names are back ends, or peers as "library: what".
            baseline: the variant that ratios are taken against; it is not gated.
            op, shape, case: what is timed, e.g. "routing", "train", "forward".
            bytes, flops: what the *algorithm* needs, inputs and outputs passed once; the same for every variant.
            dtype: of the operands; chooses the ceiling for `flops`.
            cold: flush the caches before every call.
            gate: gate(name) raises AssertionError where the variant is wrong. It runs for every variant but the
                baseline before anything is timed; a wrong variant leaves the whole comparison without figures.
            notes: variant -> remark, printed below the table.
            items: (amount, unit) that one call makes, such as (16, "faces"); the table then shows a rate.
        """
        asked = request.config.getoption("--backends")
        variants = {name: call for name, call in variants.items() if name == baseline or is_chosen(name, asked)}
        dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
        what = {"op": op, "shape": shape, "case": case, "dtype": dtype_name}
        request.node.user_properties.append(("benchmark", what))  # names the row where it stays without figures
        if gate is not None:
            check((name for name in variants if name != baseline), gate)
        clock = clock_for(cold)
        timings = benchmark.pedantic(timing.interleave, args=(variants, clock), rounds=1, iterations=1)
        tracing_asked, peaks = request.config.getoption("--trace-file") is not None, {}
        for name, call in variants.items():
            if device == "cpu" or tracing_asked:
                events = tracing.trace_call(call, f"{op} {shape} {case} {dtype_name or ''}: {name}")
                trace.extend(events if tracing_asked else ())
            peaks[name] = tracing.cuda_peak_bytes(call) if device == "cuda" else tracing.peak_bytes(events)
        floor = ceilings.seconds(bytes, flops, dtype)
        benchmark.extra_info.update(
            what,
            cache="cold" if clock.cold else "warm",
            bytes=bytes,
            flops=flops,
            items=items,
            baseline=baseline,
            seconds={name: t.median for name, t in timings.items()},
            rounds={name: t.rounds for name, t in timings.items()},
            spread={name: round(t.spread, 4) for name, t in timings.items()},
            method={name: t.method for name, t in timings.items()},
            ratio={name: timings[baseline].median / t.median for name, t in timings.items() if name != baseline},
            roofline=None if floor is None else {name: floor / t.median for name, t in timings.items()},
            peak_bytes=peaks,
            notes=notes or {},
            run={**facts, "ceilings": ceilings.to_dict()},
        )
        return timings

    return run
