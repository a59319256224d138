"""What one call does: a trace to look at (chrome://tracing, Perfetto), and the most memory it holds at once.

On a CPU both come from one run under `torch.profiler`. With `profile_memory` the profiler reports every allocation and
release of torch's allocator, those of C++ kernels included; their running sum, counted from the start of the call, has
its maximum at the call's peak. Results count as long as they live; arguments made beforehand do not. Memory a kernel
takes from the system directly (stack, `malloc`) is not seen. A CUDA allocator keeps that figure itself.

The profiler slows the call down, so timed rounds run without it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from unif2ace.files import write_text

Event = dict[str, object]  # one entry of "traceEvents" in Chrome's trace format


def trace_call(call: Callable[[], object], label: str) -> list[Event]:
    """Run `call` once under the profiler, inside a span named `label`; its events, memory events included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library announces every start and stop on stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, profile_memory=True) as profiler, record_function(label):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        return json.loads(Path(file.name).read_text())["traceEvents"]


def peak_bytes(events: Iterable[Event]) -> int:
    """Most bytes of CPU memory held at once beyond those held at the start of the traced call."""
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: event["args"]["Ev Idx"])
    return max(accumulate((event["args"]["Bytes"] for event in memory), initial=0))


def cuda_peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of GPU memory that one `call` holds at once beyond those held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def write_trace(path: str | Path, events: list[Event]) -> Path:
    """Write events as one file that trace viewers open. Raises `UserError` where it cannot be written."""
    return write_text(Path(path), json.dumps({"traceEvents": events}))
