"""Triton kernel of `remask`: which tokens of an image are drawn again.

One program per image finds the `keep_unknown`-th smallest key bit by bit: 32 counts over keys that stay in the
first-level cache, instead of a sort. Where more rows tie with it than are wanted, 64 counts more find the position that
separates them. Deterministic, and an image's mask depends on its own rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels import noise
from unif2ace.ops import _noise

TILE = 1024
NUM_WARPS = 4


@triton.jit
def _ordered(key):
    """32 bits that, unsigned, sort like the floats; the two zeros tie, NaN comes last."""
    bits = (key + 0.0).to(tl.int32, bitcast=True)
    # Negative floats grow in magnitude with their bits: turn all of them around; of the others only the sign.
    sortable = bits ^ ((bits >> 31) | (-2147483647 - 1))
    return tl.where(key == key, sortable, -1)


@triton.jit
def _load_keys(keys, row, inside):
    """As uint64, whatever sorts like the keys."""
    return tl.load(keys + row, mask=inside, other=-1).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _load_positions(positions, row, inside, stride):
    """As uint64, whatever sorts like the positions."""
    position = tl.load(positions + row * stride, mask=inside, other=0).to(tl.int64)
    return position.to(tl.uint64, bitcast=True) ^ 0x8000000000000000


@triton.jit
def _count(keys, positions, first, last, stride_position, key_limit, limit, TIED: tl.constexpr, TILE: tl.constexpr):
    """Rows whose key is below `limit`; TIED: rows whose key is `key_limit` and whose position is below `limit`."""
    count = tl.zeros([TILE], tl.int32)
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < last
        key = _load_keys(keys, row, inside)
        if TIED:
            below = (key == key_limit) & (_load_positions(positions, row, inside, stride_position) < limit)
        else:
            below = key < limit
        count += (inside & below).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _nth_smallest(keys, positions, first, last, stride_position, key_limit, n, TIED: tl.constexpr, TILE: tl.constexpr):
    """The n-th smallest number of those that `_count` compares: the largest limit with fewer than n below it."""
    limit = tl.full([], 0, tl.uint64)
    bit = tl.full([], 0x8000000000000000 if TIED else 0x80000000, tl.uint64)
    while bit > 0:
        if _count(keys, positions, first, last, stride_position, key_limit, limit | bit, TIED, TILE) < n:
            limit |= bit
        bit >>= 1
    return limit


@triton.jit(
    do_not_specialize=[
        "rows", "stride_confidence", "stride_offset", "stride_keep", "stride_seed", "stride_position", "stride_step",
        "stride_tau",
    ]
)  # fmt: skip
def _remask_kernel(
    confidences, offsets, keep_unknown, seeds, positions, steps, tau, keys, mask, rows,
    stride_confidence, stride_offset, stride_keep, stride_seed, stride_position, stride_step, stride_tau,
    STREAM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    # Offsets nobody has checked must not lead out of the tensors.
    first = tl.maximum(tl.load(offsets + image * stride_offset).to(tl.int64), 0)
    last = tl.minimum(tl.load(offsets + (image + 1) * stride_offset).to(tl.int64), rows)
    keep = tl.load(keep_unknown + image * stride_keep).to(tl.int64)
    seed = tl.load(seeds + image * stride_seed)
    step = tl.load(steps + image * stride_step).to(tl.int64)
    weight = tl.load(tau + image * stride_tau).to(tl.float32)
    none = tl.zeros([TILE], tl.int32)
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < last
        confidence = tl.load(confidences + row * stride_confidence, mask=inside, other=0.0).to(tl.float32)
        position = tl.load(positions + row * stride_position, mask=inside, other=0).to(tl.int64)
        word, _, _, _ = noise.block_words(seed, position, step, STREAM, none)
        tl.store(keys + row, _ordered(confidence + weight * noise.gumbel(word)), mask=inside)
    tl.debug_barrier()  # below, a thread may read what another one wrote

    zero = tl.full([], 0, tl.uint64)
    key_limit = _nth_smallest(keys, positions, first, last, stride_position, zero, keep, False, TILE)
    left = keep - _count(keys, positions, first, last, stride_position, zero, key_limit, False, TILE)

    # Of the rows that tie with it, nearly always one, the lowest positions fill up; of equal positions the first rows.
    position_limit = zero - 1
    if _count(keys, positions, first, last, stride_position, key_limit, position_limit, True, TILE) > left:
        position_limit = _nth_smallest(keys, positions, first, last, stride_position, key_limit, left, True, TILE)
    left -= _count(keys, positions, first, last, stride_position, key_limit, position_limit, True, TILE)
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < last
        key, position = _load_keys(keys, row, inside), _load_positions(positions, row, inside, stride_position)
        tied = inside & (key == key_limit)
        last_place = (tied & (position == position_limit)).to(tl.int32)
        chosen = (key < key_limit) | (tied & (position < position_limit))
        chosen |= (last_place > 0) & (tl.cumsum(last_place, 0) <= left)
        left -= tl.sum(last_place)
        tl.store(mask + row, chosen, mask=inside)


def remask(
    log_confidence: Tensor,
    row_offsets: Tensor,
    keep_unknown: Tensor,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    tau: Tensor,
) -> Tensor:
    rows, images, device = log_confidence.shape[0], seeds.shape[0], log_confidence.device
    mask = torch.zeros(rows, dtype=torch.bool, device=device)  # False for rows that belong to no image
    if rows == 0 or images == 0:
        return mask
    keys = torch.empty(rows, dtype=torch.int32, device=device)
    columns = (log_confidence, row_offsets, keep_unknown, seeds, positions, steps, tau)
    _remask_kernel[(images,)](
        *columns, keys, mask, rows, *(column.stride(0) for column in columns),
        STREAM=_noise.CONFIDENCE_STREAM, TILE=TILE, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return mask
