"""Triton kernels of the op `sampling`: logits -> tokens and confidences in one pass, and the choice of what to mask.

**sample_tokens.** One program takes one row of logits (several, where rows are short) in tiles of 2048 codes, in order:

    z      = a * cond - w * uncond                     guidance in float32
    m, sum = online softmax                            for the confidence z_code - m - log(sum)
    best   = the largest key z / T + Gumbel, the lowest code among equal keys

A Gumbel number costs as much as everything else together, so only codes that may win get one: `noise.gumbel_bound`
turns their random word into an upper bound of the key, and while the bound of some code reaches the best key, the code
with the largest bound is settled. **The skipping is exact**: products with a positive number, sums and conversions
round monotonically, so z / T + Gumbel <= z / T + bound holds for the rounded numbers too (csrc/cpu/sampling_row.h has
the argument at length). A tile holds the best key of the row so far with probability 1 / (its number), so a row of V
codes settles about H(V / 2048) = 1 + 1/2 + 1/3 + .. codes; a round costs as much as two Gumbel numbers per thread.

Bytes: R*V logits, twice that with guidance, and 40 per row. 8192 guided bfloat16 rows of 8192 codes are 268 MB: 62 us
at the 4.3 TB/s to which an H200 copies; without guidance 31 us. Operations per logit: 10 integer ones for its word, 3
for the bound, 9 for guidance, maximum and exponential. Integer multiplications run at half rate, so about 32 issue
slots, 2.1e9 over the 132 * 128 lanes of an H200 at 1.7 GHz: 75 us. Expected: bound by arithmetic, 0.7 of copy speed
with guidance and 0.4 without. It wins over any chain of library calls because these read or write the logits ten times.

**head_sample.** A library product for a chunk of rows, then the kernel above on logits that are still in the L2 cache.

**remask.** One program per image finds the threshold of its `keep_unknown` smallest keys bit by bit, 32 counts over the
keys instead of a sort; the rows that tie with it compete by position, 64 counts more, in the rare image that has such.

Batch-invariant: tiles and the order of sums depend on V only. (The logits of `head_sample` come from a library, whose
last bits may depend on the number of rows it multiplies at once.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels import _device, noise
from unif2ace.ops import _noise

# Codes per tile and program: 16 per thread, that is two 16-byte loads of bfloat16, one tile ahead. Four warps, because
# with one (and 512 codes) 8192 rows are just two waves of programs, and few rows leave most of the chip idle.
TILE = 2048
NUM_WARPS = 4
# Interpreted programs run one after the other at milliseconds each: let them take more rows.
PROGRAM_CODES = 1 << 17 if _device.INTERPRETED else TILE
REMASK_TILE = 1024
FOLD_TILE = 2048
GEMM_ROWS = 128  # chunks of head_sample are multiples of the rows of a library's tile


@triton.jit
def _load(logits, uncond, row, code, stride_row, stride_code, uncond_row, uncond_code, mask, GUIDED: tl.constexpr):
    """Conditional and unconditional scores as they lie in memory; the latter only with guidance."""
    cond = tl.load(logits + row * stride_row + code * stride_code, mask=mask, other=0.0)
    if GUIDED:
        return cond, tl.load(uncond + row * uncond_row + code * uncond_code, mask=mask, other=0.0)
    else:
        return cond, cond


@triton.jit
def _guide(cond, uncond, cond_factor, uncond_factor, GUIDED: tl.constexpr):
    z = cond.to(tl.float32)
    if GUIDED:
        z = z * cond_factor - uncond.to(tl.float32) * uncond_factor
    return z


@triton.jit
def _sample_kernel(
    logits, uncond, seeds, positions, steps, codes, confidences,
    rows, columns, stride_row, stride_code, uncond_row, uncond_code, stride_seed, stride_position, stride_step,
    cond_factor, uncond_factor, inverse_temperature, stream,
    ROWS: tl.constexpr, TILE: tl.constexpr, GUIDED: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    seed = tl.load(seeds + row * stride_seed, mask=inside, other=0)[:, None]
    position = tl.load(positions + row * stride_position, mask=inside, other=0).to(tl.int64)[:, None]
    step = tl.load(steps + row * stride_step, mask=inside, other=0).to(tl.int64)[:, None]
    stream_word = tl.zeros([ROWS, 1], tl.int64) + stream
    lane = tl.arange(0, TILE)
    block = tl.arange(0, TILE // 4)[None, :].to(tl.int64)

    high = tl.full([ROWS], float("-inf"), tl.float32)  # largest z
    total = tl.zeros([ROWS], tl.float32)  # sum of e^(z - high)
    best = tl.full([ROWS], float("-inf"), tl.float32)  # largest key, its code and z; code 0 where every key is -inf
    best_code = tl.zeros([ROWS], tl.int32)
    cond, other = _load(
        logits, uncond, row, 0, stride_row, stride_code, uncond_row, uncond_code, inside, GUIDED
    )
    best_z = _guide(cond, other, cond_factor, uncond_factor, GUIDED)

    row_2d = row[:, None]
    mask = inside[:, None] & (lane < columns)[None, :]
    cond, other = _load(
        logits, uncond, row_2d, lane[None, :].to(tl.int64),
        stride_row, stride_code, uncond_row, uncond_code, mask, GUIDED,
    )  # fmt: skip
    for first in range(0, columns, TILE):
        z = tl.where(mask, _guide(cond, other, cond_factor, uncond_factor, GUIDED), float("-inf"))
        # The next tile is on its way while this one is worked on.
        code = first + TILE + lane
        mask = inside[:, None] & (code < columns)[None, :]
        cond, other = _load(
            logits, uncond, row_2d, code[None, :].to(tl.int64),
            stride_row, stride_code, uncond_row, uncond_code, mask, GUIDED,
        )  # fmt: skip

        before, high = high, tl.maximum(high, tl.max(z, 1))
        shift = tl.where(high == float("-inf"), 0.0, high)  # nothing but -inf so far: -inf - -inf would be NaN
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)

        if NOISY:
            scaled = z * inverse_temperature
            word = noise.words(seed, position, step, stream_word, first // 4 + block)
            bound = scaled + noise.gumbel_bound(word)
        else:
            scaled = z
            bound = z
        may_win = bound > best[:, None]
        while tl.max(may_win.to(tl.int32)) > 0:
            at = tl.argmax(tl.where(may_win, bound, float("-inf")), 1)
            chosen = may_win & (lane[None, :] == at[:, None])
            some = tl.max(chosen.to(tl.int32), 1) > 0
            key = tl.sum(tl.where(chosen, scaled, 0.0), 1)
            if NOISY:
                key += noise.gumbel(tl.sum(tl.where(chosen, word, 0), 1).to(tl.uint32))
            at_code = first + at
            better = some & ((key > best) | ((key == best) & (at_code < best_code)))
            best = tl.where(better, key, best)
            best_code = tl.where(better, at_code, best_code)
            best_z = tl.where(better, tl.sum(tl.where(chosen, z, 0.0), 1), best_z)
            # Settled codes drop out, and those that can tie at most have to come before the code they tie with.
            may_win = may_win & ~chosen
            earlier = (first + lane)[None, :] < best_code[:, None]
            may_win = may_win & ((bound > best[:, None]) | ((bound == best[:, None]) & earlier))

    confidence = (best_z - high) - noise.log(total)
    tl.store(codes + row, best_code, mask=inside)
    tl.store(confidences + row, confidence, mask=inside)


@triton.jit
def _fold_kernel(
    cond, uncond, out, rows, columns, cond_row, cond_column, uncond_row, uncond_column, cond_factor, uncond_factor,
    TILE: tl.constexpr,
):  # fmt: skip
    """out = a * cond - w * uncond, row after row without gaps."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, column = at // columns, at % columns
    mask = row < rows
    c = tl.load(cond + row * cond_row + column * cond_column, mask=mask, other=0.0)
    u = tl.load(uncond + row * uncond_row + column * uncond_column, mask=mask, other=0.0)
    folded = _guide(c, u, cond_factor, uncond_factor, True)
    tl.store(out + at, folded.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _ordered(key):
    """32 bits that, unsigned, sort like the floats; the two zeros tie, NaN comes last."""
    bits = (key + 0.0).to(tl.int32, bitcast=True)
    # Negative floats grow in magnitude with their bits: turn all of them around; of the others only the sign.
    sortable = bits ^ ((bits >> 31) | (-2147483647 - 1))
    return tl.where(key == key, sortable, -1)


@triton.jit
def _load_ranks(keys, positions, row, mask, stride_position):
    """Keys and positions of some rows, as uint64 numbers of the same order."""
    key = tl.load(keys + row, mask=mask, other=-1).to(tl.uint32, bitcast=True).to(tl.uint64)
    position = tl.load(positions + row * stride_position, mask=mask, other=0).to(tl.int64)
    return key, position.to(tl.uint64, bitcast=True) ^ 0x8000000000000000


@triton.jit
def _count(keys, positions, first, last, stride_position, key_limit, limit, TIED: tl.constexpr, TILE: tl.constexpr):
    """Rows whose key is below `limit`; TIED: rows whose key is `key_limit` and whose position is below `limit`."""
    count = tl.zeros([TILE], tl.int32)
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        mask = row < last
        key, position = _load_ranks(keys, positions, row, mask, stride_position)
        if TIED:
            below = (key == key_limit) & (position < limit)
        else:
            below = key < limit
        count += (mask & below).to(tl.int32)
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


@triton.jit
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
    none = tl.zeros([TILE], tl.int64)
    for start in range(first, last, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < last
        confidence = tl.load(confidences + row * stride_confidence, mask=inside, other=0.0).to(tl.float32)
        position = tl.load(positions + row * stride_position, mask=inside, other=0).to(tl.int64)
        word, _, _, _ = noise.counter_words(seed + none, position, step + none, none + STREAM, none)
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
        key, position = _load_ranks(keys, positions, row, inside, stride_position)
        tied = inside & (key == key_limit)
        last_place = (tied & (position == position_limit)).to(tl.int32)
        chosen = (key < key_limit) | (tied & (position < position_limit))
        chosen |= (last_place > 0) & (tl.cumsum(last_place, 0) <= left)
        left -= tl.sum(last_place)
        tl.store(mask + row, chosen, mask=inside)


# ------------------------------------------------------------------------------------------------------ registered ops


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    temperature: float,
    uncond_logits: Tensor | None,
    guidance: float,
    stream: int,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    codes = torch.empty(rows, dtype=torch.int32, device=logits.device)
    confidences = torch.empty(rows, dtype=torch.float32, device=logits.device)
    uncond = uncond_logits if guidance != 0.0 else None
    _sample(logits, uncond, guidance, seeds, positions, steps, temperature, stream, codes, confidences)
    return codes, confidences


def _sample(
    logits: Tensor,
    uncond: Tensor | None,
    guidance: float,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    temperature: float,
    stream: int,
    codes: Tensor,
    confidences: Tensor,
) -> None:
    """Sample all rows of `logits` into `codes` and `confidences`."""
    rows, columns = logits.shape
    if rows == 0:
        return
    other = logits if uncond is None else uncond
    tile = min(TILE, max(16, triton.next_power_of_2(columns)))
    rows_per_program = PROGRAM_CODES // tile
    _sample_kernel[(triton.cdiv(rows, rows_per_program),)](
        logits, other, seeds, positions, steps, codes, confidences,
        rows, columns, *logits.stride(), *other.stride(), seeds.stride(0), positions.stride(0), steps.stride(0),
        1.0 + guidance, guidance, 1.0 / temperature if temperature > 0.0 else 0.0, stream,
        ROWS=rows_per_program, TILE=tile, GUIDED=uncond is not None, NOISY=temperature > 0.0,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def head_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    steps: Tensor,
    temperature: float,
    uncond_hidden: Tensor | None,
    guidance: float,
    stream: int,
) -> tuple[Tensor, Tensor]:
    rows, columns = hidden.shape[0], weight.shape[0]
    codes = torch.empty(rows, dtype=torch.int32, device=hidden.device)
    confidences = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if uncond_hidden is not None and guidance != 0.0 and rows > 0:
        hidden = _fold(hidden, uncond_hidden, guidance)
    # A third of the L2 cache for the logits of a chunk: the rest is for the weight, which every chunk reads again.
    chunk = _device.l2_bytes(hidden.device) // 3 // (columns * hidden.element_size())
    chunk = max(GEMM_ROWS, chunk // GEMM_ROWS * GEMM_ROWS)
    buffer = torch.empty(min(chunk, rows), columns, dtype=hidden.dtype, device=hidden.device)
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        logits = buffer[: part.stop - first]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        places = (seeds[part], positions[part], steps[part])
        _sample(logits, None, 0.0, *places, temperature, stream, codes[part], confidences[part])
    return codes, confidences


def _fold(hidden: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """(1 + w) hidden - w uncond in float32, rounded once: one pass over memory."""
    folded = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _fold_kernel[(triton.cdiv(hidden.numel(), FOLD_TILE),)](
        hidden, uncond, folded, *hidden.shape, *hidden.stride(), *uncond.stride(), 1.0 + guidance, guidance,
        TILE=FOLD_TILE, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return folded


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
        STREAM=_noise.CONFIDENCE_STREAM, TILE=REMASK_TILE, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return mask
