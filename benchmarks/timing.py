"""Timing that can be believed on a busy machine.

* Variants are *interleaved*: round 1 times every variant once, then round 2, ... A machine that slows down for a second
  slows all of them, so the ratio of two medians from one run means something where absolute times do not.
* A measurement repeats a short call until it lasts `MIN_SECONDS`, so that clock resolution and call overhead vanish.
* The figure is the median of at least five rounds; the interquartile range says how far to trust it.
* CPU time is the wall clock. CUDA time is taken between two events on the stream, after a flush of the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_SECONDS = 2e-3  # 1000 times the resolution of events on current GPUs, and far above that of perf_counter
ROUNDS = 7
L2_BYTES = 256 * 2**20  # more than the L2 cache of any current GPU


class Timer(Protocol):
    """Seconds that `repeats` calls of `function` take, in all."""

    def __call__(self, function: Callable[[], object], repeats: int) -> float: ...


def cpu_timer(function: Callable[[], object], repeats: int) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start


class CudaTimer:
    """Device seconds between two events; the L2 cache is cold, as in a model whose other layers ran before."""

    def __init__(self) -> None:
        self.flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, function: Callable[[], object], repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) * 1e-3
        return total


def timer_for(device: str) -> Timer:
    """The timer for "cpu" or "cuda"."""
    return CudaTimer() if device == "cuda" else cpu_timer


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one variant, one entry per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return (high - low) / self.median


def interleave(variants: dict[str, Callable[[], object]], timer: Timer, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time all variants alternately, after one round of warm-up that also finds how often to repeat each call.

    Args:
        variants: name -> call without arguments; its inputs are made beforehand.
        timer: from `timer_for`.
        rounds: measurements per variant, at least 5.
    """
    if rounds < 5:
        raise ValueError(f"interleave: a median needs at least 5 rounds, got {rounds}")
    repeats = {name: _calibrate(call, timer) for name, call in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            seconds[name].append(timer(call, repeats[name]) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _calibrate(call: Callable[[], object], timer: Timer) -> int:
    timer(call, 2)  # first calls compile, allocate and fill caches
    return max(1, round(MIN_SECONDS / max(timer(call, 1), 1e-9)))
