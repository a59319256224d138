"""Whether `UniF2ace.compile_layers` is worth it: faces by the batch engine, layers as they are and compiled.

The untimed first call compiles. The gate, in float32: the codes of most faces are the same; a compiled LayerNorm rounds
otherwise, and one rounding that flips a token changes the rest of its face.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import shapes
from benchmarks.bench_generation import SAME_SHARE, drawing_by_engine
from unif2ace.evaluation import speed


@pytest.mark.parametrize("shape", list(shapes.BATCHES))
def bench_compile(shape: str, device: str, compare: Callable) -> None:
    size = shapes.BATCHES[shape]
    eager, compiled = speed.load(size.model, device), speed.load(size.model, device)
    compiled.model.compile_layers()
    calls = {"eager": drawing_by_engine(eager, size), "compiled": drawing_by_engine(compiled, size)}

    def gate(name: str) -> None:
        same = (calls[name]() == calls["eager"]()).all(1).sum().item()
        assert same >= SAME_SHARE * size.requests, f"{same} of {size.requests} faces are those of eager layers"

    compare(
        calls,
        baseline="eager",
        op="compile",
        shape=shape,
        case="forward",
        dtype=eager.dtype,
        gate=gate if eager.dtype == torch.float32 else None,
        items=(size.requests, "faces"),
    )
