"""The two kernels of the forward of `experts`: a grouped product with its epilogue, and the weighted sum over choices.

**grouped_product_kernel** computes, for the sorted rows m of every expert e,

    out[m] = act(b[e] a[source(m)] + bias[e])        source(m) = m, or index[m] // TOP_K: the gather

and is all of `grouped_gemm` and both products of `expert_mlp`. What makes it fast:

* Programs stay and take blocks in the order of `experts_schedule`; no block mixes experts.
* The gather is in the load: each thread copies 16-byte pieces of its rows straight into shared memory (cp.async), the
  rows' addresses are computed once per block. Rows beyond an expert's end read its last row again instead of being
  masked, so the loop has no row mask; what they give is not stored.
* On Hopper the matrices (and rows that are not gathered) come by TMA: one thread asks for a whole tile, and it takes
  neither registers nor addresses. What lies outside a matrix arrives as zeros.
* Gated activations: a block computes the same columns of gate and up. The TMA box has both, [2, BLOCK_N, BLOCK_K], and
  is one operand of 2 * BLOCK_N rows for one product; gate and up of an element end in the same thread.
* Few rows per expert (SWAP): the matrix is the left operand and the rows the right one, so that Hopper's instruction,
  which is 64 high, multiplies 64 rows of the matrix with as few as 16 tokens instead of padding the tokens to 64.
* FLATTEN makes one loop of blocks and steps: the copy engine fetches the next block's operands during this epilogue.
  Without effect where the number of steps varies (REST), and of no use for gathered rows (it spills).
* SPLIT: programs work in rounds, one block each. If fewer than half of them had a block in the last round, its blocks
  are cut into two halves of their columns and shared out; the round is half as long.

Sums are in float32 over k in ascending order, by the same instructions whatever the tile sizes and whichever operand is
on the left: a row does not depend on the rows around it.
float32 operands are multiplied in IEEE arithmetic, because TF32 has ten bits where the reference has 23.

**combine_kernel** computes y_t = sum_k weights[t, k] * rows[position[t * K + k]] in float32, k = 0, 1, ..: each token
fetches its K rows, so there are no atomics and no order that could vary. Bound by memory: (K + 1) * T * H elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels._device import INTERPRETED
from unif2ace.kernels.experts_activation import activate, columns_of
from unif2ace.kernels.experts_schedule import block_at, tile_count, tile_ends


@triton.jit(do_not_specialize=["rows", "num_experts"])  # they vary from call to call; each variant is compiled anew
def grouped_product_kernel(
    a,  # [.., depth]; TMA_A: its descriptor
    b,  # [E, PARTS * width, depth]; TMA_B: the descriptor of [E * PARTS, width, depth]
    b_half,  # SPLIT: b, as a descriptor with boxes of half the width; else None
    bias_ptr,  # [E, PARTS * width] or None
    out_ptr,  # [rows, width]
    pre_ptr,  # [rows, PARTS * width], what the activation is applied to, or None
    offsets_ptr,  # [E + 1]
    index_ptr,  # [rows] or None
    rows,
    width,
    depth,
    num_experts,
    stride_a_row,
    stride_a_k,
    stride_b_expert,
    stride_b_row,
    stride_b_k,
    stride_bias_expert,
    stride_bias_row,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,  # 2 for gated activations
    EXPERTS: tl.constexpr,
    REST: tl.constexpr,  # whether the rows of no expert are written too, as zeros
    EVEN: tl.constexpr,  # BLOCK_K divides depth
    WIDE_A: tl.constexpr,  # elements of a are further apart than int32 tells
    WIDE_B: tl.constexpr,  # the same within one matrix of b
    TMA_A: tl.constexpr,
    TMA_B: tl.constexpr,
    SWAP: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE: tl.constexpr,  # columns of the epilogue at a time
):
    ends = tile_ends(offsets_ptr, rows, num_experts, EXPERTS, BLOCK_M, REST)
    column_tiles = tl.cdiv(width, BLOCK_N)
    blocks = tile_count(ends) * column_tiles
    whole = blocks
    if SPLIT:
        remainder = blocks % tl.num_programs(0)
        whole -= remainder if 2 * remainder <= tl.num_programs(0) else 0
    for halves in tl.static_range(2 if SPLIT else 1):
        items = 2 * (blocks - whole) if halves else whole
        # Hoisting the epilogue's addresses out of this loop would keep them in registers during the product.
        for item in tl.range(
            tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN and halves == 0, disable_licm=True
        ):
            block = whole + item // 2 if halves else item
            expert, _, first, end, column_tile = block_at(
                block, column_tiles, ends, offsets_ptr, rows, num_experts, BLOCK_M, GROUP_M
            )
            column = column_tile * BLOCK_N + (item % 2 * (BLOCK_N // 2) if halves else 0)
            terms = tl.where(expert < num_experts, depth, 0) if REST else depth
            tile = _product(
                a,
                b_half if halves else b,
                index_ptr,
                expert,
                first,
                end,
                column,
                width,
                depth,
                terms,
                stride_a_row,
                stride_a_k,
                stride_b_expert,
                stride_b_row,
                stride_b_k,
                TOP_K,
                PARTS,
                EVEN,
                WIDE_A,
                WIDE_B,
                TMA_A,
                TMA_B,
                SWAP,
                BLOCK_M,
                BLOCK_N // (1 + halves),
                BLOCK_K,
            )
            _epilogue(
                tile,
                bias_ptr,
                out_ptr,
                pre_ptr,
                expert,
                first,
                end,
                column,
                width,
                num_experts,
                stride_bias_expert,
                stride_bias_row,
                ACTIVATION,
                PARTS,
                BLOCK_M,
                BLOCK_N // (1 + halves),
                PIECE,
            )


@triton.jit
def _product(
    a,
    b,
    index_ptr,
    expert,
    first,
    end,
    column,
    width,
    depth,
    terms,
    stride_a_row,
    stride_a_k,
    stride_b_expert,
    stride_b_row,
    stride_b_k,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE_A: tl.constexpr,
    WIDE_B: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_B: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, PARTS * BLOCK_N] float32: rows from `first` times matrix rows from `column`, of gate and then of up."""
    ks = tl.arange(0, BLOCK_K)
    if not TMA_A:
        source = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1)
        if index_ptr is not None:
            source = tl.load(index_ptr + source) // TOP_K
        a_places = _wide(source, WIDE_A)[:, None] * stride_a_row + (_wide(ks, WIDE_A) * stride_a_k)[None, :]
    if not TMA_B:
        n = tl.arange(0, PARTS * BLOCK_N)
        b_row = n // BLOCK_N * width + tl.minimum(column + n % BLOCK_N, width - 1)
        matrix = b + expert.to(tl.int64) * stride_b_expert
        b_places = _wide(b_row, WIDE_B)[:, None] * stride_b_row + (_wide(ks, WIDE_B) * stride_b_k)[None, :]
    acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, PARTS * BLOCK_N), tl.float32)
    for k in tl.range(0, terms, BLOCK_K):
        some = (ks < depth - k)[None, :]
        if TMA_A:
            a_tile = a.load([first, k])
        elif EVEN:
            a_tile = tl.load(a + _wide(k, WIDE_A) * stride_a_k + a_places)
        else:
            a_tile = tl.load(a + _wide(k, WIDE_A) * stride_a_k + a_places, mask=some, other=0.0)
        if TMA_B:
            b_tile = b.load([expert * PARTS, column, k]).reshape(PARTS * BLOCK_N, BLOCK_K)
        elif EVEN:
            b_tile = tl.load(matrix + _wide(k, WIDE_B) * stride_b_k + b_places)
        else:
            b_tile = tl.load(matrix + _wide(k, WIDE_B) * stride_b_k + b_places, mask=some, other=0.0)
        if SWAP:
            acc = tl.dot(b_tile, a_tile.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a_tile, b_tile.T, acc, input_precision="ieee")
    return acc.T if SWAP else acc


@triton.jit
def _epilogue(
    tile,
    bias_ptr,
    out_ptr,
    pre_ptr,
    expert,
    first,
    end,
    column,
    width,
    num_experts,
    stride_bias_expert,
    stride_bias_row,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Bias, pre-activation, activation: PIECE columns at a time, because more would not fit into the registers."""
    dtype = out_ptr.dtype.element_ty
    row = first + tl.arange(0, BLOCK_M)
    PIECES: tl.constexpr = BLOCK_N // PIECE
    for piece in tl.static_range(PIECES):
        columns = column + piece * PIECE + tl.arange(0, PIECE)
        exists = columns < width
        inside = (row < end)[:, None] & exists[None, :]
        value = columns_of(tile, piece, PARTS * PIECES)
        up = value
        if PARTS == 2:
            up = columns_of(tile, PIECES + piece, 2 * PIECES)
        if bias_ptr is not None:
            bias = bias_ptr + expert.to(tl.int64) * stride_bias_expert + columns * stride_bias_row
            wanted = exists & (expert < num_experts)
            value += tl.load(bias, mask=wanted, other=0.0).to(tl.float32)[None, :]
            if PARTS == 2:
                up += tl.load(bias + width * stride_bias_row, mask=wanted, other=0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            pre = pre_ptr + row.to(tl.int64)[:, None] * (PARTS * width) + columns[None, :]
            tl.store(pre, value.to(dtype), mask=inside)
            if PARTS == 2:
                tl.store(pre + width, up.to(dtype), mask=inside)
        value = activate(value, up, ACTIVATION)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * width + columns[None, :], value.to(dtype), mask=inside)


@triton.jit
def _wide(number, WIDE: tl.constexpr):
    return tl.cast(number, tl.int64) if WIDE else number


@triton.jit(do_not_specialize=["tokens", "num_experts"])
def combine_kernel(
    rows_ptr,  # [M, width], sorted
    weights_ptr,  # [T, TOP_K] float32, or None: all 1
    position_ptr,  # [M]: the row of slot t * TOP_K + k
    offsets_ptr,  # [E + 1]; rows from offsets[E] on belong to no expert and count as zeros
    y_ptr,  # [T, width]
    tokens,
    num_experts,
    width,
    stride_weights_token,
    stride_weights_k,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets_ptr + num_experts)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in tl.range(0, TOP_K, loop_unroll_factor=4):  # four rows on their way at a time
        row = tl.load(position_ptr + token * TOP_K + k, mask=token < tokens, other=end)
        owned = row < end
        source = rows_ptr + row.to(tl.int64)[:, None] * width + columns[None, :]
        value = tl.load(source, mask=owned[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)
        if weights_ptr is not None:
            weights = weights_ptr + token.to(tl.int64) * stride_weights_token + k * stride_weights_k
            value *= tl.load(weights, mask=owned, other=0.0).to(tl.float32)[:, None]
        total += value
    y = y_ptr + token.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (columns < width)[None, :])


def combine(rows: Tensor, weights: Tensor | None, position: Tensor, offsets: Tensor, y: Tensor) -> None:
    """y[t] = sum over k of weights[t, k] * rows[position[t * K + k]]; without weights all are 1."""
    tokens, width = y.shape
    if y.numel() == 0:
        return
    top_k = position.shape[0] // tokens
    # A token per program, 8 elements per thread: one wide load for each row. For few tokens more programs.
    block_n = min(2048 if tokens >= 1024 else 512, triton.next_power_of_2(width))
    block_t = 64 if INTERPRETED else 1
    combine_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_n))](
        rows,
        weights,
        position.contiguous(),
        offsets.contiguous(),
        y,
        tokens,
        offsets.shape[0] - 1,
        width,
        *((0, 0) if weights is None else weights.stride()),
        TOP_K=top_k,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        num_warps=max(1, block_n // 256),
    )
