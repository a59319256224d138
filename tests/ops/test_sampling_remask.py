"""Re-masking: exactly as many tokens as asked for, the least certain ones, on every back end the same."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import available_backends, poisoned, registered
from unif2ace.errors import UserError
from unif2ace.ops import _noise, _registry, remask

BACKENDS = available_backends("sampling")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def remask_problem(counts: list[int], keep: list[int], tau: float = 1.0) -> dict[str, Tensor]:
    rows, images = sum(counts), len(counts)
    position = [torch.randperm(300)[:n].sort().values for n in counts]
    return {
        "log_confidence": -torch.rand(rows) * 5,
        "row_offsets": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        "keep_unknown": torch.tensor(keep, dtype=torch.int32),
        "seeds": torch.randint(-(2**62), 2**62, (images,)),
        "positions": torch.cat([torch.empty(0, dtype=torch.int64), *position]),
        "steps": torch.arange(images, dtype=torch.int32),
        "tau": torch.full((images,), tau),
    }


def remask_by_the_definition(p: dict[str, Tensor]) -> list[bool]:
    unknown = [False] * len(p["positions"])
    for image, (start, end) in enumerate(pairwise(p["row_offsets"].tolist())):
        positions = p["positions"][start:end]
        noise = _noise.gumbel_noise(
            p["seeds"][image].expand(end - start), positions, p["steps"][image].expand(end - start), 1, 4
        )
        key = p["log_confidence"][start:end] + p["tau"][image] * noise[:, 0]
        ranked = sorted(zip(key.tolist(), positions.tolist(), range(start, end), strict=True))
        for _, _, row in ranked[: int(p["keep_unknown"][image])]:
            unknown[row] = True
    return unknown


@each_backend
@pytest.mark.parametrize(
    ("counts", "keep"),
    [([7], [3]), ([5, 0, 13, 1], [5, 0, 0, 1]), ([64, 64, 64], [1, 63, 32]), ([], []), ([0, 0], [0, 0])],
    ids=str,
)
@pytest.mark.parametrize("tau", [0.0, 4.5])
def test_remask_against_the_definition(backend: str, tau: float, counts: list[int], keep: list[int]):
    p = remask_problem(counts, keep, tau)
    with registered(), poisoned(len(p["positions"])):
        mask = remask(**p, backend=backend)
    assert mask.dtype == torch.bool
    assert mask.tolist() == remask_by_the_definition(p)
    assert torch.equal(remask(**p, backend=backend), mask)


@each_backend
def test_remask_ties_go_to_the_lowest_position(backend: str):
    p = remask_problem([6], [2], tau=0.0)
    p["log_confidence"] = torch.tensor([-1.0, -1.0, 0.0, -1.0, -1.0, -1.0])
    p["positions"] = torch.tensor([50, 40, 1, 30, 20, 60])
    assert remask(**p, backend=backend).tolist() == [False, False, False, True, True, False]


@each_backend
def test_remask_of_an_image_ignores_the_others(backend: str):
    p = remask_problem([9, 20, 4], [4, 11, 2])
    one = {name: x[1:2] for name, x in p.items() if name in ("keep_unknown", "seeds", "steps", "tau")}
    one |= {name: p[name][9:29] for name in ("log_confidence", "positions")}
    assert torch.equal(
        remask(**one, row_offsets=torch.tensor([0, 20]), backend=backend), remask(**p, backend=backend)[9:29]
    )


@given(
    counts=st.lists(st.integers(0, 30), max_size=6),
    data=st.data(),
    tau=st.sampled_from([0.0, 0.5, 100.0]),
    levels=st.sampled_from([1, 3, 1000]),
)
def test_remask_keeps_exactly_the_number_asked_for(counts: list[int], data: st.DataObject, tau: float, levels: int):
    keep = [data.draw(st.integers(0, n)) for n in counts]
    p = remask_problem(counts, keep, tau)
    p["log_confidence"] = -(torch.rand(sum(counts)) * levels).floor()  # few levels: many ties
    for backend in BACKENDS:
        mask = remask(**p, backend=backend)
        assert [int(mask[a:b].sum()) for a, b in pairwise(p["row_offsets"].tolist())] == keep
        assert mask.tolist() == remask_by_the_definition(p)


@each_backend
def test_opcheck_and_compilation(backend: str):
    p = remask_problem([5, 0, 8], [2, 0, 8])
    torch.library.opcheck(_registry.registered(backend, "remask"), tuple(p.values()))
    confidence = p.pop("log_confidence")

    def step(confidence: Tensor) -> Tensor:
        return remask(2 * confidence, **p, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(confidence), step(confidence))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_confidence": torch.zeros(5, 1)}, r"log_confidence must be \[R\] floating point, got \[5, 1\]"),
        ({"row_offsets": torch.tensor([0, 5])}, r"row_offsets must be \[3\] int32 or int64, got \[2\]"),
        ({"row_offsets": torch.tensor([0, 2, 4])}, "row_offsets must rise from 0 to 5"),
        ({"row_offsets": torch.tensor([0, 6, 5])}, "row_offsets must rise from 0 to 5"),
        ({"keep_unknown": torch.tensor([1, 4])}, "keep_unknown must lie between 0 and the rows of each image"),
        ({"keep_unknown": torch.tensor([-1, 3])}, "keep_unknown must lie between 0"),
        ({"tau": torch.tensor([1.0, -1.0])}, "tau must be finite and >= 0"),
        ({"tau": torch.tensor([1, 1])}, r"tau must be \[2\] floating point, got \[2\] int64"),
        ({"log_confidence": torch.tensor([0, 0, math.nan, 0, 0])}, "log_confidence must hold no NaN"),
        ({"positions": torch.arange(4)}, r"positions must be \[5\]"),
    ],
)
def test_remask_refuses_bad_arguments(changes: dict[str, Tensor], message: str):
    with pytest.raises(UserError, match=f"^remask: {message}"):
        remask(**{**remask_problem([2, 3], [1, 2]), **changes})
