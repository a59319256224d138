"""Clocks and rounds: who runs when, how often, and what comes out."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing


class FakeClock:
    """Every call takes the seconds it returns."""

    def __init__(self, overhead=0.0):
        self.cold, self.overhead, self.log = overhead > 0, overhead, []

    def prepare(self, call):
        return call, "fake"

    def seconds(self, call, repeats):
        seconds, name = call()
        self.log.append((name, repeats))
        return seconds * repeats


def test_rounds_alternate_and_short_calls_are_repeated():
    clock = FakeClock()
    quick, slow = timing.MIN_SECONDS / 4, 10 * timing.MIN_SECONDS
    found = timing.interleave({"a": lambda: (quick, "a"), "b": lambda: (slow, "b")}, clock, budget=0.0)
    assert clock.log[:4] == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]  # warm-up and estimate
    assert clock.log[4:] == [("a", 4), ("b", 1), ("b", 1), ("a", 4)] * 2 + [("a", 4), ("b", 1)]
    assert found["a"] == timing.Timing(pytest.approx([quick] * timing.MIN_ROUNDS), "fake")
    assert found["b"].median == slow
    assert found["b"].spread == 0


def test_quick_calls_get_more_rounds_but_not_without_end():
    found = timing.interleave({"a": lambda: (1e-6, "a")}, FakeClock(), budget=60.0)
    assert len(found["a"].rounds) == timing.MAX_ROUNDS


def test_a_measurement_does_not_repeat_an_expensive_flush():
    clock = FakeClock(overhead=timing.MIN_SECONDS)
    timing.interleave({"a": lambda: (1e-6, "a")}, clock, budget=0.0)
    assert {repeats for _, repeats in clock.log} == {1}


def test_long_calls_are_made_no_more_often_than_needed():
    clock = FakeClock()
    timing.interleave({"a": lambda: (2 * timing.LONG, "a")}, clock, budget=0.0)
    assert clock.log == [("a", 1)] * (1 + timing.MIN_ROUNDS)


def test_median_and_spread():
    found = timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert found.median == 3.0
    assert found.spread == pytest.approx((4.0 - 2.0) / 3.0)


def test_a_cold_clock_flushes_before_every_call_and_does_not_count_it():
    clock = timing.CpuClock(cold=True)
    assert clock.evict.nbytes >= 2 * timing.cache_bytes() - 4
    calls = []
    seconds = clock.seconds(lambda: calls.append(float(clock.evict[0])), 3)
    assert calls == [2.0, 3.0, 4.0]  # 1.0 came of measuring what a flush costs
    assert clock.overhead > 0
    assert 0 < seconds < 0.1


def test_a_warm_clock_measures_wall_time():
    clock = timing.clock_for("cpu")
    assert not clock.cold
    call, method = clock.prepare(len)
    assert (call, method) == (len, "wall clock")
    assert clock.seconds(lambda: timing.time.sleep(0.01), 2) >= 0.02


class FakeCuda:
    """Streams, events and graphs of a device whose time advances by what is put on it; flushes take 100 ms each."""

    def __init__(self, captures):
        self.captures, self.now, self.graph_calls, self.graphs = captures, 0.0, 0, 0
        self.mode = "default"
        self.set_sync_debug_mode = lambda mode: setattr(self, "mode", mode)
        self.stream = lambda stream: nullcontext()
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.synchronize = lambda: None

    def flush(self):
        self.now += 100.0

    def kernel(self):
        self.now += 2.0

    def waiting_kernel(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.kernel()

    def CUDAGraph(self):
        self.graphs += 1
        return SimpleNamespace(replay=self.replay)

    def replay(self):
        self.graph_calls += 1
        self.now += 1.5  # no launches in between

    @contextmanager
    def graph(self, graph):
        yield
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_a_gpu_call_is_replayed_from_a_graph_with_a_cold_cache():
    cuda = FakeCuda(captures=True)
    clock = timing.CudaClock(cuda, cuda.flush)
    found = timing.interleave({"a": cuda.kernel}, clock, budget=0.0)
    assert clock.cold
    assert found["a"].method == "graph replay"
    assert found["a"].median == pytest.approx(1.5e-3)  # milliseconds of events; flushes are left out
    assert cuda.graph_calls > timing.MIN_ROUNDS


def test_a_gpu_call_that_cannot_be_captured_is_timed_between_events():
    cuda = FakeCuda(captures=False)
    found = timing.interleave({"a": cuda.kernel}, timing.CudaClock(cuda, cuda.flush), budget=0.0)
    assert found["a"] == timing.Timing(pytest.approx([2e-3] * timing.MIN_ROUNDS), "events")
    assert cuda.graph_calls == 0


def test_a_gpu_call_that_waits_for_the_device_is_never_captured():
    """A capture that fails would leave PyTorch's generator as it is during a capture."""
    cuda = FakeCuda(captures=True)
    found = timing.interleave({"a": cuda.waiting_kernel}, timing.CudaClock(cuda, cuda.flush), budget=0.0)
    assert found["a"] == timing.Timing(pytest.approx([2e-3] * timing.MIN_ROUNDS), "events")
    assert (cuda.graphs, cuda.mode) == (0, "default")


@pytest.mark.gpu
def test_a_real_gpu_is_timed_by_replay():
    x = torch.ones(2**26, device="cuda")
    clock = timing.clock_for("cuda")
    found = timing.interleave({"add": lambda: x.add(1.0), "sync": lambda: x[0].item()}, clock)
    assert (found["add"].method, found["sync"].method) == ("graph replay", "events")
    assert 2 * x.nbytes / found["add"].median < 20e12  # bytes per second: no GPU has that


def test_the_cache_has_a_plausible_size():
    assert 2**18 <= timing.cache_bytes() <= 2**31
