"""The small kernels of the backward of `experts`: the experts by load, and sums in a fixed order.

    experts_by_load_kernel   in which order the weight gradients are best begun
    row_sums_kernel          column sums of weighted rows per tile, and products of rows with a vector of their expert
    tile_sums_kernel         sums over the tiles of an expert
    slot_sums_kernel         sums over parts, from sorted rows back to slots
    segment_sums_kernel      sums of the rows that read the same row of `a` (grouped_gemm with gather)

All but the first are bound by memory and read every input once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unif2ace.kernels.experts_schedule import block_at, tile_count, tile_ends, tiles_before


@triton.jit(do_not_specialize=["experts"])
def experts_by_load_kernel(offsets_ptr, by_load_ptr, experts, EXPERTS: tl.constexpr):
    """One program: the experts by number of rows, largest first, equals by id."""
    ids = tl.arange(0, EXPERTS)
    real = ids < experts
    count = tl.load(offsets_ptr + 1 + ids, mask=real, other=0) - tl.load(offsets_ptr + ids, mask=real, other=0)
    rank = tl.zeros((EXPERTS,), tl.int32)
    for other in range(experts):
        rows = tl.load(offsets_ptr + other + 1) - tl.load(offsets_ptr + other)
        rank += ((rows > count) | ((rows == count) & (other < ids))).to(tl.int32)
    tl.store(by_load_ptr + rank, ids, mask=real)


@triton.jit(do_not_specialize=["experts", "slots"])
def row_sums_kernel(
    source_ptr,  # [.., width]
    index_ptr,  # [M] or None: sorted row m reads source row index[m] // TOP_K
    weights_ptr,  # [M] by index, or None for weights 1
    vectors_ptr,  # [E, width] or None: no products
    offsets_ptr,
    sums_ptr,  # out [tiles, width] float32: sum of weight * row over the rows of a tile
    dots_ptr,  # out [column tiles, M] float32: <row, vector of the expert>
    experts,
    slots,
    width,
    stride_source,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Tiles are the fast axis: while one strip of columns is summed, the strip stays in the L2 cache for all K slots.
    tile, strip = tl.program_id(0), tl.program_id(1)
    ends = tile_ends(offsets_ptr, slots, experts, EXPERTS, BLOCK_M)
    if tile < tile_count(ends):
        expert, _, first, end, _ = block_at(tile, 1, ends, offsets_ptr, slots, experts, BLOCK_M, 1)
        rows, columns = first + tl.arange(0, BLOCK_M), strip * BLOCK_N + tl.arange(0, BLOCK_N)
        live = rows < end
        index = rows if index_ptr is None else tl.load(index_ptr + rows, mask=live, other=0)
        places = (index // TOP_K)[:, None].to(tl.int64) * stride_source + columns[None, :]
        x = tl.load(source_ptr + places, mask=live[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)
        if vectors_ptr is not None:
            vector = tl.load(vectors_ptr + expert.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
            dots = tl.sum(x * vector.to(tl.float32)[None, :], 1)
            tl.store(dots_ptr + strip.to(tl.int64) * slots + rows, dots, mask=live)
        if weights_ptr is not None:
            x *= tl.load(weights_ptr + index, mask=live, other=0.0).to(tl.float32)[:, None]
        tl.store(sums_ptr + tile.to(tl.int64) * width + columns, tl.sum(x, 0), mask=columns < width)


@triton.jit(do_not_specialize=["experts", "slots"])
def tile_sums_kernel(
    sums_ptr,  # [tiles of TILE_ROWS rows, width]
    offsets_ptr,
    out_ptr,  # [E, width]
    experts,
    slots,
    width,
    EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e] = sum of sums[i] over the tiles i of expert e; zeros where it has none."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ends = tile_ends(offsets_ptr, slots, experts, EXPERTS, TILE_ROWS)
    begin, end = tiles_before(expert, ends, EXPERTS), tiles_before(expert + 1, ends, EXPERTS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(begin, end, BLOCK_M):
        tiles = first + tl.arange(0, BLOCK_M)
        places = tiles[:, None].to(tl.int64) * width + columns[None, :]
        total += tl.load(sums_ptr + places, mask=(tiles < end)[:, None] & (columns < width)[None, :], other=0.0)
    out = out_ptr + expert.to(tl.int64) * width + columns
    tl.store(out, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["slots"])
def slot_sums_kernel(parts_ptr, position_ptr, total_ptr, out_ptr, parts, slots, BLOCK: tl.constexpr):
    """out[s] = sum over j of parts[j, position[s]]; zero where that row is beyond the last offset, `total_ptr[0]`."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position_ptr + slot, mask=slot < slots, other=0)
    live = (slot < slots) & (row < tl.load(total_ptr))
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts_ptr + row
    for _ in range(parts):
        total += tl.load(part, mask=live, other=0.0)
        part += slots
    tl.store(out_ptr + slot, total.to(out_ptr.dtype.element_ty), mask=slot < slots)


@triton.jit
def segment_sums_kernel(
    rows_ptr,  # [M, width]
    members_ptr,  # [M] numbers of rows
    starts_ptr,  # [outputs + 1]
    total_ptr,  # members at or beyond this number are left out
    out_ptr,  # [outputs, width]
    width,
    BLOCK_N: tl.constexpr,
):
    """out[t] = sum of rows[members[j]] over j = starts[t] .. starts[t + 1] - 1, in this order, in float32."""
    output = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = tl.load(total_ptr)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(tl.load(starts_ptr + output), tl.load(starts_ptr + output + 1)):
        row = tl.load(members_ptr + j)
        some = (row < limit) & (columns < width)
        total += tl.load(rows_ptr + row.to(tl.int64) * width + columns, mask=some, other=0.0).to(tl.float32)
    tl.store(out_ptr + output.to(tl.int64) * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)
