"""Timing that can be believed on a busy machine.

* Variants are *interleaved*: round 1 times every variant once, then round 2 in the opposite order, ... A machine that
  slows down for a second slows all of them, so the ratio of two medians from one run means something where absolute
  times do not; and no variant always finds the caches as the same other one left them.
* A measurement repeats a short call until it lasts `MIN_SECONDS`, so that clock resolution and call overhead vanish.
* The figure is the median of 5 to 21 rounds, as many as fit into `BUDGET`; the interquartile range says how far to
  trust it.
* Two clocks behind one interface. A CPU is timed by the wall clock, with caches *warm* (the call before left them so)
  or *cold* (other data was streamed through them before every call). A GPU is timed between two events on its stream,
  always with a cold L2 cache, as in a model whose other layers ran before; the call is replayed from a CUDA graph
  where it can be captured, so that the figure is the kernels' and not that of the Python that launches them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

Call = Callable[[], object]

MIN_SECONDS = 2e-3  # 1000 times the resolution of events on current GPUs, and far above that of perf_counter
MIN_ROUNDS, MAX_ROUNDS = 5, 21
BUDGET = 0.5  # seconds of rounds per comparison; more rounds than the minimum only for calls that are quick
LONG = 0.1  # seconds; a call of that length is not repeated within a measurement, and costs enough as it is
GRAPH_WARMUP = 3  # calls before a capture: compile, choose algorithms, fill the allocator's pools
L2_BYTES = 256 * 2**20  # more than the L2 cache of any current GPU
DEFAULT_CACHE_BYTES = 32 * 2**20


class Clock(Protocol):
    """How calls are timed on one kind of device.

    `cold` says whether caches are flushed before every call, `overhead` how many seconds that takes: where it dwarfs
    the call, a measurement does not repeat it.
    """

    cold: bool
    overhead: float

    def prepare(self, call: Call) -> tuple[Call, str]:
        """What to time for `call`, and by which method ("wall clock", "graph replay" or "events")."""

    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds that `repeats` runs of a prepared call take, in all."""


class CpuClock:
    """Wall-clock time."""

    def __init__(self, cold: bool = False) -> None:
        self.cold = cold
        # Twice the cache, and read as well as written: whatever the replacement policy, nothing older survives.
        self.evict = torch.zeros(2 * cache_bytes() // 4) if cold else None
        start = time.perf_counter()
        if cold:
            self.evict.add_(1.0)
        self.overhead = time.perf_counter() - start

    def prepare(self, call: Call) -> tuple[Call, str]:
        return call, "wall clock"

    def seconds(self, call: Call, repeats: int) -> float:
        if self.evict is None:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return time.perf_counter() - start
        total = 0.0
        for _ in range(repeats):
            self.evict.add_(1.0)
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total


class CudaClock:
    """Device time between two events around each call, after a flush of the L2 cache.

    Nothing waits for the device between repeats, so a launch hides behind the flush before it. `cuda` is `torch.cuda`;
    tests put a stand-in there.
    """

    cold = True
    overhead = 0.0  # 0.1 ms, in which the host enqueues the call

    def __init__(self, cuda: ModuleType = torch.cuda, flush: Call | None = None) -> None:
        self.cuda = cuda
        self.flush = flush or torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_

    def prepare(self, call: Call) -> tuple[Call, str]:
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):  # a capture needs its warm-up on a stream of its own
            for _ in range(GRAPH_WARMUP - 1):
                call()
            waits = self._waits(call)
        self.cuda.current_stream().wait_stream(side)
        if waits:
            return call, "events"
        graph = self.cuda.CUDAGraph()
        try:
            with self.cuda.graph(graph):
                call()
        except RuntimeError:  # for whatever else a graph does not take
            self.cuda.synchronize()
            return call, "events"
        return graph.replay, "graph replay"

    def _waits(self, call: Call) -> bool:
        """Does the call wait for the device? Asked before the capture, since one that fails would leave PyTorch's
        generator and current stream as they are during a capture, for all that comes after it.
        """
        self.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            self.cuda.set_sync_debug_mode("default")
        return False

    def seconds(self, call: Call, repeats: int) -> float:
        events = [[self.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self.flush()
            start.record()
            call()
            end.record()
        self.cuda.synchronize()
        return 1e-3 * sum(start.elapsed_time(end) for start, end in events)


def clock_for(device: str, cold: bool = False) -> Clock:
    """The clock for "cpu" or "cuda"; on a GPU caches are cold whatever was asked."""
    return CudaClock() if device == "cuda" else CpuClock(cold)


def cache_bytes() -> int:
    """Size of the largest cache that one core of this machine sees, in bytes."""
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):  # Linux: "32768K"
        text = size.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    if not sizes and "SC_LEVEL3_CACHE_SIZE" in getattr(os, "sysconf_names", ()):
        sizes.append(os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    return max(sizes, default=0) or DEFAULT_CACHE_BYTES


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, one entry per round."""

    rounds: tuple[float, ...]
    method: str = "wall clock"

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = quartiles(self.rounds)
        return (high - low) / self.median


def quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    """First and third quartile."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interleave(variants: dict[str, Call], clock: Clock, budget: float = BUDGET) -> dict[str, Timing]:
    """Time all variants alternately, after a warm-up that also finds how often to repeat each call.

    Args:
        variants: name -> call without arguments; its inputs are made beforehand.
        clock: from `clock_for`.
        budget: seconds after which no further round starts, once there are `MIN_ROUNDS`.
    """
    prepared = {name: clock.prepare(call) for name, call in variants.items()}
    repeats = {name: _calibrate(call, clock) for name, (call, _) in prepared.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    started = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - started > budget:
            break
        for name in order:
            seconds[name].append(clock.seconds(prepared[name][0], repeats[name]) / repeats[name])
        order.reverse()
    return {name: Timing(tuple(values), prepared[name][1]) for name, values in seconds.items()}


def _calibrate(call: Call, clock: Clock) -> int:
    """Calls per measurement. The first call fills caches and pools; where it is not long, a second is the estimate."""
    if clock.seconds(call, 1) > LONG:  # not because it compiled: on a GPU that happened in `prepare`
        return 1
    return max(1, round(MIN_SECONDS / max(clock.seconds(call, 1) + clock.overhead, 1e-9)))
