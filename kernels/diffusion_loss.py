"""`linear_loss`: linear head, loss and all gradients, a chunk of rows at a time; logits are never whole in memory.

Semantics: unif2ace/ops/diffusion_loss.py. R rows, H hidden, V columns of the softmax, C rows of a chunk, z its logits:

    take rows     h = hidden rows, zeros where the target is ignored           Triton     4 C H bytes
    product       z = h W^T, [C, V] in the dtype of hidden                     library    2 C V H FLOPs
    statistics    max, sum e^(z - max), sum over the mass columns, z_target    Triton     2 C V bytes
    gradients     z -> dL/dz in place, and column sums for db                  Triton     4 C V bytes
    product       dh = dz W                                                    library    2 C V H FLOPs
    product       dW += dz^T h, summed in float32                              library    2 C V H FLOPs, 8 V H bytes

Figures below are for bfloat16 on an H200: 790 TFLOP/s, 4.3 TB/s.

**Why library products.** All three are dense products of thousands in each dimension, what vendor libraries do best.
Statistics in the epilogue of the first would save one read of z, 2 of the 6 bytes per logit that the two Triton kernels
move. Those take 1.4 ps per logit beside the 15.6 ps of its 6 H FLOPs (H = 2048), so 3 % is at stake, and a product that
is not the library's loses more. Floor for R = 4096, H = 2048, V = 58498: 3.7 ms for 2.94 TFLOP, and 0.34 ms for the
Triton kernels, which are bound by memory: 4.1 ms. Expected: 85 % of that rate.

**Why chunks of rows**, when chunks of columns would finish dW at once: those need the softmax first, so all logits
twice, 8 R H V FLOPs for 6. Rows cost the float32 sum of dW that each chunk adds to, 8 V H bytes against 6 C V H FLOPs:
245 / C of the time of the products where nothing of it overlaps, 12 % for C = 2048.

**Rows of a chunk.** C = max(1024, H): its logits take as much memory as the gradient of the head, which the caller
asked for. The float32 sums take twice that, as much as the logits of 2 H rows, or nothing where the head is float32.
One chunk alone needs no such sums; so up to C + 2 H rows of a 16-bit head are one chunk, which takes no more memory
than two, and less time. Values alone need no dW: C = 1024, which reads the head at 1024 FLOPs a byte. To stay in the
L2 cache between the kernels a chunk could have 200 rows or so (V = 58498: 117 KB a row): too few for the products.

Extra memory at H = 2048: 480 MB for R = 4096 and V = 58498, in one chunk; 101 MB for R = V = 8192, in four.

Rows of a chunk are padded to 64 columns, so that the Triton kernels move 16 bytes a thread and the library sees aligned
rows whatever V is. Ignored rows take part in the products, as zeros, since counting them would wait for the device:
who knows them on the host leaves them out. A target outside of the columns, which only a CPU can refuse, makes loss and
gradients NaN; nothing is addressed by it.

Fixed order everywhere, no atomics: the same call gives the same bits on the same device. Nothing crosses rows but dW
and db, yet the library may sum a row's product in another order when the number of rows is another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels._device import INTERPRETED

MIN_CHUNK_ROWS = 1024
_PAD = 64  # columns: 128 bytes of bfloat16
_TILE = 2048  # elements of hidden that a program takes: with 4 warps two 16-byte loads a thread

# Statistics: 2 rows a program share the loads of the bias. 2048 columns at once, 8 warps: 16 logits a thread.
# Gradients: a program walks down 64 rows, 8 at once, of 512 columns; 8 warps: 16 logits a thread. The column sums of
# every 64 rows, in float32, take 1/32 of the memory of the logits. The interpreter is quicker with few tall programs.
_STATISTICS_ROWS, _STATISTICS_COLS = (64, 512) if INTERPRETED else (2, 2048)
_GRADIENT_ROWS, _GRADIENT_COLS, _SEGMENT = (64, 512, 64) if INTERPRETED else (8, 512, 64)
_WARPS = 8

_IGNORE = tl.constexpr(-100)
_LOWEST = tl.constexpr(-3.4e38)  # a finite maximum: -inf - max is -inf, not NaN, where a column is shut out


@triton.jit
def _take_rows_kernel(hidden, strides, targets, target_stride, taken, R, H, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows of `hidden` as a dense matrix; zeros for ignored ones, as 0 times what stands there may be NaN."""
    blocks = tl.cdiv(H, COLS)
    pid = tl.program_id(0).to(tl.int64)
    rows = pid // blocks * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * COLS + tl.arange(0, COLS)
    live = tl.load(targets + rows * target_stride, mask=rows < R, other=_IGNORE) != _IGNORE
    inside = (cols < H)[None, :]
    h = tl.load(
        hidden + rows[:, None] * strides[0] + cols[None, :] * strides[1], mask=live[:, None] & inside, other=0.0
    )
    tl.store(taken + rows[:, None] * H + cols[None, :], h, mask=(rows < R)[:, None] & inside)


@triton.jit
def _row_value(values, stride, rows, live, known):
    """A float32 per row: 0 where the row is ignored, NaN where its target is unknown."""
    value = tl.load(values + rows * stride, mask=live & known, other=0.0).to(tl.float32)
    return tl.where(live & ~known, float("nan"), value)


@triton.jit
def _statistics_kernel(
    logits,
    bias,
    targets,
    target_stride,
    row_weight,
    row_weight_stride,
    mass_weight,
    mass_weight_stride,
    nll,
    mass,
    terms,
    row_max,
    row_w,
    outside,
    inside,
    R,
    V,
    padded,
    start,
    mass_begin,
    mass_end,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Per row: nll, mass and its term of the loss; and what turns its logits into gradients.

    A running maximum and sum for every VEC columns, which one thread holds: one rescaling of the sum for VEC
    exponentials, and nothing crosses threads before the end of the row.
    """
    GROUPS: tl.constexpr = COLS // VEC
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < R
    group_max = tl.full([ROWS, GROUPS], _LOWEST, tl.float32)
    group_sum = tl.zeros([ROWS, GROUPS], tl.float32)
    group_mass = tl.zeros([ROWS, GROUPS], tl.float32)
    group_cols = tl.arange(0, GROUPS)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    for first in range(0, padded, COLS):
        cols = first + group_cols
        # Masked by the padded width, a multiple of VEC: a mask that may end anywhere would split the wide loads.
        at = rows[:, None, None] * padded + cols
        z = tl.load(logits + at, mask=exists[:, None, None] & (cols < padded), other=0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + cols, mask=cols < padded, other=0.0).to(tl.float32)
        z = tl.where(cols < V, z, float("-inf"))
        top = tl.maximum(group_max, tl.max(z, axis=2))
        shrink = tl.exp(group_max - top)
        e = tl.exp(z - top[:, :, None])
        group_sum = group_sum * shrink + tl.sum(e, axis=2)
        if mass_weight is not None:
            e = tl.where((cols >= mass_begin) & (cols < mass_end), e, 0.0)
            group_mass = group_mass * shrink + tl.sum(e, axis=2)
        group_max = top
    top = tl.max(group_max, axis=1)
    shrink = tl.exp(group_max - top[:, None])
    total = tl.sum(group_sum * shrink, axis=1)

    target = tl.load(targets + rows * target_stride, mask=exists, other=_IGNORE).to(tl.int64)
    live, target = target != _IGNORE, target - start
    known = (target >= 0) & (target < V)
    z = tl.load(logits + rows * padded + target, mask=live & known, other=float("nan")).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + target, mask=live & known, other=0.0).to(tl.float32)
    loss = tl.where(live, tl.log(total) - (z - top), 0.0)  # target minus maximum first: exact where logits are huge
    tl.store(nll + rows, loss, mask=exists)
    w = _row_value(row_weight, row_weight_stride, rows, live, known)
    factor, term, share = w, tl.where(live, w * loss, 0.0), tl.zeros_like(w)
    if mass_weight is not None:
        pull = _row_value(mass_weight, mass_weight_stride, rows, live, known)
        share = tl.where(live, tl.sum(group_mass * shrink, axis=1) / total, 0.0)
        factor = w - pull * share
        term += pull * share
        if inside is not None:
            tl.store(inside + rows, (factor + pull) / total, mask=exists)
    tl.store(mass + rows, share, mask=exists)
    tl.store(terms + rows, term, mask=exists)
    if row_max is not None:
        tl.store(row_max + rows, top, mask=exists)
        tl.store(row_w + rows, w, mask=exists)
        tl.store(outside + rows, factor / total, mask=exists)


@triton.jit
def _gradients_kernel(
    logits,
    bias,
    targets,
    target_stride,
    row_max,
    row_w,
    outside,
    inside,
    column_sums,
    R,
    V,
    padded,
    start,
    mass_begin,
    mass_end,
    SEGMENT,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Logits -> gradients in place. Adds the sums of SEGMENT rows to this segment's row of `column_sums`."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    segment = tl.program_id(1).to(tl.int64)
    stored = cols < padded
    shift = tl.zeros([COLS], tl.float32)
    if bias is not None:
        shift = tl.load(bias + cols, mask=stored, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, SEGMENT, ROWS):
        rows = segment * SEGMENT + first + tl.arange(0, ROWS)
        exists = rows < R
        at = logits + rows[:, None] * padded + cols[None, :]
        z = tl.load(at, mask=exists[:, None] & stored[None, :], other=0.0).to(tl.float32) + shift[None, :]
        target = tl.load(targets + rows * target_stride, mask=exists, other=_IGNORE)
        column = (target - start).to(tl.int32)  # 32 bits suffice: where it is no column, w is NaN
        top = tl.load(row_max + rows, mask=exists, other=0.0)
        w = tl.load(row_w + rows, mask=exists, other=0.0)
        factor = tl.load(outside + rows, mask=exists, other=0.0)[:, None]
        if inside is not None:
            factor_inside = tl.load(inside + rows, mask=exists, other=0.0)[:, None]
            factor = tl.where(((cols >= mass_begin) & (cols < mass_end))[None, :], factor_inside, factor)
        grad = tl.exp(z - top[:, None]) * factor
        grad = tl.where(column[:, None] == cols[None, :], grad - w[:, None], grad)
        grad = tl.where((target != _IGNORE)[:, None] & (cols < V)[None, :], grad, 0.0)
        tl.store(at, grad, mask=exists[:, None] & stored[None, :])
        total += grad
    sums = column_sums + segment * padded + cols
    tl.store(sums, tl.load(sums, mask=stored) + tl.sum(total, axis=0), mask=stored)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    mass_weight: Tensor | None,
    columns: list[int],
    mass_columns: list[int],
    with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered op of the same name."""
    (rows, width), (start, end) = hidden.shape, columns
    count = end - start
    padded = triton.cdiv(count, _PAD) * _PAD
    chunk = _chunk_rows(rows, hidden, with_grads)
    head = weight[start:end]
    head = head if 1 in head.stride() else head.contiguous()  # once: a product would copy it each time
    shift = None
    if bias is not None:
        shift = bias.new_zeros(padded)
        shift[:count] = bias[start:end]
    mass_range = (0, 0) if mass_weight is None else (mass_columns[0] - start, mass_columns[1] - start)

    nll, mass, terms = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(3))
    h, z = hidden.new_empty(chunk, width), hidden.new_empty(chunk, padded)
    row_max = row_w = outside = inside = grads = None
    if with_grads:
        row_max, row_w, outside, inside = hidden.new_empty(4, chunk, dtype=torch.float32)
        inside = None if mass_weight is None else inside
        grads = _Gradients(hidden, weight, start, end, chunk, padded)

    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        size = part.stop - first
        h_part, z_part = h[:size], z[:size, :count]
        _take_rows(hidden[part], targets[part], h_part)
        torch.mm(h_part, head.t(), out=z_part)
        logits = (z, shift, targets[part], targets.stride(0))
        weights = (*_strided(row_weight, part), *_strided(mass_weight, part))
        factors = (row_max, row_w, outside, inside)
        sizes = (size, count, padded, start, *mass_range)
        _statistics_kernel[(triton.cdiv(size, _STATISTICS_ROWS),)](
            *(*logits, *weights, nll[part], mass[part], terms[part], *factors, *sizes),
            ROWS=_STATISTICS_ROWS,
            COLS=_STATISTICS_COLS,
            VEC=16 // hidden.element_size(),
            num_warps=_WARPS,
        )
        if grads is None:
            continue
        _gradients_kernel[(triton.cdiv(padded, _GRADIENT_COLS), triton.cdiv(size, _SEGMENT))](
            *(*logits, *factors, grads.column_sums, *sizes),
            SEGMENT=_SEGMENT,
            ROWS=_GRADIENT_ROWS,
            COLS=_GRADIENT_COLS,
            num_warps=_WARPS,
        )
        torch.mm(z_part, head, out=grads.hidden[part])
        _add_product(grads.weight_sum, z_part.t(), h_part, first=first == 0)
    results = grads.finish() if with_grads else (hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0))
    return terms.sum(), nll, mass, *results


def _chunk_rows(rows: int, hidden: Tensor, with_grads: bool) -> int:
    """How many rows make a chunk: see the module docstring. Chunks of a call are equal, but for the last."""
    width, item = hidden.shape[1], hidden.element_size()
    usual = max(MIN_CHUNK_ROWS, width) if with_grads else MIN_CHUNK_ROWS
    sums = 4 * width // item if with_grads and item < 4 else 0  # rows of logits as large as float32 sums of dW
    if rows <= usual + sums:
        return max(rows, 1)
    equal = triton.cdiv(rows, triton.cdiv(rows, usual))
    return triton.cdiv(equal, _SEGMENT) * _SEGMENT


def _strided(values: Tensor | None, part: slice) -> tuple[Tensor | None, int | None]:
    return (None, None) if values is None else (values[part], values.stride(0))


def _take_rows(hidden: Tensor, targets: Tensor, taken: Tensor) -> None:
    rows, width = taken.shape
    cols = min(triton.next_power_of_2(max(width, 1)), _TILE)
    tall = _TILE // cols
    _take_rows_kernel[(triton.cdiv(rows, tall) * triton.cdiv(width, cols),)](
        hidden, hidden.stride(), targets, targets.stride(0), taken, rows, width, ROWS=tall, COLS=cols, num_warps=4
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b where it is the first; a float32 total of 16-bit factors is never rounded."""
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.device.type == "cpu":  # which has no such product
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)


class _Gradients:
    """The three gradients and the sums behind them. Columns outside of the softmax have none: zeros."""

    def __init__(self, hidden: Tensor, weight: Tensor, start: int, end: int, chunk: int, padded: int) -> None:
        rows, self.part = hidden.shape[0], slice(start, end)
        self.hidden, self.weight = hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)
        self.weight[:start] = 0
        self.weight[end:] = 0
        self.bias = weight.new_zeros(weight.shape[0])
        self.column_sums = hidden.new_zeros((triton.cdiv(chunk, _SEGMENT), padded), dtype=torch.float32)
        self.weight_sum = self.weight[self.part]
        if rows == 0:
            self.weight_sum.zero_()
        if rows > chunk and weight.dtype != torch.float32:
            self.weight_sum = torch.empty_like(self.weight_sum, dtype=torch.float32)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.weight_sum.dtype != self.weight.dtype:
            self.weight[self.part] = self.weight_sum
        self.bias[self.part] = self.column_sums.sum(dim=0)[: self.part.stop - self.part.start]
        return self.hidden, self.weight, self.bias
