"""The ops of `experts` on a GPU: `grouped_gemm` and the forward of `expert_mlp`; backward is in `experts_backward.py`.

`expert_mlp` is three launches over M = T * K sorted slots:

    1  act  = activation(W_up x[token] + b_up)     [M, I]     rows of x gathered in the load; pre-activation if saved
    2  down = W_down act + b_down                  [M, H]     in the dtype of x
    3  y_t  = sum_k weights[t, k] * down[slot]     [T, H]     in float32, k = 0, 1, ..

`grouped_gemm` is the first without an activation. Why `down` is stored, and in 16 bits: an expert's tile cannot add
into y without atomics, whose order varies; so a token collects its K rows afterwards. The reference too rounds each
expert's result to the dtype of x before it sums in float32, and 32-bit rows would double the largest array there is.

Cost on an H200 in bfloat16 (790 TFLOP/s of a dense product, 4.3 TB/s of a copy; both measured, elsewhere than here).
FLOPs 2 M H (I_up + I); memory: x, y, the matrices of experts with rows, act twice, down twice.

| T, H, I, E, K, activation | FLOPs | bytes | floor of 1 + 2, of 3 | rounds of 1, 2 | expected |
|---|---|---|---|---|---|
| 8192, 2048, 1024, 16, 2, gelu | 137 G | 0.40 GB | 174 + 23 us | 4.5, 8.5 | 540 TFLOP/s |
| 8192, 2048, 512, 16, 4, gelu | 137 G | 0.47 GB | 174 + 39 us | 4 to 4.5, 16 to 16.5 | 510 TFLOP/s |
| 8192, 2048, 768, 16, 8, swiglu | 618 G | 0.96 GB | 783 + 70 us | 24, 32 | 560 TFLOP/s |
| 24576, 1536, 1024, 32, 2, swiglu | 464 G | 0.96 GB | 587 + 53 us | 24.5, 18.5 | 560 TFLOP/s |
| 512, 2048, 1024, 16, 2, gelu | 8.6 G | 0.15 GB | 34 + 2 us | under one | 80 % of the copy's speed |
| 64, 2048, 512, 16, 4, gelu | 1.1 G | 70 MB | 16 us | under one | 80 % |
| 1, 2048, 512, 16, 4, gelu | 17 M | 17 MB | 3.9 us | under one | three launches of about 2 us |

Expected for many rows is 600 TFLOP/s in the products, three quarters of what a dense product reaches: blocks of 128 x
256 without clusters ask L2 for three quarters of what a multiprocessor can get, epilogues of launch 1 are not hidden,
and programs work in rounds of one block each (132 blocks on an H200; balanced loads assumed). And 95 % of the copy's
speed in launch 3, which is what this form leaves on the table: K + 1 rows of H per token that no product hides.

Inputs may have any strides: the products and the sum take them. TMA needs 16-byte multiples and adjacent columns; where
that fails, or below Hopper, the same kernels load through pointers. Only the index vectors are made contiguous.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from unif2ace.kernels import experts_config
from unif2ace.kernels._device import multiprocessors
from unif2ace.kernels.experts_backward import expert_mlp_backward, grouped_gemm_backward
from unif2ace.kernels.experts_products import combine, grouped_product_kernel
from unif2ace.kernels.experts_schedule import max_tiles, padded_experts

__all__ = ["expert_mlp", "expert_mlp_backward", "grouped_gemm", "grouped_gemm_backward"]

GATED = ("swiglu", "geglu")


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> Tensor:
    """See `unif2ace.ops.grouped_gemm`."""
    out = a.new_empty(a.shape[0] if gather is None else gather.shape[0], b.shape[1])
    grouped_product(a, b, bias, offsets, gather, out, rest=True)
    return out


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    order: Tensor,
    position: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    save: bool,
    few: bool | None,  # a choice between kernels of the CPU: here a token has the same bits with any number of others
) -> tuple[Tensor, Tensor]:
    """See `unif2ace.ops.expert_mlp`. Returns y and, for the backward, the pre-activation (no rows unless `save`)."""
    slots, inner = order.shape[0], w_down.shape[2]
    pre = x.new_empty(slots if save else 0, w_up.shape[1])
    act, down, y = x.new_empty(slots, inner), x.new_empty(slots, x.shape[1]), x.new_empty(x.shape)
    saved = pre if save else None
    top_k = weights.shape[1]
    grouped_product(x, w_up, b_up, offsets, order, act, saved, top_k=top_k, activation=activation, rest=save)
    grouped_product(act, w_down, b_down, offsets, None, down)
    combine(down, weights, position, offsets, y)
    return y, pre


def grouped_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    index: Tensor | None,
    out: Tensor,
    pre: Tensor | None = None,
    *,
    top_k: int = 1,
    activation: str = "none",
    rest: bool = False,
    config: experts_config.Config | None = None,
) -> None:
    """out[m] = activation(b[e] a[index[m] // top_k] + bias[e]), and what is in the brackets into `pre`.

    With `rest` also zeros for the rows of no expert. `config` is given only to measure it.
    """
    (rows, width), (num_experts, _, depth) = out.shape, b.shape
    if out.numel() == 0:
        return
    parts = 2 if activation in GATED else 1
    product = experts_config.Product(a.dtype, rows, num_experts, width, depth, parts, index is not None)
    config = config or experts_config.choose(product, a.device)
    blocks = (1 + config.split) * max_tiles(rows, num_experts, config.block_m) * triton.cdiv(width, config.block_n)
    tma_a = index is None and experts_config.takes_tma(a)
    # Gate and up as matrices of equal distance: [E * parts, width, depth].
    tma_b = experts_config.takes_tma(b) and (parts == 1 or b.stride(0) == 2 * width * b.stride(1))
    matrices, halves = b, b if config.split else None
    if tma_b:
        shape = [num_experts * parts, width, depth]
        strides = [b.stride(0) // parts, b.stride(1), 1]
        matrices = TensorDescriptor(b, shape, strides, [parts, config.block_n, config.block_k])
        if config.split:  # a descriptor that nobody reads would still be encoded at every launch
            halves = TensorDescriptor(b, shape, strides, [parts, config.block_n // 2, config.block_k])
    grouped_product_kernel[(min(blocks, config.programs * multiprocessors(a.device)),)](
        TensorDescriptor(a, [*a.shape], [*a.stride()], [config.block_m, config.block_k]) if tma_a else a,
        matrices,
        halves,
        bias,
        out,
        pre,
        offsets.contiguous(),
        None if index is None else index.contiguous(),
        rows,
        width,
        depth,
        num_experts,
        *a.stride(),
        *b.stride(),
        *((0, 0) if bias is None else bias.stride()),
        TOP_K=top_k,
        ACTIVATION=activation,
        PARTS=parts,
        EXPERTS=padded_experts(num_experts),
        REST=rest,
        EVEN=depth % config.block_k == 0,
        WIDE_A=_is_wide(a),
        WIDE_B=_is_wide(b[0]),
        TMA_A=tma_a,
        TMA_B=tma_b,
        SWAP=config.swap,
        FLATTEN=config.flatten,
        SPLIT=config.split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PIECE=min(config.piece, config.block_n // (1 + config.split)),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _is_wide(x: Tensor) -> bool:
    """Are elements of `x`, or of the tile that begins at its last one, further apart than int32 tells?"""
    return sum(size * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31 - 2**16
