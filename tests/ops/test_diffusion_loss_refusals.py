"""The losses as registered ops, in compiled graphs, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import LOSS_SMALL, LossShape
from tests.bits import needs_native
from tests.ops.losses import code_columns, code_targets, d3diff, head, mask_ratios
from tests.oracle import available_backends, registered
from unif2ace.errors import UserError
from unif2ace.ops import _registry, d3diff_loss, linear_loss
from unif2ace.ops.diffusion_loss import SCORE_COLUMNS

each_backend = pytest.mark.parametrize("backend", available_backends("diffusion_loss"))
each_columns = pytest.mark.parametrize("score_columns", SCORE_COLUMNS)


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
        inputs = {"hidden": 2 * hidden, "weight": weight, "bias": bias, "backend": backend}
        first = d3diff(targets, code_columns(shape), **inputs, score_columns=score_columns)
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
