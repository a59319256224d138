"""`rotate_heads`: LayerNorm over each head and rotary embedding in one pass over memory, forward and backward.

Semantics: unif2ace/ops/rotary.py. N = T * heads rows of `dim` numbers, read in place by any strides (the views of a
fused projection), written densely. A program owns a tile of whole rows, so that statistics stay in registers. Rotation
pairs dimension i with r + i, which no thread holds both of if a row is loaded in one piece; so rows are loaded as
three: [0, r), [r, 2 r) and the rest. Each starts at a multiple of r, so that its loads are wide where r is one of 8.

    forward    reads x, writes y:                    2 N dim elements
    backward   reads x and g = dL/dy, writes dx:     3 N dim elements; nothing is kept from forward

The angles of a token serve all of its heads and come out of the first-level cache from the second on. Backward makes
the statistics again: two more sums over numbers it reads anyway, where keeping them would move 8 bytes a row each way.

Gradients of weight and bias sum over all N rows, in two stages of fixed order without atomics: a program adds its
consecutive tiles up in registers, element by element, then the rows of that; then the sums of at most 1024 programs are
added. Both stages depend on the shape alone, so that equal calls give equal bits.

Floor at 4.3 TB/s for 64 sequences of 258 rows, 32 heads of 64, bfloat16: 31 us forward, 47 us backward. Expected: 85 %
of that rate, as a program does little else but move its tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels._device import INTERPRETED

# Numbers of a tile: with 2 warps, 16 a thread. Where r is a quarter of dim that is 16 bytes of the rest of a row and 8
# of each turned half. Twice as many would load 16 everywhere, but spill in forward and take 235 registers in backward,
# which holds four tiles: x, g and the sums of both gradients. The interpreter likes few programs.
_TILE = 1 << 13 if INTERPRETED else 1024
_PROGRAMS = 1024  # of backward, at most: eight for each multiprocessor of an H100
_WARPS = 2


@triton.jit
def _load(stream, at, stride, first, exists, COUNT: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] numbers from dimension `first` on, float32; 0 beyond COUNT."""
    d = tl.arange(0, COLS)[None, :]
    return tl.load(stream + at + (first + d) * stride, mask=exists & (d < COUNT), other=0.0).to(tl.float32)


@triton.jit
def _store(out, at, value, first, exists, COUNT: tl.constexpr, COLS: tl.constexpr):
    d = tl.arange(0, COLS)[None, :]
    tl.store(out + at + (first + d), value, mask=exists & (d < COUNT))


@triton.jit
def _load_head(
    stream, at, stride, exists, R: tl.constexpr, REST: tl.constexpr, R_P: tl.constexpr, REST_P: tl.constexpr
):
    """The three pieces of each row."""
    first = _load(stream, at, stride, 0, exists, R, R_P)
    second = _load(stream, at, stride, R, exists, R, R_P)
    return first, second, _load(stream, at, stride, 2 * R, exists, REST, REST_P)


@triton.jit
def _rows(tile, N, heads, ROWS: tl.constexpr):
    """Rows, tokens and heads of a tile, int64 [ROWS, 1]. Divided in 32 bits, which is quicker, unless N takes more."""
    rows = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    narrow = rows.to((tile + 0 * N).dtype)
    tokens = narrow // heads
    return rows, tokens.to(tl.int64), (narrow - tokens * heads).to(tl.int64)


@triton.jit
def _store_head(
    out, rows, first, second, rest, exists, R: tl.constexpr, REST: tl.constexpr, R_P: tl.constexpr, REST_P: tl.constexpr
):
    at = rows * (2 * R + REST)
    _store(out, at, first, 0, exists, R, R_P)
    _store(out, at, second, R, exists, R, R_P)
    _store(out, at, rest, 2 * R, exists, REST, REST_P)


@triton.jit
def _mean(first, second, rest, DIM: tl.constexpr):
    return ((tl.sum(first, axis=1) + tl.sum(second, axis=1) + tl.sum(rest, axis=1)) / DIM)[:, None]


@triton.jit
def _normalise(first, second, rest, eps, exists, R: tl.constexpr, REST: tl.constexpr):
    """(x - mean) / sqrt(var + eps) in three pieces, 0 where there is no dimension, and 1 / sqrt(var + eps)."""
    mean = _mean(first, second, rest, 2 * R + REST)
    turned = (tl.arange(0, first.shape[1]) < R)[None, :]
    first = tl.where(turned, first - mean, 0.0)
    second = tl.where(turned, second - mean, 0.0)
    rest = tl.where((tl.arange(0, rest.shape[1]) < REST)[None, :], rest - mean, 0.0)
    scale = 1.0 / tl.sqrt_rn(_mean(first * first, second * second, rest * rest, 2 * R + REST) + eps)
    scale = tl.where(exists, scale, 0.0)  # with eps = 0 it is infinite in rows of zeros, and 0 times that NaN
    return first * scale, second * scale, rest * scale, scale


@triton.jit
def _angles(cos, sin, tokens, exists, R: tl.constexpr, R_P: tl.constexpr):
    """Dense: a stride known to be a multiple of 8 lets 16 bytes be loaded where 2 would be."""
    return _load(cos, tokens * R, 1, 0, exists, R, R_P), _load(sin, tokens * R, 1, 0, exists, R, R_P)


@triton.jit
def _forward_kernel(
    x,
    x_strides,
    weight,
    weight_strides,
    bias,
    bias_strides,
    cos,
    sin,
    y,
    N,
    heads,
    eps,
    R: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    R_P: tl.constexpr,
    REST_P: tl.constexpr,
):
    rows, tokens, head = _rows(tl.program_id(0), N, heads, ROWS)
    exists = rows < N
    at = tokens * x_strides[0] + head * x_strides[1]
    x1, x2, x3 = _load_head(x, at, x_strides[2], exists, R, REST, R_P, REST_P)
    c, s = _angles(cos, sin, tokens, exists, R, R_P)
    w1, w2, w3 = _load_head(weight, 0, weight_strides[0], True, R, REST, R_P, REST_P)
    b1, b2, b3 = _load_head(bias, 0, bias_strides[0], True, R, REST, R_P, REST_P)
    x1, x2, x3, _ = _normalise(x1, x2, x3, eps, exists, R, REST)
    n1, n2, n3 = x1 * w1 + b1, x2 * w2 + b2, x3 * w3 + b3
    _store_head(y, rows, n1 * c - n2 * s, n2 * c + n1 * s, n3, exists, R, REST, R_P, REST_P)


@triton.jit
def _backward_kernel(
    grad,
    grad_strides,
    x,
    x_strides,
    weight,
    weight_strides,
    cos,
    sin,
    grad_x,
    sums,
    N,
    heads,
    tiles,
    eps,
    R: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    R_P: tl.constexpr,
    REST_P: tl.constexpr,
):
    """`tiles` consecutive tiles. `sums` [programs, 2, dim]: this program's share of dweight and of dbias."""
    w1, w2, w3 = _load_head(weight, 0, weight_strides[0], True, R, REST, R_P, REST_P)
    dw1, dw2, dw3 = (
        tl.zeros([ROWS, R_P], tl.float32),
        tl.zeros([ROWS, R_P], tl.float32),
        tl.zeros([ROWS, REST_P], tl.float32),
    )
    db1, db2, db3 = (
        tl.zeros([ROWS, R_P], tl.float32),
        tl.zeros([ROWS, R_P], tl.float32),
        tl.zeros([ROWS, REST_P], tl.float32),
    )
    for tile in range(tiles):
        rows, tokens, head = _rows(tl.program_id(0) * tiles + tile, N, heads, ROWS)
        exists = rows < N
        at = tokens * x_strides[0] + head * x_strides[1]
        x1, x2, x3 = _load_head(x, at, x_strides[2], exists, R, REST, R_P, REST_P)
        at = tokens * grad_strides[0] + head * grad_strides[1]
        y1, y2, g3 = _load_head(grad, at, grad_strides[2], exists, R, REST, R_P, REST_P)
        c, s = _angles(cos, sin, tokens, exists, R, R_P)
        u1, u2, u3, scale = _normalise(x1, x2, x3, eps, exists, R, REST)
        g1, g2 = y1 * c + y2 * s, y2 * c - y1 * s
        dw1 += g1 * u1
        dw2 += g2 * u2
        dw3 += g3 * u3
        db1 += g1
        db2 += g2
        db3 += g3
        v1, v2, v3 = g1 * w1, g2 * w2, g3 * w3
        mean = _mean(v1, v2, v3, 2 * R + REST)
        slope = _mean(v1 * u1, v2 * u2, v3 * u3, 2 * R + REST)
        d1, d2, d3 = v1 - mean - u1 * slope, v2 - mean - u2 * slope, v3 - mean - u3 * slope
        _store_head(grad_x, rows, d1 * scale, d2 * scale, d3 * scale, exists, R, REST, R_P, REST_P)
    row = 2 * tl.program_id(0)
    w1, w2, w3 = tl.sum(dw1, axis=0)[None, :], tl.sum(dw2, axis=0)[None, :], tl.sum(dw3, axis=0)[None, :]
    b1, b2, b3 = tl.sum(db1, axis=0)[None, :], tl.sum(db2, axis=0)[None, :], tl.sum(db3, axis=0)[None, :]
    _store_head(sums, row, w1, w2, w3, True, R, REST, R_P, REST_P)
    _store_head(sums, row + 1, b1, b2, b3, True, R, REST, R_P, REST_P)


def rotate_heads(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The registered op of the same name."""
    (tokens, heads, _), y = x.shape, x.new_empty(x.shape)
    shape = _constants(x, cos)
    tiles = triton.cdiv(tokens * heads, shape["ROWS"])
    if tiles:
        inputs = (value for tensor in (x, weight, bias) for value in (tensor, tensor.stride()))
        angles = (cos.contiguous(), sin.contiguous())
        _forward_kernel[(tiles,)](*inputs, *angles, y, tokens * heads, heads, eps, **shape, num_warps=_WARPS)
    return y


def rotate_heads_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op of the same name."""
    (tokens, heads, dim), grad_x = x.shape, x.new_empty(x.shape)
    shape = _constants(x, cos)
    tiles = triton.cdiv(tokens * heads, shape["ROWS"])
    each = triton.cdiv(tiles, _PROGRAMS)
    programs = triton.cdiv(tiles, each) if tiles else 0
    sums = x.new_empty((programs, 2, dim), dtype=torch.float32)
    if tiles:
        inputs = (value for tensor in (grad, x, weight) for value in (tensor, tensor.stride()))
        angles = (cos.contiguous(), sin.contiguous())
        _backward_kernel[(programs,)](
            *inputs, *angles, grad_x, sums, tokens * heads, heads, each, eps, **shape, num_warps=_WARPS
        )
    grad_weight, grad_bias = (sums[:, i].sum(dim=0).to(weight.dtype) for i in range(2))
    return grad_x, grad_weight, grad_bias


def _constants(x: Tensor, cos: Tensor) -> dict[str, int]:
    """Sizes of the three pieces, the powers of two that hold them, and rows of a tile."""
    dim, r = x.shape[2], cos.shape[1]
    rest = dim - 2 * r
    r_p, rest_p = triton.next_power_of_2(max(r, 1)), triton.next_power_of_2(max(rest, 1))
    held = 2 * r_p * (r > 0) + rest_p * (rest > 0)  # numbers of a row, rounded up
    rows = triton.next_power_of_2(max(1, _TILE // held) + 1) // 2
    return {"R": r, "REST": rest, "ROWS": rows, "R_P": r_p, "REST_P": rest_p}
