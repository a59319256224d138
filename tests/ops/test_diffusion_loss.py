"""Linear head + loss: values and gradients against the definitions, the identities of the D3Diff loss, chunking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import LOSS_SMALL, LossShape
from tests.bits import assert_same_for_threads, needs_native, run_python
from tests.oracle import DTYPES, assert_matches_reference, available_backends, backend_cases, noncontiguous, registered
from unif2ace.errors import UserError
from unif2ace.ops import _registry, d3diff_loss, linear_loss
from unif2ace.ops.diffusion_loss import (
    SCORE_COLUMNS,
    SCORE_WEIGHTS,
    _time,
    reference_d3diff_loss,
    reference_linear_loss,
    score_constant,
)

BACKENDS = available_backends("diffusion_loss")
IMAGE_TOKENS = 16
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CASES = backend_cases("diffusion_loss")
each_case = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
# Triton's interpreter takes a microsecond or so per logit.
SLOW_TRITON = [pytest.param(*c, marks=[pytest.mark.slow] * (c[0] == "triton"), id=f"{c[0]}-{c[1]}") for c in CASES]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
each_shape = pytest.mark.parametrize("shape", LOSS_SMALL.values(), ids=LOSS_SMALL.keys())
each_weight = pytest.mark.parametrize("score_weight", SCORE_WEIGHTS)
each_columns = pytest.mark.parametrize("score_columns", SCORE_COLUMNS)


@pytest.fixture(params=[1 << 19, 100], ids=["one-chunk", "many-chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with all rows in one chunk, and again with a row or so in each."""
    monkeypatch.setattr("unif2ace.ops.diffusion_loss.CHUNK_ELEMENTS", request.param)


def head(shape: LossShape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    width = shape.hidden**-0.5
    return {
        "hidden": torch.randn(shape.rows, shape.hidden, dtype=dtype),
        "weight": torch.randn(shape.columns, shape.hidden, dtype=dtype) * 2 * width,
        "bias": torch.randn(shape.columns, dtype=dtype),
    }


def code_columns(shape: LossShape) -> tuple[int, int]:
    """Codes and `mask` end the vocabulary."""
    return shape.columns - shape.code_columns, shape.columns - 1


def code_targets(shape: LossShape) -> Tensor:
    targets = torch.randint(*code_columns(shape), (shape.rows,))
    targets[1::3] = -100
    return targets


def mask_ratios(rows: int) -> Tensor:
    """Realised ratios, from one masked token to all of them."""
    return (1.0 + torch.arange(rows) % IMAGE_TOKENS) / IMAGE_TOKENS


# ---------------------------------------------------------------------------------------------------------- linear_loss


@each_case
@each_shape
@pytest.mark.parametrize("sliced", [False, True], ids=["all-columns", "code-columns"])
def test_linear_loss_and_gradients(backend: str, sliced: bool, shape: LossShape, dtype: torch.dtype):
    targets, row_weight = code_targets(shape), torch.rand(shape.rows)
    columns = code_columns(shape) if sliced else None

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        return linear_loss(**inputs, targets=targets, row_weight=row_weight, columns=columns, backend=backend)[:1]

    assert_matches_reference(run, head(shape), dtype, backend)


@pytest.mark.usefixtures("chunk")
@each_shape
@pytest.mark.parametrize("sliced", [False, True], ids=["all-columns", "code-columns"])
def test_linear_loss_is_its_definition(sliced: bool, shape: LossShape):
    inputs = {name: x.requires_grad_(True) for name, x in head(shape).items()}
    targets, row_weight = code_targets(shape), torch.rand(shape.rows, dtype=torch.float64)
    columns = code_columns(shape) if sliced else None
    loss, nll = linear_loss(**inputs, targets=targets.int(), row_weight=row_weight, columns=columns)
    wanted, wanted_nll = reference_linear_loss(**inputs, targets=targets, row_weight=row_weight, columns=columns)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(nll, wanted_nll)
    assert not nll.requires_grad
    found, expected = (torch.autograd.grad(x, list(inputs.values())) for x in (loss, wanted))
    torch.testing.assert_close(found, expected)


@each_backend
def test_linear_loss_is_cross_entropy(backend: str):
    shape = LOSS_SMALL["primes"]
    inputs, targets = head(shape, torch.float32), code_targets(shape)
    count = (targets != -100).sum()
    loss, nll = linear_loss(**inputs, targets=targets, row_weight=torch.ones(shape.rows) / count, backend=backend)
    logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"))


@each_backend
def test_only_what_needs_a_gradient_gets_one(backend: str):
    shape = LOSS_SMALL["primes"]
    inputs, targets = head(shape, torch.float32), code_targets(shape)
    inputs["weight"].requires_grad_(True)
    loss, _ = linear_loss(inputs["hidden"], inputs["weight"], None, targets, torch.ones(shape.rows), backend=backend)
    (2 * loss).backward()
    assert inputs["weight"].grad is not None
    assert inputs["hidden"].grad is None
    with torch.no_grad():
        quiet, _ = linear_loss(
            inputs["hidden"], inputs["weight"], None, targets, torch.ones(shape.rows), backend=backend
        )
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss.detach())


@each_backend
def test_all_rows_ignored(backend: str):
    inputs = {name: x.float().requires_grad_(True) for name, x in head(LossShape(5, 8, 11, 5)).items()}
    targets = torch.full((5,), -100)
    loss, nll = linear_loss(**inputs, targets=targets, row_weight=torch.full((5,), math.nan), backend=backend)
    ratio = torch.full((5,), math.nan)
    columns = {"num_image_tokens": 4, "code_columns": (6, 10)}
    result = d3diff_loss(**inputs, targets=targets, mask_ratio=ratio, **columns, backend=backend)
    (loss + result.total).backward()
    assert [x.item() for x in (loss, *result[:3])] == [0.0] * 4
    assert not nll.any()
    assert all(not x.grad.any() for x in inputs.values())


@each_backend
def test_noncontiguous_inputs(backend: str):
    shape = LOSS_SMALL["primes"]
    inputs, targets, weight = head(shape, torch.float32), code_targets(shape), torch.rand(shape.rows)
    strided = {name: noncontiguous(x) for name, x in inputs.items()}
    for first, second in zip(
        linear_loss(**inputs, targets=targets, row_weight=weight, backend=backend),
        linear_loss(**strided, targets=noncontiguous(targets), row_weight=noncontiguous(weight), backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(first, second)


@each_backend
def test_equal_calls_give_equal_bits_forward_and_backward(backend: str):
    shape = LOSS_SMALL["primes"]
    inputs, targets = head(shape, torch.float32), code_targets(shape)
    runs = []
    for _ in range(2):
        leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
        loss, nll = linear_loss(**leaves, targets=targets, row_weight=torch.ones(shape.rows), backend=backend)
        runs.append([loss, nll, *torch.autograd.grad(loss, list(leaves.values()))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


# ---------------------------------------------------------------------------------------------------------- d3diff_loss


@pytest.mark.usefixtures("chunk")
@each_case
@each_shape
@each_columns
def test_d3diff_and_gradients(backend: str, score_columns: str, shape: LossShape, dtype: torch.dtype):
    targets, ratio = code_targets(shape), mask_ratios(shape.rows)

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        result = d3diff_loss(
            **inputs,
            targets=targets,
            mask_ratio=ratio,
            num_image_tokens=IMAGE_TOKENS,
            code_columns=code_columns(shape),
            score_columns=score_columns,
            alpha=0.1,
            backend=backend,
        )
        return (result.total,)

    assert_matches_reference(run, head(shape), dtype, backend)


@pytest.mark.usefixtures("chunk")
@each_shape
@each_columns
@each_weight
def test_closed_form_equals_the_definition_sum(score_weight: str, score_columns: str, shape: LossShape):
    """The op never forms the sum over codes of the score entropy; value, parts and gradients must be the same."""
    inputs = {name: x.requires_grad_(True) for name, x in head(shape).items()}
    targets, ratio = code_targets(shape), mask_ratios(shape.rows).double()
    options = {"code_columns": code_columns(shape), "alpha": 0.3, "score_weight": score_weight}
    options |= {"score_columns": score_columns, "num_image_tokens": IMAGE_TOKENS, "discrete_steps": 7}
    found = d3diff_loss(**inputs, targets=targets, mask_ratio=ratio, **options)
    wanted = reference_d3diff_loss(**inputs, targets=targets, mask_ratio=ratio, **options)
    for name in found._fields:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), msg=name)
    torch.testing.assert_close(found.total.detach(), found.mask_nll + 0.3 * found.score)
    grads = [torch.autograd.grad(x.total, list(inputs.values())) for x in (found, wanted)]
    torch.testing.assert_close(*grads)
    assert not any(x.requires_grad for x in found[1:])


@each_weight
def test_gradient_of_a_row_is_g_times_softmax_minus_onehot(score_weight: str):
    logits = torch.randn(IMAGE_TOKENS, 9, dtype=torch.float64, requires_grad=True)
    targets, ratio = torch.randint(9, (IMAGE_TOKENS,)), mask_ratios(IMAGE_TOKENS).double()
    result = d3diff_loss(  # the identity as head: hidden rows are the logits
        logits,
        torch.eye(9, dtype=torch.float64),
        None,
        targets,
        ratio,
        num_image_tokens=IMAGE_TOKENS,
        code_columns=(0, 9),
        alpha=0.25,
        score_weight=score_weight,
        discrete_steps=6,
    )
    (grad,) = torch.autograd.grad(result.total, logits)
    m = ratio.clamp(max=1 - 0.5 / IMAGE_TOKENS)
    if score_weight == "sigma":
        wa = (math.pi / 2) * (1 - m**2).sqrt() / m
    elif score_weight == "none":
        wa = (1 - m) / m
    else:
        time = torch.acos(m) * 2 / math.pi
        wa = (m - torch.cos((time + 1 / 6).clamp(max=1) * math.pi / 2)) / m
    g = (1 + 0.25 * wa)[:, None] / IMAGE_TOKENS
    torch.testing.assert_close(grad, g * (logits.softmax(1) - F.one_hot(targets, 9)).detach())


def test_score_entropy_with_normalised_scores_is_a_times_nll():
    """RADD / MDLM: with s_y = a p_y the definition sum is a * nll exactly, without a constant."""
    log_p = torch.randn(IMAGE_TOKENS - 1, 11, dtype=torch.float64).log_softmax(1)
    m = mask_ratios(IMAGE_TOKENS - 1).double()
    a = (1 - m) / m
    s = a[:, None] * log_p.exp()
    score = s.sum(1) - a * s[:, 3].log() + a * (a.log() - 1)
    torch.testing.assert_close(score, -a * log_p[:, 3])


def test_score_entropy_is_least_at_the_true_ratio():
    """sum s - a log s_x0 + a (log a - 1) >= 0 per row, with equality at s = a onehot."""
    shape = LOSS_SMALL["primes"]
    result = d3diff_loss(
        **head(shape),
        targets=code_targets(shape),
        mask_ratio=mask_ratios(shape.rows),
        num_image_tokens=IMAGE_TOKENS,
        code_columns=code_columns(shape),
    )
    assert float(result.score) > 0


def test_score_constant_in_float32():
    m = torch.cat([torch.logspace(-4, -0.001, 300, dtype=torch.float64), torch.tensor([0.05, 0.999])])
    truth = torch.tensor([1 + (1 - x) / x * math.log1p(-x) if x > 1e-3 else x / 2 + x * x / 6 for x in m.tolist()])
    torch.testing.assert_close(score_constant(m.float()), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(score_constant(m), truth.double(), rtol=1e-6, atol=0)


@each_weight
def test_time_weights_are_finite_for_every_ratio(score_weight: str):
    for tokens in (1, 2, 64, 1024):
        ratios = torch.cat([torch.zeros(1), torch.arange(1, tokens + 1) / tokens])
        m, a, weight = _time(ratios, tokens, score_weight, 18)
        assert all(x.isfinite().all() and (x > 0).all() for x in (m, a, weight))
        inner = ratios[1:-1]
        torch.testing.assert_close(m[1:-1], inner)  # only ratio 0 and 1 are moved
        if score_weight == "sigma":
            torch.testing.assert_close((weight * a)[1:-1], (math.pi / 2) * (1 - inner**2).sqrt() / inner)


@each_columns
@pytest.mark.parametrize("form", ["reference", "op"])
def test_gradcheck(score_columns: str, form: str):
    shape = LossShape(6, 3, 9, 5)
    inputs = [x.requires_grad_(True) for x in head(shape).values()]
    targets, ratio = code_targets(shape), mask_ratios(6).double()
    options = {"code_columns": code_columns(shape), "alpha": 0.5, "score_weight": "sigma"}
    options |= {"score_columns": score_columns, "num_image_tokens": IMAGE_TOKENS, "discrete_steps": 7}
    loss = reference_d3diff_loss if form == "reference" else d3diff_loss

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss(hidden, weight, bias, targets=targets, mask_ratio=ratio, **options).total

    assert torch.autograd.gradcheck(total, inputs)
    if form == "reference":
        assert torch.autograd.gradgradcheck(total, inputs)


@given(
    rows=st.integers(0, 20), hidden=st.integers(1, 9), start=st.integers(0, 4), codes=st.integers(1, 12), data=st.data()
)
def test_d3diff_of_any_shape(rows: int, hidden: int, start: int, codes: int, data: st.DataObject):
    inputs = head(LossShape(rows, hidden, start + codes + 1, codes + 1))
    targets = torch.tensor([data.draw(st.sampled_from([-100, *range(start, start + codes)])) for _ in range(rows)])
    options = {"code_columns": (start, start + codes), "alpha": 0.01, "num_image_tokens": 8, "discrete_steps": 5}
    options |= {"score_weight": data.draw(st.sampled_from(SCORE_WEIGHTS))}
    options |= {"score_columns": data.draw(st.sampled_from(SCORE_COLUMNS))}
    ratio = torch.rand(rows, dtype=torch.float64)
    wanted = reference_d3diff_loss(**inputs, targets=targets.long(), mask_ratio=ratio, **options)
    found = d3diff_loss(**inputs, targets=targets.long(), mask_ratio=ratio, **options)
    torch.testing.assert_close(tuple(found), tuple(wanted))


# -------------------------------------------------------------------------------------- chunks, blocks, memory, threads

# Rows for several chunks and columns for several blocks of the native kernel; the codes begin and end inside of blocks.
LARGE = LossShape(800, 24, 1100, 0)
LARGE_CODES = (333, 914)


def large_run(score_columns: str, targets: Tensor, backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    result = d3diff_loss(
        **inputs,
        targets=targets,
        mask_ratio=mask_ratios(LARGE.rows),
        num_image_tokens=IMAGE_TOKENS,
        code_columns=LARGE_CODES,
        score_columns=score_columns,
        alpha=0.1,
        backend=backend,
    )
    return (result.total,)


def large_targets() -> Tensor:
    targets = torch.randint(*LARGE_CODES, (LARGE.rows,))
    targets[::5] = -100
    return targets


@pytest.mark.parametrize(("backend", "dtype"), SLOW_TRITON)
@each_columns
def test_many_chunks_and_blocks(backend: str, score_columns: str, dtype: torch.dtype):
    targets = large_targets()

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        return large_run(score_columns, targets, backend, **inputs)

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
        options = {"num_image_tokens": IMAGE_TOKENS, "code_columns": (131, 517), "score_columns": score_columns}
        result = d3diff_loss(**inputs, targets=targets, mask_ratio=mask_ratios(200), **options, backend=backend)
        return (result.total,)

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
        (total,) = large_run("all", targets, "native", **leaves)
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


# ------------------------------------------------------------------------------------------------ registration, refusal


@each_backend
@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("with_mass", [False, True])
def test_opcheck(backend: str, with_grads: bool, with_mass: bool):
    shape = LossShape(7, 5, 11, 6)
    hidden, weight, bias = (x.float() for x in head(shape).values())
    mass_weight = torch.rand(7) if with_mass else None
    arguments = (hidden, weight, bias, code_targets(shape), torch.rand(7), mass_weight, [0, 11], [5, 10], with_grads)
    torch.library.opcheck(_registry.registered(backend, "linear_loss"), arguments)


@each_columns
@each_backend
def test_compiles_into_one_graph(backend: str, score_columns: str):
    shape = LOSS_SMALL["primes"]
    inputs = [x.float().requires_grad_(True) for x in head(shape).values()]
    targets, ratio = code_targets(shape), mask_ratios(shape.rows)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        first = d3diff_loss(
            2 * hidden,
            weight,
            bias,
            targets,
            ratio,
            num_image_tokens=IMAGE_TOKENS,
            code_columns=code_columns(shape),
            score_columns=score_columns,
            backend=backend,
        )
        return first.total + 3 * linear_loss(hidden, weight, bias, targets, ratio, backend=backend)[0]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*inputs), total(*inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[R, H\] floating point, got \[3\] float32"),
        ({"weight": torch.zeros(7, 5)}, r"weight must be \[V >= 1, 4\] float32, got \[7, 5\] float32"),
        ({"weight": torch.zeros(7, 4).double()}, r"weight must be .*, got \[7, 4\] float64"),
        ({"bias": torch.zeros(6)}, r"bias must be \[7\] float32, got \[6\] float32"),
        ({"targets": torch.zeros(3)}, r"targets must be \[3\] int32 or int64, got \[3\] float32"),
        ({"targets": torch.tensor([0, 7, 1])}, r"targets must be -100 or in 0 \.\. 6, got 7"),
        ({"targets": torch.tensor([0, -1, 1])}, r"targets must be -100 or in 0 \.\. 6, got -1"),
        ({"row_weight": torch.zeros(2)}, r"row_weight must be \[3\] floating point, got \[2\] float32"),
        ({"columns": (2, 8)}, r"columns must be a range within 0 \.\. 7, got \(2, 8\)"),
        ({"columns": (2, 2)}, r"columns must be a range within 0 \.\. 7, got \(2, 2\)"),
        ({"columns": (1, 7)}, r"targets must be -100 or in 1 \.\. 6, got 0"),
    ],
)
def test_linear_loss_refuses_bad_arguments(changes: dict[str, object], message: str):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "bias": None}
    arguments |= {"targets": torch.tensor([0, -100, 6]), "row_weight": torch.ones(3), **changes}
    with pytest.raises(UserError, match=f"^linear_loss: {message}"):
        linear_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_weight": "cosine"}, "score_weight must be one of sigma, none, discrete, got 'cosine'"),
        ({"score_columns": "some"}, "score_columns must be one of code, all, got 'some'"),
        ({"mask_ratio": torch.ones(3, 1)}, r"mask_ratio must be \[3\] floating point, got \[3, 1\]"),
        ({"num_image_tokens": 0}, "num_image_tokens and discrete_steps must be >= 1, got 0, 18"),
        ({"code_columns": (2, 9)}, r"code_columns must be a range within 0 \.\. 7, got \(2, 9\)"),
        ({"score_columns": "all", "code_columns": (4, 7)}, r"targets must be -100 or in 4 \.\. 6, got 3"),
    ],
)
def test_d3diff_loss_refuses_bad_arguments(changes: dict[str, object], message: str):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "bias": None, "num_image_tokens": 4}
    arguments |= {"targets": torch.tensor([3, -100, 6]), "mask_ratio": torch.ones(3), "code_columns": (3, 7), **changes}
    with pytest.raises(UserError, match=f"^d3diff_loss: {message}"):
        d3diff_loss(**arguments)


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({3: torch.tensor([1, 5, 2])}, r"targets must be -100 or in 1 \.\. 4, got 5"),
        ({3: torch.tensor([1, -1, 2], dtype=torch.int32)}, r"targets must be -100 or in 1 \.\. 4, got -1"),
        ({3: torch.ones(2, dtype=torch.int64)}, "targets, row_weight and mass_weight must have 3 elements"),
        ({1: torch.zeros(6, 5)}, r"hidden \[R, H\] and weight \[V, H\] must have the same H >= 1"),
        ({1: torch.zeros(6, 4).half()}, "hidden, weight and bias must have one dtype"),
        ({2: torch.zeros(5)}, "bias must have 6 elements"),
        ({6: [1, 7]}, r"columns must be a range within 0 \.\. 6"),
        ({5: torch.ones(3), 7: [0, 5]}, "mass_columns must be a range within columns"),
    ],
)
def test_native_op_refuses_what_would_read_out_of_bounds(changes: dict[int, object], message: str):
    """Compiled code skips the checks of the public function that read values."""
    arguments = [torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(6), torch.tensor([1, -100, 4]), torch.ones(3), None]
    arguments += [[1, 5], [1, 5], True]
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=f"^linear_loss: {message}"):
        _registry.registered("native", "linear_loss")(*arguments)


def test_double_backward_is_refused_not_wrong():
    inputs = head(LossShape(4, 3, 5, 4))
    hidden = inputs["hidden"].requires_grad_(True)
    with registered():
        loss, _ = linear_loss(hidden, inputs["weight"], None, torch.tensor([1, 2, 3, 4]), torch.ones(4))
    (grad,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
