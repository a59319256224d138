"""Which tile of a grouped GEMM a program works on: from the offsets of the routing plan alone, on the device.

Expert e owns the sorted rows offsets[e] .. offsets[e+1] - 1. Its rows are cut into tiles of BLOCK_M, the last one
ragged, so a tile never mixes experts and nothing is padded in memory. Tiles are numbered expert by expert:

    tiles(e)  = ceil((offsets[e+1] - offsets[e]) / BLOCK_M)
    ends(e)   = tiles(0) + .. + tiles(e)                     a vector of next_power_of_2(E + 1) integers in registers
    expert(i) = number of e with ends(e) <= i                the expert of tile i: one comparison and one sum

The rows from offsets[E] on belong to nobody. With REST they make up the tiles of an expert of number E, so that a
kernel whose outputs include these rows can zero them.

A grid of programs that stay (`programs`) takes the blocks pid, pid + programs, ..; a block is a row tile and a column
tile. The host knows no offsets, only how many blocks there may be at most; `ends` tells each program where to stop.
There is no other launch, no table in memory and no synchronisation. Cost: per program E + 1 offsets (from L2) and one
scan; per block two reductions over `ends`, for E < 32 within a warp.

Block order ("grouped", as in Triton's matmul tutorial, here within each expert): GROUP_M row tiles times all columns,
row tiles fastest. The blocks that run at one time then share few tiles of A and of B, whatever the number of columns:
each is read from memory once and from L2 afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


def padded_experts(num_experts: int) -> int:
    """Length of the vector `ends`: a slot for each expert and one for the rows of nobody."""
    return triton.next_power_of_2(num_experts + 1)


def max_tiles(rows: int, num_experts: int, block_m: int) -> int:
    """No plan of `rows` rows has more row tiles, those of nobody's rows included."""
    return (rows + min(num_experts + 1, rows) * (block_m - 1)) // block_m


@triton.jit
def tile_ends(offsets_ptr, rows, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, REST: tl.constexpr = False):
    """`ends` [EXPERTS] int32; its last element is the number of row tiles (`tile_count`).

    Offsets outside 0 .. rows are clamped, and their tiles counted up to `max_tiles`, for which there is memory where
    something is stored by tile: a spoilt plan gives wrong numbers but no store outside.
    """
    expert = tl.arange(0, EXPERTS)
    start = tl.load(offsets_ptr + expert, mask=expert <= num_experts, other=rows)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=rows)
    size = _clamp(end, rows) - _clamp(start, rows)
    mine = expert <= num_experts if REST else expert < num_experts
    tiles = tl.where(mine & (size > 0), (size + BLOCK_M - 1) // BLOCK_M, 0)
    most = (rows + tl.minimum(num_experts + 1, rows) * (BLOCK_M - 1)) // BLOCK_M
    return tl.minimum(tl.cumsum(tiles, 0), most)


@triton.jit
def tile_count(ends):
    """Number of row tiles."""
    return tl.max(ends, 0)


@triton.jit
def tiles_before(expert, ends, EXPERTS: tl.constexpr):
    """Number of the first tile of `expert`."""
    return tl.max(tl.where(tl.arange(0, EXPERTS) < expert, ends, 0), 0)


@triton.jit
def expert_rows(expert, offsets_ptr, rows, num_experts):
    """(first row, row after the last) of `expert`; number E owns the rows of nobody."""
    first = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=rows)
    return _clamp(first, rows), _clamp(end, rows)


@triton.jit
def block_at(index, columns, ends, offsets_ptr, rows, num_experts, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Block `index` of tile_count(ends) * columns: (expert, row tile, first row, end of expert's rows, column tile).

    The tile owns the rows first .. min(first + BLOCK_M, end) - 1.
    """
    done = ends * columns <= index
    expert = tl.sum(done.to(tl.int32), 0)
    before = tl.max(tl.where(done, ends, 0), 0)
    start, end = expert_rows(expert, offsets_ptr, rows, num_experts)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    inside = index - before * columns
    group = inside // (GROUP_M * columns)
    height = tl.minimum(tiles - group * GROUP_M, GROUP_M)  # the last group of an expert may be lower
    inside -= group * GROUP_M * columns
    tile = group * GROUP_M + inside % height
    return expert, before + tile, start + tile * BLOCK_M, end, inside // height


@triton.jit
def _clamp(row, rows):
    return tl.minimum(tl.maximum(row, 0), rows)
