"""Whole models: faces drawn, questions answered and tokens trained per second, with every op on one back end.

The work is that of `unif2ace bench generate` and `train` (`unif2ace/evaluation/speed.py`), in fewer faces and steps.
`avatars-tiny` is the bundled model; `random-100m` has random weights and products large enough to matter. Training is
forward, backward and, for the small model, the optimizer's update, which no back end changes; for the large one it
would hide the rest of so small a batch (`speed.RANDOM_SIZE`).

Where a back end runs every op it is the variant; elsewhere "auto" is, which takes the best one per op. The gate, in
float32: drawn faces and answers are those of the reference, but for a few that one code of another rounding changed.

Goals on two CPU cores, native against reference: faces 3x, training tokens 1.5x, for both models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks import shapes
from unif2ace.evaluation import speed
from unif2ace.ops import BACKENDS
from unif2ace.pipeline import OPS, UniF2acePipeline

TRAINING_OPS = (*OPS, "diffusion_loss")
SAME_SHARE = 0.75  # of the results must be those of the reference

load = cache(speed.load)  # one model for all of its benchmarks


def variants(workload: speed.Workload, names: list[str]) -> dict[str, Callable[[], object]]:
    """The workload on each of the back ends."""
    return {name: speed.on_backend(name, workload.call) for name in names}


def names_for(ops: tuple[str, ...], dtype: torch.dtype, backends: Callable) -> list[str]:
    """The back ends that run all `ops`, or "auto" beside the reference."""
    complete = [name for name in BACKENDS if all(name in backends(op, dtype) for op in ops)]
    return complete if len(complete) > 1 else ["reference", "auto"]


def same_results(pipe: UniF2acePipeline, calls: dict[str, Callable[[], list]]) -> Callable[[str], None] | None:
    """A gate for lists of pictures or sentences. In short floats one rounded logit changes the rest of a face."""
    if pipe.dtype != torch.float32:
        return None

    def check(name: str) -> None:
        pairs = list(zip(calls[name](), calls["reference"](), strict=True))
        same = sum(result == expected for result, expected in pairs)
        assert same >= SAME_SHARE * len(pairs), f"{name}: {same} of {len(pairs)} results are those of the reference"

    return check


@pytest.mark.parametrize("shape", list(shapes.MODELS))
@pytest.mark.parametrize("what", ["generate", "answer"])
def bench_inference(what: str, shape: str, device: str, backends: Callable, compare: Callable) -> None:
    size, pipe = shapes.MODELS[shape], load(shape, device)
    if what == "generate":
        workload = speed.drawing(pipe, size.faces, size.steps)
    else:
        workload = speed.answering(pipe, size.faces)
    calls = variants(workload, names_for(OPS, pipe.dtype, backends))
    compare(
        calls,
        baseline="reference",
        op=what,
        shape=shape,
        case="forward",
        dtype=pipe.dtype,
        gate=same_results(pipe, calls),
        items=(workload.items, workload.unit),
    )


@pytest.mark.parametrize("shape", list(shapes.MODELS))
def bench_train(shape: str, device: str, backends: Callable, compare: Callable) -> None:
    size, pipe = shapes.MODELS[shape], load(shape, device)
    workload = speed.training(pipe, size.sequences, size.update)
    compare(
        variants(workload, names_for(TRAINING_OPS, pipe.dtype, backends)),
        baseline="reference",
        op="train",
        shape=shape,
        case="forward+backward+update" if size.update else "forward+backward",
        dtype=pipe.dtype,
        items=(workload.items, workload.unit),
    )
