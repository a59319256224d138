"""The schedule of the experts' Triton kernels: every row and column of a plan in one block, in the order meant.

Their activations are here too: against those of the reference, values and derivatives.
"""

from __future__ import annotations

import pytest
import torch

from tests.oracle import available_backends
from unif2ace.ops.experts import ACTIVATIONS, GATED, activate

if "triton" not in available_backends("experts"):
    pytest.skip("Triton kernels cannot run on this device", allow_module_level=True)

import triton
import triton.language as tl

from unif2ace.kernels import experts_activation, experts_schedule

PLANS = {
    "even": ([8, 8, 8], 0),
    "ragged": ([13, 1, 7, 16], 0),
    "empty-experts": ([0, 5, 0, 0, 9, 0], 0),
    "nothing": ([0, 0, 0], 0),
    "all-to-one": ([0, 77, 0], 0),
    "sentinels": ([3, 0, 5], 21),
    "only-sentinels": ([0, 0], 9),
    "many-experts": ([1, 0, 2] * 22 + [3, 3], 4),
}
WORDS = 5  # of a block


@triton.jit
def _write_blocks(
    out_ptr, count_ptr, offsets_ptr, rows, num_experts, columns, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    ends = experts_schedule.tile_ends(offsets_ptr, rows, num_experts, EXPERTS, BLOCK_M, REST)
    blocks = experts_schedule.tile_count(ends) * columns
    if tl.program_id(0) == 0:
        tl.store(count_ptr, blocks)
        for expert in range(num_experts + 1):
            tl.store(count_ptr + 1 + expert, experts_schedule.tiles_before(expert, ends, EXPERTS))
    for index in range(tl.program_id(0), blocks, tl.num_programs(0)):
        expert, tile, first, end, column = experts_schedule.block_at(
            index, columns, ends, offsets_ptr, rows, num_experts, BLOCK_M, GROUP_M
        )
        tl.store(out_ptr + index * 5, expert)
        tl.store(out_ptr + index * 5 + 1, tile)
        tl.store(out_ptr + index * 5 + 2, first)
        tl.store(out_ptr + index * 5 + 3, end)
        tl.store(out_ptr + index * 5 + 4, column)


def blocks_of(sizes: list[int], rest: int, columns: int, block_m: int, group_m: int, with_rest: bool):
    """All blocks in order, and the number of the first tile of each expert."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    rows, experts = sum(sizes) + rest, len(sizes)
    most = experts_schedule.max_tiles(rows, experts, block_m) * columns
    out = torch.full((most, WORDS), -1, dtype=torch.int32)
    count = torch.full((experts + 2,), -1, dtype=torch.int32)
    padded = experts_schedule.padded_experts(experts)
    _write_blocks[(3,)](
        out, count, offsets, rows, experts, columns, EXPERTS=padded, BLOCK_M=block_m, GROUP_M=group_m, REST=with_rest
    )
    blocks, *first_tiles = count.tolist()
    assert blocks <= most
    return out[:blocks].tolist(), first_tiles


def expected_blocks(sizes: list[int], columns: int, block_m: int, group_m: int):
    """The same by the words of the module: experts, then groups of row tiles, then columns, then row tiles."""
    blocks, first_tiles, row, tile = [], [], 0, 0
    for expert, size in enumerate(sizes):
        first_tiles.append(tile)
        tiles = range(-(-size // block_m))
        for group in range(0, len(tiles), group_m):
            for column in range(columns):
                for i in tiles[group : group + group_m]:
                    blocks.append([expert, tile + i, row + i * block_m, row + size, column])
        row += size
        tile += len(tiles)
    return blocks, first_tiles


@pytest.mark.parametrize("with_rest", [False, True], ids=["owned", "all-rows"])
@pytest.mark.parametrize(("columns", "block_m", "group_m"), [(1, 4, 8), (3, 4, 2), (2, 16, 1)])
@pytest.mark.parametrize("plan", PLANS)
def test_blocks(plan: str, columns: int, block_m: int, group_m: int, with_rest: bool):
    sizes, rest = PLANS[plan]
    found, first_tiles = blocks_of(sizes, rest, columns, block_m, group_m, with_rest)
    expected, starts = expected_blocks([*sizes, rest if with_rest else 0], columns, block_m, group_m)
    assert found == expected
    assert first_tiles == starts


SPOILT = [[0, 5, 2, 11], [0, 20, 24, 24], [-4, -1, 4, 6], [2**31 - 1, -(2**31), 0, 6], [0, 48, 0, 48]]


@pytest.mark.parametrize("offsets", SPOILT)
def test_spoilt_offsets_stay_inside(offsets: list[int]):
    rows = 48 if 48 in offsets else 6
    out = torch.full((64, WORDS), -1, dtype=torch.int32)
    count = torch.zeros(5, dtype=torch.int32)
    table = torch.tensor(offsets, dtype=torch.int32)
    _write_blocks[(1,)](out, count, table, rows, 3, 1, EXPERTS=4, BLOCK_M=4, GROUP_M=1, REST=True)
    blocks = out[: int(count[0])].tolist()
    assert all(0 <= expert <= 3 and 0 <= first < end <= rows for expert, _, first, end, _ in blocks)
    most = experts_schedule.max_tiles(rows, 3, 4)
    assert all(0 <= tile < most for _, tile, *_ in blocks)


@triton.jit
def _write_activation(
    pre_ptr, up_ptr, grad_ptr, value_ptr, gradients_ptr, ACTIVATION: tl.constexpr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    pre, up, grad = tl.load(pre_ptr + i), tl.load(up_ptr + i), tl.load(grad_ptr + i)
    value, to_pre, to_up = experts_activation.activation_gradient(pre, up, grad, ACTIVATION)
    tl.store(value_ptr + i, experts_activation.activate(pre, up, ACTIVATION))
    tl.store(value_ptr + SIZE + i, value)
    tl.store(gradients_ptr + i, to_pre)
    tl.store(gradients_ptr + SIZE + i, to_up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_derivatives(activation: str):
    size = 512
    pre = torch.cat([torch.linspace(-14, 14, size - 2), torch.tensor([-1e4, 1e4])])
    up, grad = torch.randn(size), torch.randn(size)
    values, gradients = torch.empty(2, size), torch.empty(2, size)
    _write_activation[(1,)](pre, up, grad, values, gradients, ACTIVATION=activation, SIZE=size)
    leaves = [x.double().requires_grad_(True) for x in ((pre, up) if activation in GATED else (pre,))]
    truth = activate(torch.cat(leaves), activation)
    slopes = torch.autograd.grad(truth, leaves, grad.double())
    torch.testing.assert_close(values[0].double(), truth.detach(), rtol=2e-6, atol=2e-6)
    assert torch.equal(values[0], values[1])
    for found, slope in zip(gradients, slopes, strict=False):
        torch.testing.assert_close(found.double(), slope, rtol=2e-6, atol=5e-6)


def test_no_activation_and_nan():
    x = torch.tensor([-1.0, 2.0, torch.nan, 0.0])
    values, gradients = torch.empty(2, 4), torch.empty(2, 4)
    for activation in ACTIVATIONS:
        _write_activation[(1,)](x, x, x, values, gradients, ACTIVATION=activation, SIZE=4)
        assert values[0].isnan().tolist() == [False, False, True, False]
