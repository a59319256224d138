"""Promises that every op makes alike, on every back end of the device: the same bits each time, forward and backward;
on a GPU also no wait for the device, one CUDA graph, and sizes beyond 2^31 elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES, Case
from tests.oracle import DTYPES, available_backends
from unif2ace import ops

FAST = [
    (name, b) for name, make in CASES.items() for b in available_backends(make(torch.float32).op) if b != "reference"
]

each_call = pytest.mark.parametrize(("name", "backend"), FAST)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(name: str, backend: str, dtype: torch.dtype) -> Case:
    case = CASES[name](dtype)
    if backend not in available_backends(case.op, dtype):
        pytest.skip(f"{backend} does not run {dtype} here")
    return case


def forward(case: Case, backend: str) -> list[Tensor]:
    with torch.no_grad():
        return list(case.run(backend, **case.inputs))


def forward_backward(case: Case, backend: str) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_(True) for name, x in case.inputs.items()}
    outputs = [y for y in case.run(backend, **leaves) if y.requires_grad]
    return list(torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(y) for y in outputs]))


def assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(one, other), f"result {number}: {int((one != other).sum())} of {one.numel()} elements differ"


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_dtype
@each_call
def test_same_bits_every_time(name: str, backend: str, dtype: torch.dtype):
    case = make(name, backend, dtype)
    for run in (forward, *((forward_backward,) if case.differentiable else ())):
        first = run(case, backend)
        for _ in range(20 if torch.get_default_device().type == "cuda" else 1):
            assert_equal(run(case, backend), first)


@pytest.mark.gpu
@each_dtype
@each_call
def test_no_wait_for_the_device(name: str, backend: str, dtype: torch.dtype):
    case = make(name, backend, dtype)
    forward(case, backend)  # compiling and loading may wait
    with waiting_refused():
        forward(case, backend)
        if case.differentiable:
            forward_backward(case, backend)


@pytest.mark.gpu
@each_dtype
@each_call
def test_one_cuda_graph(name: str, backend: str, dtype: torch.dtype):
    """Captured once, replayed on other values: equal to a plain call on those values."""
    case = make(name, backend, dtype)
    for run in (forward, *((forward_backward,) if case.differentiable else ())):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(case, backend)
            with waiting_refused():  # a capture that fails would break the tests after this one too
                run(case, backend)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case, backend)
        fresh = CASES[name](dtype)
        for key, x in case.inputs.items():
            x.copy_(fresh.inputs[key])
        graph.replay()
        assert_equal(captured, run(case, backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for name, b in FAST if name == "mix_sequences"])
def test_more_than_two_to_the_31_elements(backend: str):
    """The last rows of a tensor of 4.3 GB, and an address in bytes beyond 2^32, are those of a small call."""
    rows, hidden = 2**21 + 64, 1024
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    x[-64:] = torch.randn(64, hidden)
    offsets = torch.tensor([0, rows - 64, rows], dtype=torch.int32)
    scale, none = torch.tensor([1.0, 2.0]), torch.empty(2, 0)
    y = ops.mix_sequences(x, scale, [], none, offsets, backend=backend)
    small = ops.mix_sequences(
        x[-64:], scale[1:], [], none[1:], torch.tensor([0, 64], dtype=torch.int32), backend=backend
    )
    assert torch.equal(y[-64:], small)
    assert not y[:-64].any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for name, b in FAST if name == "sample_tokens"])
def test_more_than_two_to_the_31_logits(backend: str):
    rows, columns = 2**18 + 8, 8192
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16)
    logits[-8:] = torch.randn(8, columns)
    place = {
        "seeds": torch.zeros(8, dtype=torch.int64),
        "positions": torch.arange(8),
        "steps": torch.zeros(8, dtype=torch.int32),
    }
    padded = {name: torch.nn.functional.pad(x, (rows - 8, 0)) for name, x in place.items()}
    codes, confidence = ops.sample_tokens(logits, **padded, backend=backend)
    few = ops.sample_tokens(logits[-8:], **place, backend=backend)
    assert_equal([codes[-8:], confidence[-8:]], list(few))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for name, b in FAST if name == "routing"])
def test_nan_logits_end_and_stay_inside(backend: str):
    """On a GPU nobody looks for NaN. The plan may mean nothing, but its indices stay inside."""
    logits = torch.randn(1000, 64)
    logits[::3] = torch.nan
    plan = ops.route(logits, 4, backend=backend)
    torch.cuda.synchronize()
    assert 0 <= int(plan.experts.min()) <= int(plan.experts.max()) < 64
    assert torch.equal(plan.order.sort().values, torch.arange(4000, dtype=torch.int32))
    assert int(plan.offsets[-1]) == 4000


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for name, b in FAST if name == "expert_mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_token_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype):
    """Rows of a large batch, sent through the experts alone and in halves."""
    case = make("expert_mlp", backend, dtype)
    tokens, experts = 2048, case.inputs["w_up"].shape[0]
    x, logits = torch.randn(tokens, case.inputs["x"].shape[1], dtype=dtype), torch.randn(tokens, experts)
    matrices = {name: value for name, value in case.inputs.items() if name not in ("x", "weights")}

    def run(rows: slice) -> Tensor:
        plan = ops.route(logits[rows], 2, backend=backend)
        return ops.expert_mlp(x[rows], plan, **matrices, activation="swiglu", backend=backend)

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(5, 69), slice(0, tokens // 2), slice(tokens // 2, None)):
        assert torch.equal(run(rows), whole[rows]), f"rows {rows} differ"
