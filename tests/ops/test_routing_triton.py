"""What is particular to kernels/routing.py: tiles of the size that GPUs use, bits of scores, arguments out of range."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from benchmarks.shapes import ROUTING_SMALL, RoutingShape, token_groups
from tests.oracle import available_backends, poisoned
from unif2ace.errors import UserError
from unif2ace.ops import _registry, route

pytestmark = pytest.mark.skipif("triton" not in available_backends("routing"), reason="Triton cannot run routing here")


def problem(shape: RoutingShape) -> dict[str, object]:
    logits = torch.randn(shape.tokens, shape.experts).mul(2)
    logits[:, ::3] = logits[:, ::3].round()
    groups = token_groups(shape)
    group = None if groups is None else torch.tensor(groups, dtype=torch.int32)[torch.randperm(shape.tokens)]
    return {"logits": logits, "top_k": shape.top_k, "token_group": group, "group_bounds": shape.group_bounds}


@pytest.mark.parametrize("name", ["unequal-groups", "many-experts"])
@pytest.mark.parametrize("tile", [8, 32])
def test_many_tiles(name: str, tile: int):
    """Under the interpreter tiles are large; with the small ones of GPUs the scan has something to do."""
    from unif2ace.kernels import routing as kernels

    arguments = problem(ROUTING_SMALL[name])
    expected = route(**arguments, backend="reference")
    columns = kernels._tile(1, arguments["logits"].shape[1])[1]
    with (
        poisoned(),
        mock.patch.object(kernels, "_tile", return_value=(tile, columns, 4)),
        mock.patch.object(kernels, "_SCAN_TILES", 4),
    ):
        plan = route(**arguments, backend="triton")
        logits = arguments["logits"].requires_grad_(True)
        outputs = route(**arguments, backend="triton")
        (grad,) = torch.autograd.grad(outputs.logsumexp.sum() + outputs.importance.square().sum(), logits)
    for field in ("experts", "offsets", "order", "position", "load"):
        assert torch.equal(getattr(plan, field), getattr(expected, field)), field
    torch.testing.assert_close(plan.importance, expected.importance)
    outputs = route(**arguments, backend="reference")
    (wanted,) = torch.autograd.grad(outputs.logsumexp.sum() + outputs.importance.square().sum(), logits)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted by Triton's interpreter")
@pytest.mark.parametrize("name", ["one-token", "unequal-groups"])
def test_three_launches_and_one(name: str):
    from triton.runtime.interpreter import GridExecutor

    arguments = problem(ROUTING_SMALL[name])
    with mock.patch.object(GridExecutor, "__call__", autospec=True, side_effect=GridExecutor.__call__) as launch:
        plan = route(**{**arguments, "logits": arguments["logits"].requires_grad_(True)}, backend="triton")
        assert launch.call_count == 3
        plan.weights.sum().backward()
        assert launch.call_count == 4


@pytest.mark.skipif("native" not in available_backends("routing"), reason="the compiled module is not built")
def test_choice_by_a_sigmoid_hangs_on_its_last_bit():
    """Near 1 many scores differ by one rounding or not at all: only equal bits give equal experts."""
    logits = 12.0 + 5.0 * torch.rand(500, 32)
    options = {"scoring": "sigmoid", "selection_bias": torch.zeros(32)}
    plain = route(logits, 4, backend="native", scoring="sigmoid")
    native = route(logits, 4, backend="native", **options)
    triton = route(logits, 4, backend="triton", **options)
    assert not torch.equal(native.experts, plain.experts)
    assert torch.equal(triton.experts, native.experts)


@pytest.mark.parametrize("group", [-(2**31), -1, 3, 2**31 - 1])
def test_group_out_of_range_counts_as_the_nearest(group: int):
    arguments = problem(ROUTING_SMALL["unequal-groups"])
    nearest = arguments["token_group"].clone()
    arguments["token_group"][30], nearest[30] = group, 0 if group < 0 else 2
    plan = route(**arguments, check_finite=False, backend="triton")
    wanted = route(**{**arguments, "token_group": nearest}, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(plan, wanted, strict=True))


def test_not_a_number_stays_inside_the_plan():
    arguments = problem(ROUTING_SMALL["unequal-groups"])
    arguments["logits"][::2, ::2] = torch.nan
    arguments["logits"].view(torch.int32)[1::2, ::3] = -1  # the NaN of all ones
    plan = route(**arguments, check_finite=False, backend="triton")
    bounds, group = torch.tensor(arguments["group_bounds"]), arguments["token_group"].long()
    assert ((plan.experts >= bounds[group][:, None]) & (plan.experts < bounds[group + 1][:, None])).all()
    assert all(len(set(row)) == 3 for row in plan.experts.tolist())
    assert torch.equal(plan.order.sort().values, torch.arange(61 * 3, dtype=torch.int32))


def test_experts_out_of_range_are_harmless_in_the_backward():
    arguments = problem(ROUTING_SMALL["unequal-groups"])
    experts = torch.full((61, 3), 2**31 - 1, dtype=torch.int32)
    experts[::2] = -(2**31)
    backward = _registry.registered("triton", "route_backward")
    grads = [torch.ones(61, 3), torch.ones(31), torch.ones(61)]
    bounds = list(arguments["group_bounds"])
    grad = backward(*grads, arguments["logits"], experts, arguments["token_group"], bounds, "softmax", True, 1.0)
    assert grad.isfinite().all()


def test_more_experts_than_a_tile_holds_are_refused():
    with pytest.raises(UserError, match=r"route: the Triton kernels take up to 1024 experts, got 1025"):
        route(torch.zeros(2, 1025), 1, backend="triton")
