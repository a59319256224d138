"""The three matrix kernels of the backward of `experts`; `experts_backward.py` has formulas, costs and order of calls.

    activation_gradient_kernel   D = G W_down; epilogue: w a and dP, <D, a> of each row, column sums of dP
    input_gradient_kernel        R = dP W_up, the rows that the gradient of x is summed from
    weight_gradient_kernel       (w a)^T G and dP^T X over all rows of an expert, both in one launch

**Stored by tile.** The sorted rows of each expert are cut into tiles of BLOCK_M rows. `factors` = [w a | dP], which the
first kernel writes for the other two, gives tile i the rows i * BLOCK_M .. (i + 1) * BLOCK_M - 1 and fills an expert's
last tile up with zeros. So its readers need no row masks, whole tiles travel by the copy engine (TMA), and where an
expert's rows end the product over the token axis adds zeros instead of the next expert's rows.

**Order of sums.** Every product adds its terms in ascending order in steps of BLOCK_K, whatever the other tile sizes;
a row's gradient does not depend on how many rows there are. The column sums of a tile and the pieces of <D, a> are
stored and added up in a fixed order by `experts_sums.py`.

bfloat16 and float16 go through the tensor cores; float32 is multiplied in IEEE arithmetic, because TF32 would be ten
bits where the reference has 23.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unif2ace.kernels.experts_activation import activation_gradient, columns_of
from unif2ace.kernels.experts_schedule import block_at, expert_rows, tile_count, tile_ends, tiles_before


@triton.jit
def matrix_tile(
    matrices,
    expert,
    row,
    column,
    rows,
    columns,
    stride_expert,
    stride_row,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """matrices[expert, row : row + BLOCK_K, column : column + BLOCK_N], zeros outside [rows, columns]."""
    if TMA:
        tile = matrices.load([expert, row, column]).reshape(BLOCK_K, BLOCK_N)
    else:
        ks, ns = row + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_N)
        matrix = matrices + expert.to(tl.int64) * stride_expert
        places = ks[:, None].to(tl.int64) * stride_row + ns[None, :]
        tile = tl.load(matrix + places, mask=(ks < rows)[:, None] & (ns < columns)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["experts", "slots"])  # they vary from call to call; each variant is compiled anew
def activation_gradient_kernel(
    grad_ptr,  # G [T, hidden]
    w_down,  # [E, hidden, inner]
    pre_ptr,  # P [M, inner or 2 inner]
    weights_ptr,  # [M], by slot
    order_ptr,  # [M]
    offsets_ptr,  # [E + 1]
    factors_ptr,  # out [tiles * BLOCK_M, inner + columns of P]
    dots_ptr,  # out [pieces of inner, M] float32: <D, a> over PIECE columns
    sums_ptr,  # out [tiles, columns of P] float32: column sums of dP
    experts,
    slots,
    hidden,
    inner,
    stride_grad,
    stride_expert,
    stride_row,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,
    TMA: tl.constexpr,
):
    dtype = factors_ptr.dtype.element_ty
    up_rows = 2 * inner if GATED else inner
    width = inner + up_rows
    column_tiles = tl.cdiv(inner, BLOCK_N)
    ends = tile_ends(offsets_ptr, slots, experts, EXPERTS, BLOCK_M)
    items = tile_count(ends) * column_tiles
    # Hoisting the addresses of the epilogue out of this loop would keep them in registers during the product.
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        expert, tile, first, end, column_tile = block_at(
            item, column_tiles, ends, offsets_ptr, slots, experts, BLOCK_M, GROUP_M
        )
        in_tile, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        rows = first + in_tile
        live = rows < end
        slot = tl.load(order_ptr + rows, mask=live, other=0)
        places = (slot // TOP_K).to(tl.int64)[:, None] * stride_grad + ks[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, hidden, BLOCK_K):
            g = tl.load(grad_ptr + k + places, mask=live[:, None] & (ks < hidden - k)[None, :], other=0.0)
            w = matrix_tile(
                w_down,
                expert,
                k,
                column_tile * BLOCK_N,
                hidden,
                inner,
                stride_expert,
                stride_row,
                BLOCK_K,
                BLOCK_N,
                TMA,
            )
            acc = tl.dot(g, w, acc, input_precision="ieee")

        # PIECE columns at a time: activation, slope and products of the whole tile would not fit into the registers.
        weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        PIECES: tl.constexpr = BLOCK_N // PIECE
        for piece in tl.static_range(PIECES):
            grad_act = columns_of(acc, piece, PIECES)
            columns = column_tile * BLOCK_N + piece * PIECE + tl.arange(0, PIECE)
            exists = columns < inner
            inside = live[:, None] & exists[None, :]
            source = pre_ptr + first.to(tl.int64) * up_rows + (in_tile[:, None] * up_rows + columns[None, :])
            pre = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(source + inner, mask=inside, other=0.0).to(tl.float32) if GATED else pre
            act, grad_pre, grad_up = activation_gradient(pre, up, grad_act * weight, ACTIVATION)
            # One row of `dots` per piece: a sum carried from piece to piece would cost the registers that spill.
            dots = dots_ptr + (column_tile * PIECES + piece).to(tl.int64) * slots + rows
            tl.store(dots, tl.sum(grad_act * act, 1), mask=live)
            # Rows beyond `end` have weight 0 and pre-activation 0: they become the zeros of the padding.
            out = factors_ptr + (tile * BLOCK_M).to(tl.int64) * width + (in_tile[:, None] * width + columns[None, :])
            sums = sums_ptr + tile.to(tl.int64) * up_rows + columns
            tl.store(out, (act * weight).to(dtype), mask=exists[None, :])
            tl.store(out + inner, grad_pre.to(dtype), mask=exists[None, :])
            tl.store(sums, tl.sum(grad_pre, 0), mask=exists)
            if GATED:
                tl.store(out + 2 * inner, grad_up.to(dtype), mask=exists[None, :])
                tl.store(sums + inner, tl.sum(grad_up, 0), mask=exists)


@triton.jit(do_not_specialize=["experts", "slots"])
def input_gradient_kernel(
    left,  # BY_TILE: factors [tiles * BLOCK_M, ..], of which columns from `skip` on count; else sorted rows [M, depth]
    matrices,  # [E, depth, width]
    offsets_ptr,
    out_ptr,  # [M, width], sorted rows; without BY_TILE those beyond the last offset become zeros
    experts,
    slots,
    skip,
    depth,
    width,
    stride_left,
    stride_expert,
    stride_row,
    BY_TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BLOCK_N)
    ends = tile_ends(offsets_ptr, slots, experts, EXPERTS, BLOCK_M, not BY_TILE)
    items = tile_count(ends) * column_tiles
    # One loop over all tiles (`flatten`) lets the copy engine fetch the next tile's operands while this one is stored.
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=TMA and BY_TILE):
        expert, tile, first, end, column_tile = block_at(
            item, column_tiles, ends, offsets_ptr, slots, experts, BLOCK_M, GROUP_M
        )
        column = column_tile * BLOCK_N
        rows, ks = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        live = rows < end
        start = tile * BLOCK_M if BY_TILE else first
        terms = depth if BY_TILE else tl.where(expert < experts, depth, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, terms, BLOCK_K):
            if TMA and BY_TILE:
                a = left.load([start, skip + k])
            else:
                places = tl.arange(0, BLOCK_M).to(tl.int64)[:, None] * stride_left + ks[None, :]
                some = (ks < depth - k)[None, :] & (live[:, None] | BY_TILE)
                a = tl.load(left + start.to(tl.int64) * stride_left + skip + k + places, mask=some, other=0.0)
            b = matrix_tile(matrices, expert, k, column, depth, width, stride_expert, stride_row, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        columns = column + tl.arange(0, BLOCK_N)
        out = out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["experts", "slots"])
def weight_gradient_kernel(
    left,  # BY_TILE: factors [tiles * BLOCK_M, split + ..]; else sorted rows [M, ..]
    first_ptr,  # rows that meet the left columns below `split`
    second_ptr,  # rows that meet the others
    index_ptr,  # [M] or None: sorted row m reads row index[m] // TOP_K of either
    offsets_ptr,
    by_load_ptr,  # [E] experts, the one with most rows first
    first_out_ptr,  # [E, width, split]: transposed
    second_out_ptr,  # [E, left columns - split, width]
    experts,
    slots,
    split,
    left_columns,
    width,
    stride_left,
    stride_first,
    stride_second,
    TOP_K: tl.constexpr,
    BY_TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    dtype = second_out_ptr.dtype.element_ty
    column_tiles = tl.cdiv(width, BLOCK_N)
    first_tiles = tl.cdiv(split, BLOCK_M)
    items = (first_tiles + tl.cdiv(left_columns - split, BLOCK_M)) * column_tiles  # of one expert
    expert = tl.load(by_load_ptr + tl.program_id(0) // items)
    item = tl.program_id(0) % items
    left_tile, column = item // column_tiles, (item % column_tiles) * BLOCK_N
    # Which of the two products: a choice of pointers, so that there is one loop.
    is_first = left_tile < first_tiles
    left_column = tl.where(is_first, left_tile * BLOCK_M, split + (left_tile - first_tiles) * BLOCK_M)
    right_ptr = tl.where(is_first, first_ptr, second_ptr)
    stride_right = tl.where(is_first, stride_first, stride_second)

    begin, end = expert_rows(expert, offsets_ptr, slots, experts)
    start = begin
    if BY_TILE:
        ends = tile_ends(offsets_ptr, slots, experts, EXPERTS, TILE_ROWS)
        start = tiles_before(expert, ends, EXPERTS) * TILE_ROWS
    ks = tl.arange(0, BLOCK_K)
    columns, left_columns_here = column + tl.arange(0, BLOCK_N), left_column + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, end - begin, BLOCK_K):
        rows = begin + k + ks
        live = rows < end
        if TMA:
            a = tl.trans(left.load([start + k, left_column]))
        else:  # loaded transposed: a transposition after the load would keep it out of the asynchronous copies
            places = left_columns_here[:, None] + (start + k + ks)[None, :].to(tl.int64) * stride_left
            some = (left_columns_here < left_columns)[:, None] & (live[None, :] | BY_TILE)
            a = tl.load(left + places, mask=some, other=0.0)
        source = rows if index_ptr is None else tl.load(index_ptr + rows, mask=live, other=0) // TOP_K
        places = source[:, None].to(tl.int64) * stride_right + columns[None, :]
        b = tl.load(right_ptr + places, mask=live[:, None] & (columns < width)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")

    value = acc.to(dtype)
    exists = (columns < width)[None, :]
    if is_first:
        matrix = first_out_ptr + expert.to(tl.int64) * width * split
        places = columns[:, None].to(tl.int64) * split + left_columns_here[None, :]
        tl.store(
            matrix + places, tl.trans(value), mask=(columns < width)[:, None] & (left_columns_here < split)[None, :]
        )
    else:
        matrix = second_out_ptr + expert.to(tl.int64) * width * (left_columns - split)
        places_up = (left_columns_here - split)[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(matrix + places_up, value, mask=(left_columns_here < left_columns)[:, None] & exists)
