"""Sequence-level expert mixing: y = residual + s (a_b x + sum_j c_bj S_j), forward and backward.

Semantics: unif2ace/ops/sequence_mix.py. Both directions are bound by memory, and each element of a stream crosses it
once. A program owns a tile [ROWS, COLS] of all streams; what differs by sequence is one factor per row and stream.

    forward    reads x, S_0 .. S_{J-1} and the residual, writes y:                       (J + 3) R H elements
               features that all sequences share stay in the second-level cache:         3 R H elements
    backward   reads g = dL/dy, x and all S_j, writes dx = s a g and dS_j = s c_j g:     (2 J + 3) R H elements

The gradients of the factors are sums of <x_r, g_r> and <S_j,r, g_r> over the rows of a sequence, in two stages without
atomics. The tiles write what their columns add to the dot product of a row into `dots` [J + 2, column blocks, R],
where stream J + 1 holds the row's share of ds, sum of factor * dot. Then one program per sequence and stream adds the
rows of its sequence in order, from its first row on: its bits do not depend on where the sequence lies in the batch.
`dots` is float64, 8 (J + 2) bytes per row beside the 2 (2 J + 3) H of the streams in bfloat16: 0.1 % at H = 2048.

Which sequence a row belongs to stands on the device, in `row_offsets`. The grid covers rows, not sequences, because
their lengths are unknown to the host; a row counts the sequences that end at or before it, from one or a few
loads of 128 offsets, while the first streams are already on their way. Ends beyond R do no harm: what is addressed
through an offset is rows clamped to [0, R], and rows of shared features, which count as 0 where there is none.

Floor at 4.3 TB/s, H = 2048, bfloat16, 64 images of 258 rows, J = 1: forward 63 us, backward 79 us. Expected: 85 % of
that rate in both, since a program does nothing else but move 2048 elements of each stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and sequences change from batch to batch: kernels do not specialise on their numbers (as Triton does on 1 and on
# multiples of 16), so that a new batch compiles nothing.

# Elements of a tile and warps that move it: 16 elements a thread are two 16-byte loads of each bfloat16 stream in
# flight, with eight blocks per multiprocessor several times what latency * bandwidth of an H200 asks for.
_TILE = 2048
_WARPS = 4
_TALL = 4  # rows of a tile at most: each of them is compared with 128 offsets at once, and 8 spill on sm_90
_SUM = 1024  # rows that a program of the second stage adds at once


@triton.jit
def _int64(n):
    """A number, of the host or of the device, as int64."""
    return tl.full([], n, tl.int64)


@triton.jit
def _tile(R, H, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS] and columns [COLS] of this program (int64: R * H may exceed 2^31), and which of them exist."""
    blocks = tl.cdiv(H, COLS)
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (pid % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    return rows, cols, (rows < R)[:, None] & (cols < H)[None, :]


@triton.jit
def _load(stream, strides, rows, cols, inside):
    """A tile of a stream. Strides of 1 are compile-time constants, so rows side by side load 16 bytes a thread."""
    return tl.load(stream + rows[:, None] * strides[0] + cols[None, :] * strides[1], mask=inside, other=0.0)


@triton.jit
def _sequence_of(row_offsets, stride, rows, B):
    """The sequence of each row: how many end at or before it; B for rows behind the last."""
    CHUNK: tl.constexpr = 128
    sequence = tl.zeros_like(rows)
    for start in range(0, B, CHUNK):
        b = start + tl.arange(0, CHUNK)
        ends = tl.load(row_offsets + (b + 1) * stride, mask=b < B, other=0)
        sequence += tl.sum(((b < B)[None, :] & (ends[None, :] <= rows[:, None])).to(tl.int64), axis=1)
    return sequence


@triton.jit
def _factor(factors, stride, sequence, B):
    """One float32 factor per row, [ROWS, 1]; 0 for rows in no sequence."""
    return tl.load(factors + sequence * stride, mask=sequence < B, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["R", "B", "F"])
def _mix_kernel(
    x,
    x_strides,
    scale,
    scale_stride,
    features,
    feature_strides,
    coefficients,
    coefficient_strides,
    row_offsets,
    offset_stride,
    residual,
    residual_strides,
    layer_scale,
    feature_starts,
    start_stride,
    y,
    R,
    H,
    B,
    F,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, cols, inside = _tile(R, H, ROWS, COLS)
    first = _load(x, x_strides, rows, cols, inside)
    if residual is not None:
        below = _load(residual, residual_strides, rows, cols, inside)
    sequence = _sequence_of(row_offsets, offset_stride, rows, B)
    feature_rows, feature_inside = rows, inside
    if feature_starts is not None:
        begin = tl.load(row_offsets + sequence * offset_stride, mask=sequence < B, other=0).to(tl.int64)
        start = tl.load(feature_starts + sequence * start_stride, mask=sequence < B, other=0).to(tl.int64)
        feature_rows = rows - begin + start
        feature_inside &= ((feature_rows >= 0) & (feature_rows < F))[:, None]
    total = first.to(tl.float32) * _factor(scale, scale_stride, sequence, B)
    for j in tl.static_range(len(features)):
        tile = _load(features[j], feature_strides[j], feature_rows, cols, feature_inside)
        factor = _factor(coefficients + j * coefficient_strides[1], coefficient_strides[0], sequence, B)
        total += tile.to(tl.float32) * factor
    if layer_scale is not None:
        total *= tl.load(layer_scale).to(tl.float32)
    total = tl.where((sequence < B)[:, None], total, 0.0)  # 0 * NaN is no 0
    if residual is not None:
        total += below.to(tl.float32)
    tl.store(y + rows[:, None] * H + cols[None, :], total, mask=inside)


@triton.jit
def _scale_and_dot(grad, tile, factor, layer_factor, out, dots, rows, cols, inside, R, H):
    """Write `layer_factor * factor * grad` and the float64 dot products [ROWS] of grad and tile; returns the latter."""
    tl.store(out + rows[:, None] * H + cols[None, :], grad * (layer_factor * factor), mask=inside)
    # Up to 8 neighbours, which one thread holds, are added in float32, the rest in float64: two additions per thread.
    ROWS: tl.constexpr = tile.shape[0]
    COLS: tl.constexpr = tile.shape[1]
    PARTS: tl.constexpr = COLS if COLS < 256 else 256
    products = tl.reshape(tile.to(tl.float32) * grad, [ROWS, PARTS, COLS // PARTS])
    dot = tl.sum(tl.sum(products, axis=2).to(tl.float64), axis=1)
    tl.store(dots + rows, dot, mask=rows < R)
    return dot


@triton.jit(do_not_specialize=["R", "B"])
def _mix_backward_kernel(
    grad,
    grad_strides,
    x,
    x_strides,
    scale,
    scale_stride,
    features,
    feature_strides,
    coefficients,
    coefficient_strides,
    row_offsets,
    offset_stride,
    layer_scale,
    grad_x,
    grad_features,
    dots,
    R,
    H,
    B,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, cols, inside = _tile(R, H, ROWS, COLS)
    g = _load(grad, grad_strides, rows, cols, inside).to(tl.float32)
    tile = _load(x, x_strides, rows, cols, inside)
    sequence = _sequence_of(row_offsets, offset_stride, rows, B)
    owned = sequence < B
    g = tl.where(owned[:, None], g, 0.0)
    layer_factor = 1.0
    if layer_scale is not None:
        layer_factor = tl.load(layer_scale).to(tl.float32)

    blocks = tl.cdiv(H, COLS)
    table = blocks * _int64(R)  # of one stream
    dots += tl.program_id(0) % blocks * _int64(R)
    factor = _factor(scale, scale_stride, sequence, B)
    dot = _scale_and_dot(g, tile, factor, layer_factor, grad_x, dots, rows, cols, inside, R, H)
    share = tl.sum(factor, axis=1) * dot
    for j in tl.static_range(len(features)):
        tile = _load(features[j], feature_strides[j], rows, cols, inside)
        factor = _factor(coefficients + j * coefficient_strides[1], coefficient_strides[0], sequence, B)
        out, dots = grad_features + j * _int64(R) * H, dots + table
        dot = _scale_and_dot(g, tile, factor, layer_factor, out, dots, rows, cols, inside, R, H)
        share += tl.sum(factor, axis=1) * dot
    if layer_scale is not None:
        tl.store(dots + table + rows, tl.where(owned, share, 0.0), mask=rows < R)


@triton.jit(do_not_specialize=["R", "B"])
def _sum_kernel(
    dots,
    row_offsets,
    offset_stride,
    layer_scale,
    grad_scale,
    grad_coefficients,
    grad_layer_scale,
    R,
    B,
    blocks,
    STREAMS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Program b * STREAMS + j adds stream j over the rows of sequence b; one more adds the shares of ds, all rows."""
    sequence, stream = tl.program_id(0) // STREAMS, tl.program_id(0) % STREAMS
    begin, end, layer_factor = _int64(0), _int64(R), 1.0
    if sequence < B:
        begin = tl.maximum(tl.load(row_offsets + sequence * offset_stride).to(tl.int64), begin)
        end = tl.minimum(tl.load(row_offsets + (sequence + 1) * offset_stride).to(tl.int64), end)
        if layer_scale is not None:
            layer_factor = tl.load(layer_scale).to(tl.float32)
    else:
        stream = STREAMS
    sums = tl.zeros([SUM], tl.float64)
    for block in range(blocks):
        column = dots + (stream * blocks + block) * _int64(R)
        for start in range(begin, end, SUM):
            rows = start + tl.arange(0, SUM)
            sums += tl.load(column + rows, mask=rows < end, other=0.0)
    total = tl.sum(sums, axis=0).to(tl.float32) * layer_factor
    if sequence == B:
        tl.store(grad_layer_scale, total)
    elif stream == 0:
        tl.store(grad_scale + sequence, total)
    else:
        tl.store(grad_coefficients + sequence * (STREAMS - 1) + stream - 1, total)


# ----------------------------------------------------------------------------------------------------------- launchers


def _tiling(rows: int, hidden: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, of `_TILE` elements unless rows are very narrow, and the number of tiles."""
    cols = min(_TILE, triton.next_power_of_2(max(hidden, 1)))
    tall = min(_TALL, _TILE // cols)
    return tall, cols, triton.cdiv(rows, tall) * triton.cdiv(hidden, cols)


def mix_sequences(
    x: Tensor,
    scale: Tensor,
    features: list[Tensor],
    coefficients: Tensor,
    row_offsets: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    feature_starts: Tensor | None,
) -> Tensor:
    """The registered op of the same name."""
    (rows, hidden), batch = x.shape, scale.shape[0]
    y = x.new_empty(rows, hidden)
    tall, cols, tiles = _tiling(rows, hidden)
    if tiles:
        _mix_kernel[(tiles,)](
            x,
            x.stride(),
            scale,
            scale.stride(0),
            tuple(features),
            tuple(feature.stride() for feature in features),
            coefficients,
            coefficients.stride(),
            row_offsets,
            row_offsets.stride(0),
            residual,
            None if residual is None else residual.stride(),
            layer_scale,
            feature_starts if features else None,
            None if feature_starts is None else feature_starts.stride(0),
            y,
            rows,
            hidden,
            batch,
            features[0].shape[0] if features else 0,
            ROWS=tall,
            COLS=cols,
            num_warps=_WARPS,
        )
    return y


def mix_sequences_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    features: list[Tensor],
    coefficients: Tensor,
    row_offsets: Tensor,
    layer_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered op of the same name."""
    (rows, hidden), batch, streams = x.shape, scale.shape[0], 1 + len(features)
    tall, cols, tiles = _tiling(rows, hidden)
    blocks = triton.cdiv(hidden, cols)
    grad_x, grad_features = x.new_empty(rows, hidden), x.new_empty(len(features), rows, hidden)
    grad_scale = scale.new_empty(scale.shape)
    grad_coefficients = coefficients.new_empty(coefficients.shape)
    grad_layer_scale = x.new_empty(0) if layer_scale is None else layer_scale.new_empty(layer_scale.shape)
    dots = x.new_empty(streams + 1, blocks, rows, dtype=torch.float64)
    if tiles:
        _mix_backward_kernel[(tiles,)](
            grad,
            grad.stride(),
            x,
            x.stride(),
            scale,
            scale.stride(0),
            tuple(features),
            tuple(feature.stride() for feature in features),
            coefficients,
            coefficients.stride(),
            row_offsets,
            row_offsets.stride(0),
            layer_scale,
            grad_x,
            grad_features,
            dots,
            rows,
            hidden,
            batch,
            ROWS=tall,
            COLS=cols,
            num_warps=_WARPS,
        )
    sums = batch * streams + (layer_scale is not None)
    if sums:
        _sum_kernel[(sums,)](
            dots,
            row_offsets,
            row_offsets.stride(0),
            layer_scale,
            grad_scale,
            grad_coefficients,
            grad_layer_scale,
            rows,
            batch,
            blocks,
            STREAMS=streams,
            SUM=_SUM,
            num_warps=_WARPS,
        )
    return grad_x, grad_scale, grad_features, grad_coefficients, grad_layer_scale
