"""Linear head + loss: values and gradients against the definitions, the identities of the D3Diff loss.

Chunks, blocks, memory and threads are in test_diffusion_loss_kernels.py, refusals in test_diffusion_loss_refusals.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import LOSS_SMALL, LossShape
from tests.ops.losses import IMAGE_TOKENS, code_columns, code_targets, d3diff, head, mask_ratios
from tests.oracle import assert_matches_reference, available_backends, backend_cases, noncontiguous
from unif2ace.ops import d3diff_loss, linear_loss
from unif2ace.ops.diffusion_loss import (
    SCORE_COLUMNS,
    SCORE_WEIGHTS,
    _time,
    reference_d3diff_loss,
    reference_linear_loss,
    score_constant,
)

each_backend = pytest.mark.parametrize("backend", available_backends("diffusion_loss"))
each_case = pytest.mark.parametrize(("backend", "dtype"), backend_cases("diffusion_loss"), ids=str)
each_shape = pytest.mark.parametrize("shape", LOSS_SMALL.values(), ids=LOSS_SMALL.keys())
each_weight = pytest.mark.parametrize("score_weight", SCORE_WEIGHTS)
each_columns = pytest.mark.parametrize("score_columns", SCORE_COLUMNS)


@pytest.fixture(params=[1 << 19, 100], ids=["one-chunk", "many-chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with all rows in one chunk, and again with a row or so in each."""
    monkeypatch.setattr("unif2ace.ops.diffusion_loss.CHUNK_ELEMENTS", request.param)


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
    targets, options = code_targets(shape), {"score_columns": score_columns, "alpha": 0.1}

    def run(backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        return (d3diff(targets, code_columns(shape), **inputs, **options, backend=backend).total,)

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
    assert float(d3diff(code_targets(shape), code_columns(shape), **head(shape)).score) > 0


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
