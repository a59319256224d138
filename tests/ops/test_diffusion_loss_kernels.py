"""The ways in which a kernel of the losses could be wrong: borders of chunks and blocks, memory, threads, odd values.

What every back end has to fulfil is in test_diffusion_loss.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import LOSS_SMALL, LossShape
from tests.bits import assert_same_for_threads, needs_native, run_python
from tests.ops.losses import code_targets, d3diff, head
from tests.oracle import DTYPES, assert_matches_reference, available_backends, backend_cases
from unif2ace.ops import _registry, linear_loss
from unif2ace.ops.diffusion_loss import SCORE_COLUMNS

BACKENDS = available_backends("diffusion_loss")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_columns = pytest.mark.parametrize("score_columns", SCORE_COLUMNS)
# Triton's interpreter takes a microsecond or so per logit.
SLOW_TRITON = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case[0] == "triton"), id=f"{case[0]}-{case[1]}")
    for case in backend_cases("diffusion_loss")
]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")

# Rows for several chunks and columns for several blocks of the native kernel; the codes begin and end inside of blocks.
LARGE = LossShape(800, 24, 1100, 0)
LARGE_CODES = (333, 914)


def large_targets() -> Tensor:
    targets = torch.randint(*LARGE_CODES, (LARGE.rows,))
    targets[::5] = -100
    return targets


@pytest.mark.parametrize(("backend", "dtype"), SLOW_TRITON)
@each_columns
def test_many_chunks_and_blocks(backend: str, score_columns: str, dtype: torch.dtype):
    targets = large_targets()

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        options = {"score_columns": score_columns, "alpha": 0.1, "backend": backend}
        return (d3diff(targets, LARGE_CODES, **inputs, **options).total,)

    assert_matches_reference(run, head(LARGE), dtype, backend)


@needs_triton
@pytest.mark.parametrize(("dtype", "score_columns"), [(torch.float32, "code"), (torch.float16, "all")], ids=str)
def test_triton_chunks_of_rows(dtype: torch.dtype, score_columns: str, monkeypatch: pytest.MonkeyPatch):
    """Three full chunks and a short one; columns for two passes of each kernel."""
    kernels = pytest.importorskip("unif2ace.kernels.diffusion_loss")
    monkeypatch.setattr(kernels, "MIN_CHUNK_ROWS", 64)
    inputs = head(LossShape(200, 8, 530, 0))
    assert kernels._chunk_rows(200, inputs["hidden"].to(dtype), True) == 64
    targets = torch.randint(131, 517, (200,))
    targets[1::3] = -100

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        return (d3diff(targets, (131, 517), **inputs, score_columns=score_columns, backend=backend).total,)

    assert_matches_reference(run, inputs, dtype, "triton")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_needs_the_memory_of_one_chunk(dtype: torch.dtype):
    """For each column of the head: logits of C = max(1024, H) rows, and float32 sums of dW where dtype is not."""
    kernels = pytest.importorskip("unif2ace.kernels.diffusion_loss")
    for width in (64, 1024, 2048, 8192):
        usual, sums = max(1024, width) * dtype.itemsize, 4 * width * (dtype.itemsize < 4)
        for rows in (1, 1000, 4096, 6144, 6145, 8192, 100_000):
            hidden = torch.empty(rows, width, dtype=dtype, device="meta")
            chunk = kernels._chunk_rows(rows, hidden, True)
            assert chunk * dtype.itemsize + (sums if chunk < rows else 0) <= usual + sums
            assert chunk >= min(rows, 512)  # a chunk is no sliver either
            assert kernels._chunk_rows(rows, hidden, False) <= 1024


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("unknown", [-(2**31), -1, 2, 9, 11, 2**31 - 1])
def test_a_target_unknown_to_triton_is_no_number(unknown: int, dtype: torch.dtype):
    """On a GPU nobody can refuse it without waiting. Its own row is spoilt, and nothing out of bounds is addressed."""
    hidden, weight, bias = (x.float() for x in head(LossShape(5, 4, 11, 0)).values())
    targets = torch.tensor([3, unknown, -100, 8, 5], dtype=dtype)
    arguments = (hidden, weight, bias, targets, torch.ones(5), torch.ones(5), [3, 9], [4, 7], True)
    op = _registry.registered(_registry.choose("diffusion_loss", "triton", hidden.device), "linear_loss")
    loss, nll, _, grad_hidden, grad_weight, _ = op(*arguments)
    assert loss.isnan()
    assert nll.isnan().tolist() == [False, True, False, False, False]
    assert grad_hidden.isnan().any(dim=1).tolist() == [False, True, False, False, False]
    assert not grad_weight[:3].any()
    assert not grad_weight[9:].any()


@each_dtype
@needs_native
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype):
    inputs, targets = head(LARGE), large_targets()

    def run() -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_(True) for name, x in inputs.items()}
        total = d3diff(targets, LARGE_CODES, **leaves, score_columns="all", alpha=0.1, backend="native").total
        narrow, nll = linear_loss(  # fewer columns than a block: one task, and yet one thread
            leaves["hidden"][:60],
            leaves["weight"][:50],
            None,
            torch.arange(60) % 50,
            torch.ones(60),
            backend="native",
        )
        return [total, narrow, nll, *torch.autograd.grad(total + narrow, list(leaves.values()))]

    assert_same_for_threads(run, (1, 2, 3, 8))


MEMORY_PROGRAM = """
import resource, torch
from unif2ace.ops import linear_loss
def run(rows):
    hidden, weight = (torch.randn(n, 16, dtype={dtype}, requires_grad=True) for n in (rows, 8192))
    loss, _ = linear_loss(hidden, weight, None, torch.arange(rows), torch.ones(rows), backend="{backend}")
    loss.backward()
run(600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(6144)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("backend", "dtype"), [c for c in SLOW_TRITON if c.values[1] == torch.float32])
def test_logits_are_never_whole_in_memory(backend: str, dtype: torch.dtype):
    """Ten times the rows need no more memory; all logits would be 192 MiB, and the definition holds them thrice."""
    done = run_python(MEMORY_PROGRAM.format(backend=backend, dtype=dtype))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 * 1024, f"{done.stdout} KiB more"


@each_backend
def test_ignored_rows_are_not_read(backend: str):
    shape = LOSS_SMALL["primes"]
    inputs, targets = head(shape, torch.float32), code_targets(shape)
    ignored = targets == -100
    results = []
    for filler in (0.0, math.nan):
        leaves = {name: x.clone() for name, x in inputs.items()}
        leaves["hidden"][ignored] = filler
        leaves = {name: x.requires_grad_(True) for name, x in leaves.items()}
        weight = torch.ones(shape.rows).masked_fill(ignored, filler)
        loss, nll = linear_loss(**leaves, targets=targets, row_weight=weight, backend=backend)
        results.append([loss, nll, *torch.autograd.grad(loss, list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][2][ignored].any()


@pytest.mark.parametrize("size", [1e3, 1e6])
@each_backend
def test_huge_logits(backend: str, size: float):
    """Exact where one logit outweighs all others: no overflow, no cancellation."""
    hidden, targets = size * torch.eye(7, 9), torch.arange(7)
    targets[3:] += 1
    inputs = [hidden.requires_grad_(True), torch.eye(9).requires_grad_(True)]
    loss, nll = linear_loss(*inputs, None, targets, torch.ones(7), backend=backend)
    assert nll.tolist() == [0.0] * 3 + [size] * 4
    grad, _ = torch.autograd.grad(loss, inputs)
    assert torch.equal(grad, (F.one_hot(torch.arange(7), 9) - F.one_hot(targets, 9)).float())


@each_backend
def test_columns_of_minus_infinity(backend: str):
    """A bias of -inf shuts columns out, be it a whole block of them."""
    inputs, targets = head(LARGE, torch.float32), torch.randint(700, 1000, (LARGE.rows,))
    inputs["bias"][:690] = -math.inf
    inputs = {name: x.requires_grad_(True) for name, x in inputs.items()}
    loss, _ = linear_loss(**inputs, targets=targets, row_weight=torch.rand(LARGE.rows), backend=backend)
    grads = torch.autograd.grad(loss, list(inputs.values()))
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][:690].any()
    assert not grads[2][:690].any()
    torch.testing.assert_close(grads[2].sum(), torch.tensor(0.0), atol=1e-3, rtol=0)
