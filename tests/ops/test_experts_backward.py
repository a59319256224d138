"""The Triton backward of the experts where the tests of the op do not reach: its tiles, orders and ranges of numbers.

Operands that are small whole numbers make every sum exact, whatever its order; so results of different tile sizes and
loads through pointers or descriptors have to be equal to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from benchmarks.shapes import ExpertShape
from tests.ops.test_experts import Tensors, plan_of, problem
from tests.oracle import available_backends, poisoned
from unif2ace.ops import RoutingPlan
from unif2ace.ops.experts import reference_expert_mlp

if "triton" not in available_backends("experts"):
    pytest.skip("Triton kernels cannot run on this device", allow_module_level=True)

from unif2ace.kernels import _device, experts_backward, experts_sums
from unif2ace.kernels.experts_config import Config

NAMES = ("x", "weights", "w_up", "w_down", "b_up", "b_down")


def whole(*shape: int, limit: int = 2) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape).float()


def whole_problem(shape: ExpertShape) -> tuple[Tensors, RoutingPlan, torch.Tensor, torch.Tensor]:
    """Arguments by name, plan, gradient of y and pre-activation, all whole numbers; a third of the slots are sentinels.

    relu2 keeps whole numbers whole.
    """
    tensors = {
        "x": whole(shape.tokens, shape.hidden, limit=1),
        "weights": whole(shape.tokens, shape.top_k),
        "w_up": whole(shape.experts, shape.up_rows, shape.hidden, limit=1),
        "w_down": whole(shape.experts, shape.hidden, shape.inner, limit=1),
        "b_up": whole(shape.experts, shape.up_rows),
        "b_down": whole(shape.experts, shape.hidden),
    }
    experts = torch.randint(shape.experts * 3 // 2, (shape.tokens, shape.top_k))
    plan = plan_of(experts, tensors["weights"], shape.experts)
    return tensors, plan, whole(shape.tokens, shape.hidden), whole(shape.tokens * shape.top_k, shape.up_rows)


def backward(
    tensors: Tensors, plan: RoutingPlan, grad: torch.Tensor, pre: torch.Tensor, activation: str
) -> dict[str, torch.Tensor]:
    x, weights, w_up, w_down, b_up, b_down = (tensors[name] for name in NAMES)
    index = plan.offsets, plan.order, plan.position
    found = experts_backward.expert_mlp_backward(grad, x, pre, weights, *index, w_up, w_down, b_up, b_down, activation)
    return dict(zip(NAMES, found, strict=True))


@contextlib.contextmanager
def launched_with(rows: Config, matrices: Config) -> Iterator[None]:
    with (
        mock.patch.object(experts_backward, "row_gradients", side_effect=lambda products, _: [rows] * len(products)),
        mock.patch.object(experts_backward, "matrix_gradient", return_value=matrices),
    ):
        yield


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in NAMES:
        assert torch.equal(found[name], expected[name]), f"gradient of {name} differs"


@pytest.mark.parametrize("rows", [Config(16, 32, 16, 4, 1, piece=16), Config(64, 16, 32, 4, 1, piece=16, group_m=1)])
def test_tile_sizes_do_not_matter(rows: Config):
    arguments = whole_problem(ExpertShape(70, 40, 24, 3, 2, "relu2"))
    expected = backward(*arguments, "relu2")
    with launched_with(rows, Config(32, 16, 16, 4, 1)):
        assert_same(backward(*arguments, "relu2"), expected)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_descriptors_read_what_pointers_read(activation: str):
    tensors, plan, grad, pre = whole_problem(ExpertShape(50, 24, 40, 3, 2, activation))
    tensors = {name: t.half() if name != "weights" else t for name, t in tensors.items()}
    arguments = tensors, plan, grad.half(), pre.half()
    expected = backward(*arguments, activation)
    descriptor = mock.Mock(wraps=experts_backward.TensorDescriptor)
    with _device.compiling_for(90), mock.patch.object(experts_backward, "TensorDescriptor", descriptor):
        found = backward(*arguments, activation)
    assert descriptor.from_tensor.call_count == 4  # w_down, factors twice, w_up
    assert_same(found, expected)


def test_rows_of_no_expert_are_never_read():
    """Neither their pre-activation nor anything that the backward itself leaves unwritten there."""
    tensors, plan, grad, pre = whole_problem(ExpertShape(40, 16, 24, 3, 2, "relu2"))
    expected = backward(tensors, plan, grad, pre, "relu2")
    pre[int(plan.offsets[-1]) :] = torch.nan
    with poisoned():
        found = backward(tensors, plan, grad, pre, "relu2")
    assert_same(found, expected)
    assert not found["weights"][plan.experts >= 3].any()
    assert found["weights"][plan.experts < 3].any()


def test_a_nan_stays_with_its_expert():
    """Tiles of one expert do not touch the rows of the next, not even to multiply them by zero."""
    tensors, plan, grad, pre = whole_problem(ExpertShape(40, 16, 24, 3, 1, "relu2"))
    low, high = plan.offsets[1:3].tolist()
    grad[plan.order[low:high].long()] = torch.nan
    found = backward(tensors, plan, grad, pre, "relu2")
    for name in ("w_up", "w_down", "b_up", "b_down"):
        assert found[name][1].isnan().any()
        assert not found[name][[0, 2]].isnan().any(), name
    assert not found["x"][plan.experts[:, 0] != 1].isnan().any()


@pytest.mark.parametrize("sizes", [[3, 9, 0, 9, 1], [0], [5, 4, 3, 2, 1, 0], [0, 0, 7]])
def test_experts_by_load(sizes: list[int]):
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    found = offsets.new_empty(len(sizes))
    experts_sums.experts_by_load_kernel[(1,)](offsets, found, len(sizes), EXPERTS=16)
    assert found.tolist() == sorted(range(len(sizes)), key=lambda e: (-sizes[e], e))


def test_what_exceeds_half_precision_on_the_way_does_not_overflow():
    """D = G W_down reaches 3e5 and meets a weight of 1e-4; only their products, in range again, are rounded."""
    shape = ExpertShape(9, 64, 64, 2, 1, "gelu_tanh")
    tensors, experts = problem(shape)
    tensors["weights"] = torch.full((9, 1), 1e-4)
    tensors["w_down"] = tensors["w_down"].abs() * 8
    tensors = {name: t.half() if name != "weights" else t for name, t in tensors.items()}
    grad = torch.full((9, 64), 6e3, dtype=torch.float16)
    assert (grad[:1].float() @ tensors["w_down"][0].float()).max() > 3e5
    plan = plan_of(experts, tensors["weights"], 2)
    leaves = {name: t.double().requires_grad_(True) for name, t in tensors.items()}
    index = plan.offsets, plan.order, plan.position
    y, pre = reference_expert_mlp(
        leaves["x"], leaves["weights"], *index, *(leaves[name] for name in NAMES[2:]), "gelu_tanh"
    )
    expected = torch.autograd.grad(y, [leaves[name] for name in NAMES], grad.double())
    found = backward(tensors, plan, grad, pre.detach().half(), "gelu_tanh")
    for name, want in zip(NAMES, expected, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(found[name].double(), want, rtol=0, atol=2e-3 * scale, msg=f"gradient of {name}")


@pytest.mark.gpu  # the interpreter multiplies with a BLAS whose bits depend on a row's place
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_gradients_of_a_token_do_not_depend_on_the_others(activation: str, dtype: torch.dtype):
    """Those of x and the routing weights, among many tokens (tiles of 128 rows) and among few (64 rows)."""
    shape = ExpertShape(900, 256, 320, 3, 2, activation)
    tensors, experts = problem(shape)
    tensors = {name: t.to(dtype) if name != "weights" else t for name, t in tensors.items()}
    grad, pre = torch.randn(900, 256, dtype=dtype), torch.randn(1800, shape.up_rows, dtype=dtype)
    plan = plan_of(experts, tensors["weights"], 3)
    every = backward(tensors, plan, grad, pre[plan.order.long()], activation)
    some = slice(111, 160)
    part = {**tensors, "x": tensors["x"][some], "weights": tensors["weights"][some]}
    plan = plan_of(experts[some], part["weights"], 3)
    few = backward(part, plan, grad[some], pre[222:320][plan.order.long()], activation)
    for name in ("x", "weights"):
        assert torch.equal(few[name], every[name][some]), f"gradient of {name}"


@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gather"])
def test_grouped_gemm_ignores_what_no_expert_owns(gathered: bool):
    """Rows of the gradient beyond the last offset are NaN; rows of `a` that nobody else reads get exact zeros."""
    offsets = torch.tensor([0, 20, 20, 33], dtype=torch.int32)
    a, b, bias, grad = whole(40, 24), whole(3, 17, 24), whole(3, 17), whole(40, 17)
    gather = torch.cat([torch.arange(33) // 2, torch.arange(33, 40)]).int() if gathered else None
    grad[33:] = torch.nan
    with poisoned():
        grad_a, grad_b, grad_bias = experts_backward.grouped_gemm_backward(grad, a, b, offsets, bias, gather)
    expert = torch.tensor([0] * 20 + [2] * 13)
    of_rows = torch.einsum("mn,mnk->mk", grad[:33], b[expert])
    rows = a[:33] if gather is None else a[gather[:33].long()]
    target = torch.arange(33) if gather is None else gather[:33].long()
    assert torch.equal(grad_a, torch.zeros_like(a).index_add(0, target, of_rows))
    for e, part in enumerate((slice(0, 20), slice(20, 20), slice(20, 33))):
        assert torch.equal(grad_b[e], grad[part].T @ rows[part])
        assert torch.equal(grad_bias[e], grad[part].sum(0))
