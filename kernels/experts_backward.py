"""Backward of the ops of `experts` on a GPU: the gradients of `grouped_gemm` and `expert_mlp`.

With G the gradient of y in the sorted rows (row m: that of token order[m] // K), w the routing weights of those rows,
P the saved pre-activation and a = act(P), for the rows of each expert:

    D       = G W_down                   the gradient of a, before weighting
    dP      = w D act'(P)                gated, a = f(p) u: w D f'(p) u and w D f(p), in the order of P
    dw      = <D, a> + <G, b_down>       the same as <G, W_down a + b_down> without computing the down projection again
    R       = dP W_up                    dx_t = the sum of the K rows of token t
    dW_down = G^T (w a)                  db_down = column sums of w G
    dW_up   = dP^T X                     db_up   = column sums of dP

Kept from the forward: x, P and the plan. Gathered rows are never stored: G and X are read through the index.

| launch | does | reads; writes |
|---|---|---|
| 1 | experts by load | offsets |
| 2 | D; in its epilogue `factors` = [w a, dP], pieces of <D, a>, column sums of tiles of dP | G, W_down, P; factors |
| 3 | both weight gradients | factors, G, X; dW_down, dW_up |
| 4 | R | dP, W_up; R |
| 5 | dx, by the kernel that ends the forward | R; dx |
| 6 | dw from its pieces | 1 / 16 of P |
| 7 | b_up: sums over tiles | 1 / 64 of P |
| 8, 9 | b_down: column sums of w G and <G, b_down> per tile; sums over tiles | G |

Cost: 4 M H (I_up + I) FLOPs, twice the forward. On an H200 in bfloat16 (790 TFLOP/s of a dense product, 4.3 TB/s of a
copy; both measured, elsewhere than here), without biases:

| T, H, I, E, K, activation | FLOPs | bytes | floor of launches 2 - 4, of 5 | expected |
|---|---|---|---|---|
| 8192, 2048, 1024, 16, 2, gelu | 275 G | 0.74 GB | 348 + 23 us | 545 TFLOP/s, 0.73 of the floor |
| 8192, 2048, 512, 16, 4, gelu | 275 G | 0.74 GB | 348 + 39 us | 525 TFLOP/s, 0.74 |
| 8192, 2048, 768, 16, 8, swiglu | 1.24 T | 2.2 GB | 1570 + 70 us | 560 TFLOP/s, 0.74 |
| 24576, 1536, 1024, 32, 2, swiglu | 0.93 T | 2.1 GB | 1170 + 53 us | 560 TFLOP/s, 0.74 |

Expected are 620 TFLOP/s in launch 3, 600 in launch 4 and, because nothing hides its epilogue, 510 in launch 2; 95 % of
the copy's speed in launch 5. Launch 8 adds about 25 us to the second line: it reads G once from memory, K times from
L2. Memory while it runs: `factors` and R, M (I_up + I + H) elements.

**Uneven loads.** A block of a weight gradient costs as much as its expert has rows. Both weight gradients are one
launch with a plain grid, the blocks of the expert with most rows first: the hardware hands a free multiprocessor the
longest that is left. With n blocks per expert and S multiprocessors, the longest block does not outlast the average
multiprocessor as long as no expert has more than n / S of all rows. For H = 2048, I = 512 and blocks of 128 x 256 n is
64: up to half of all rows on an H200, and from I = 1024 on all of them. That is why the token axis is not split: parts
of the gradients in float32 would take 4 E H (I_up + I) bytes and one more pass, for loads that the order alone covers.

Same inputs, same bits: no atomics. Sums over rows (weights, biases) depend in their order on the loads; those of a row
(dx, dw) on neither the loads nor the number of rows. `w a` and dP are rounded to the dtype of x, as the reference
rounds w G and dP; D, <D, a> and all sums stay in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from unif2ace.kernels import experts_gradients as products
from unif2ace.kernels import experts_sums as sums
from unif2ace.kernels._device import multiprocessors
from unif2ace.kernels.experts_config import Config, Product, matrix_gradient, row_gradients, takes_tma
from unif2ace.kernels.experts_products import combine
from unif2ace.kernels.experts_schedule import max_tiles, padded_experts


class Rows(NamedTuple):
    """The sorted rows: whose they are, how many, and the height of the tiles they are cut into."""

    offsets: Tensor
    slots: int
    block_m: int

    @property
    def experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def tiles(self) -> int:
        """As many tiles as there may be: only the device knows the offsets."""
        return max_tiles(self.slots, self.experts, self.block_m)

    @property
    def end(self) -> Tensor:
        """Where the rows of the last expert end."""
        return self.offsets[-1:]


def expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    pre: Tensor,
    weights: Tensor,
    offsets: Tensor,
    order: Tensor,
    position: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w_up, w_down, b_up and b_down; see the module docstring."""
    inner, top_k, slots = w_down.shape[2], weights.shape[1], order.shape[0]
    grad, x, w_up, w_down = (_adjacent(tensor) for tensor in (grad, x, w_up, w_down))
    pre, weights, order, position = (tensor.contiguous() for tensor in (pre, weights, order, position))
    (experts, up_rows, hidden), dtype = w_up.shape, x.dtype
    needed = [
        Product(dtype, slots, experts, inner, hidden, 1, gather=True),
        Product(dtype, slots, experts, hidden, up_rows, 1, gather=False),
    ]
    first, second = row_gradients(needed, x.device)
    rows = Rows(offsets.contiguous(), slots, first.block_m)

    factors = x.new_empty(rows.tiles * rows.block_m, inner + up_rows)
    up_sums = x.new_empty(rows.tiles, up_rows, dtype=torch.float32)
    pieces = triton.cdiv(inner, first.block_n) * (first.block_n // first.piece)
    dots = x.new_empty(pieces + (0 if b_down is None else _strips(hidden)), slots, dtype=torch.float32)
    _activation_gradient(first, rows, grad, w_down, pre, weights, order, activation, factors, dots, up_sums)

    grad_w_up, grad_w_down = x.new_empty(w_up.shape), x.new_empty(w_down.shape)
    _weight_gradient(rows, factors, inner, grad, x, order, top_k, grad_w_down, grad_w_up)
    of_rows = x.new_empty(slots, hidden)
    _input_gradient(second, rows, factors, inner, w_up, of_rows)
    grad_x = x.new_empty(x.shape)
    combine(of_rows, None, position, rows.offsets, grad_x)

    grad_b_up, grad_b_down = (x.new_empty(0 if b is None else b.shape) for b in (b_up, b_down))
    if b_up is not None:
        _tile_sums(rows, up_sums, grad_b_up)
    if b_down is not None:
        _row_sums(rows, grad, order, top_k, weights, b_down.contiguous(), dots[pieces:], grad_b_down)
    grad_weights = weights.new_empty(weights.shape)
    grid = (triton.cdiv(slots, 128),)
    sums.slot_sums_kernel[grid](dots, position, rows.end, grad_weights, dots.shape[0], slots, BLOCK=128)
    return grad_x, grad_weights, grad_w_up, grad_w_down, grad_b_up, grad_b_down


def grouped_gemm_backward(
    grad: Tensor, a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and bias of y_m = b[e] a[gather[m]] + bias[e]; rows from offsets[E] on play no part."""
    slots = grad.shape[0]
    grad, a, b = (_adjacent(tensor) for tensor in (grad, a, b))
    gather = None if gather is None else gather.contiguous()
    experts, width, depth = b.shape
    (config,) = row_gradients([Product(a.dtype, slots, experts, depth, width, 1, gather=False)], a.device)
    rows = Rows(offsets.contiguous(), slots, config.block_m)

    grad_b = a.new_empty(b.shape)
    _weight_gradient(rows, grad, None, a, a, gather, 1, grad_b, grad_b)
    grad_a = a.new_empty(slots, depth)
    _input_gradient(config, rows, grad, None, b, grad_a)
    if gather is not None:  # a row of `a` may be read several times: its readers in ascending order, by a stable sort
        read, readers = torch.sort(gather, stable=True)
        starts = torch.searchsorted(read, torch.arange(a.shape[0] + 1, device=a.device, dtype=read.dtype))
        of_rows, grad_a = grad_a, a.new_empty(a.shape)
        block = min(1024, triton.next_power_of_2(max(1, depth)))
        sums.segment_sums_kernel[(a.shape[0], triton.cdiv(depth, block))](
            of_rows, readers, starts, rows.end, grad_a, depth, BLOCK_N=block
        )
    grad_bias = a.new_empty(0 if bias is None else bias.shape)
    if bias is not None:
        _row_sums(rows, grad, None, 1, None, None, None, grad_bias)
    return grad_a, grad_b, grad_bias


# ----------------------------------------------------------------------------------------------------------- launches

STRIP = 128  # columns that one program of row_sums_kernel reads


def _strips(width: int) -> int:
    return triton.cdiv(width, STRIP)


def _activation_gradient(
    config: Config,
    rows: Rows,
    grad: Tensor,
    w_down: Tensor,
    pre: Tensor,
    weights: Tensor,
    order: Tensor,
    activation: str,
    factors: Tensor,
    dots: Tensor,
    up_sums: Tensor,
) -> None:
    _, hidden, inner = w_down.shape
    tma = takes_tma(w_down)
    products.activation_gradient_kernel[_stay(config, rows, inner, grad.device)](
        grad,
        TensorDescriptor.from_tensor(w_down, [1, config.block_k, config.block_n]) if tma else w_down,
        pre,
        weights,
        order,
        rows.offsets,
        factors,
        dots,
        up_sums,
        rows.experts,
        rows.slots,
        hidden,
        inner,
        grad.stride(0),
        w_down.stride(0),
        w_down.stride(1),
        ACTIVATION=activation,
        GATED=pre.shape[1] != inner,
        TOP_K=weights.shape[1],
        EXPERTS=padded_experts(rows.experts),
        GROUP_M=config.group_m,
        PIECE=config.piece,
        TMA=tma,
        **_launch(config),
    )


def _input_gradient(config: Config, rows: Rows, left: Tensor, skip: int | None, matrices: Tensor, out: Tensor) -> None:
    """out[m] = left row times matrices[e]. With `skip`, left is stored by tile and starts at that column; without, it
    has the sorted rows, and `out` becomes zeros beyond the last offset."""
    _, depth, width = matrices.shape
    by_tile = skip is not None
    tma = takes_tma(matrices) and (not by_tile or takes_tma(left))
    products.input_gradient_kernel[_stay(config, rows, width, left.device)](
        TensorDescriptor.from_tensor(left, [config.block_m, config.block_k]) if tma and by_tile else left,
        TensorDescriptor.from_tensor(matrices, [1, config.block_k, config.block_n]) if tma else matrices,
        rows.offsets,
        out,
        rows.experts,
        rows.slots,
        skip or 0,
        depth,
        width,
        left.stride(0),
        matrices.stride(0),
        matrices.stride(1),
        BY_TILE=by_tile,
        EXPERTS=padded_experts(rows.experts),
        GROUP_M=config.group_m,
        TMA=tma,
        **_launch(config),
    )


def _weight_gradient(
    rows: Rows,
    left: Tensor,
    split: int | None,
    first: Tensor,
    second: Tensor,
    index: Tensor | None,
    top_k: int,
    first_out: Tensor,
    second_out: Tensor,
) -> None:
    """Per expert first_out = first^T left[:, :split] and second_out = left[:, split:]^T second, all rows summed over.
    With `split`, left is stored by tile; without, it has the sorted rows, and there is no first product."""
    by_tile, split = split is not None, split or 0
    columns, width = left.shape[1], second.shape[1]
    config = matrix_gradient(left.dtype, index is not None, left.device)
    by_load = rows.offsets.new_empty(rows.experts)
    experts = padded_experts(rows.experts)
    sums.experts_by_load_kernel[(1,)](rows.offsets, by_load, rows.experts, EXPERTS=experts)
    blocks = triton.cdiv(split, config.block_m) + triton.cdiv(columns - split, config.block_m)
    tma = by_tile and takes_tma(left)
    products.weight_gradient_kernel[(rows.experts * blocks * triton.cdiv(width, config.block_n),)](
        TensorDescriptor.from_tensor(left, [config.block_k, config.block_m]) if tma else left,
        first,
        second,
        index,
        rows.offsets,
        by_load,
        first_out,
        second_out,
        rows.experts,
        rows.slots,
        split,
        columns,
        width,
        left.stride(0),
        first.stride(0),
        second.stride(0),
        TOP_K=top_k,
        BY_TILE=by_tile,
        TILE_ROWS=rows.block_m,
        EXPERTS=experts,
        TMA=tma,
        **_launch(config),
    )


def _row_sums(
    rows: Rows,
    source: Tensor,
    index: Tensor | None,
    top_k: int,
    weights: Tensor | None,
    vectors: Tensor | None,
    dots: Tensor | None,
    out: Tensor,
) -> None:
    """out[e] = sum of weight * row over the rows of expert e; dots = the rows' products with vectors[e], in strips."""
    width = source.shape[1]
    partial = source.new_empty(rows.tiles, width, dtype=torch.float32)
    sums.row_sums_kernel[(rows.tiles, _strips(width))](
        source,
        index,
        weights,
        vectors,
        rows.offsets,
        partial,
        dots,
        rows.experts,
        rows.slots,
        width,
        source.stride(0),
        TOP_K=top_k,
        EXPERTS=padded_experts(rows.experts),
        BLOCK_M=rows.block_m,
        BLOCK_N=STRIP,
    )
    _tile_sums(rows, partial, out)


def _tile_sums(rows: Rows, partial: Tensor, out: Tensor) -> None:
    width = partial.shape[1]
    sums.tile_sums_kernel[(rows.experts, triton.cdiv(width, 64))](
        partial,
        rows.offsets,
        out,
        rows.experts,
        rows.slots,
        width,
        EXPERTS=padded_experts(rows.experts),
        TILE_ROWS=rows.block_m,
        BLOCK_M=16,
        BLOCK_N=64,
    )


def _stay(config: Config, rows: Rows, width: int, device: torch.device) -> tuple[int]:
    """A grid of programs that stay, no more than there may be blocks."""
    blocks = rows.tiles * triton.cdiv(width, config.block_n)
    return (min(blocks, config.programs * multiprocessors(device)),)


def _launch(config: Config) -> dict[str, int]:
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return {**blocks, "num_warps": config.warps, "num_stages": config.stages}


# ----------------------------------------------------------------------------------------------------------- operands


def _adjacent(x: Tensor) -> Tensor:
    """x with the elements of a row adjacent in memory, as all loads expect; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
