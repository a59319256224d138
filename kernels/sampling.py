"""Triton kernels of the op `sampling`: logits -> tokens and confidences in one pass; `sampling_remask.py` has `remask`.

**sample_tokens.** One program takes one row of logits (several, where rows are short), tile after tile of 2048 codes:

    z     = a * cond - w * uncond                      guidance in float32
    high  = max z,  total = sum e^(z - high)           online softmax, for the confidence z_code - high - log(total)
    bound >= z / T + Gumbel                            from random words, without a logarithm

each for 512 *slots*: slot j of a row holds the codes 4 j .. 4 j + 3 of every tile, those that share a Philox counter.
So the pass has no reduction over threads, and no Gumbel numbers, which cost as much as all the rest together: the bound
of four codes is their largest z / T plus `noise.gumbel_bound` of their smallest word. Then exact keys are computed for
the slot with the largest bound, and for the next one while its bound reaches the best key. As bounds are too large by
0.06 at most where it matters, that is one slot, rarely two. **Nothing is lost**: products with a positive number, sums
and conversions round monotonically, so that bounds hold for the rounded keys (csrc/cpu/sampling_row.h has the argument
at length); equal keys go to the lowest code.

Bytes: R*V logits, twice that with guidance, and 40 per row. 8192 guided bfloat16 rows of 8192 codes are 268 MB: 62 us
at the 4.3 TB/s to which an H200 copies; 31 us without guidance. Instructions, counted in the machine code for Hopper:
32 per guided logit (26 without guidance), of which 9 are integer multiplications at half rate, plus about 700 per row
and warp for the winner and the ends. That is 43 (37) per logit, 2.9e9 (2.5e9) on 132 * 128 lanes at 1.75 GHz: 98 us
(84 us). So arithmetic is the limit; expected are 0.6 of the copy speed with guidance and 0.35 without. (Ten rounds of
Philox are half of the loop; one counter for four words is already the least.)

**head_sample.** A library product for a chunk of rows, then the kernel above on logits that are still in the L2 cache.

Deterministic and batch-invariant: tiles and the order of sums depend on V only. (The logits of `head_sample` come from
a library, whose last bits may depend on the number of rows it multiplies at once.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unif2ace.kernels import _device, noise
from unif2ace.kernels.sampling_remask import remask

__all__ = ["head_sample", "remask", "sample_tokens"]

# Codes per tile: with four warps, 16 per thread, that is two 16-byte loads of bfloat16 (a tile ahead) and four Philox
# counters, which hide each other's latency. One warp per row would leave a chip idle with a few hundred rows.
TILE = 2048
NUM_WARPS = 4
# Interpreted programs run one after the other at milliseconds each: let them take more rows.
PROGRAM_CODES = 1 << 17 if _device.INTERPRETED else TILE
FOLD_TILE = 2048
GEMM_ROWS = 128  # chunks of head_sample are multiples of the rows of a library's tile


@triton.jit
def _load(cond, uncond, code, columns, cond_stride, uncond_stride, GUIDED: tl.constexpr):
    """Conditional and unconditional scores of rows that start at `cond` and `uncond`, as they lie in memory.

    Behind the last column they are such that `_guide` makes -inf of them.
    """
    inside = code < columns
    code = code.to(tl.int64)
    c = tl.load(cond + code * cond_stride, mask=inside, other=float("-inf"))
    if GUIDED:
        u = tl.load(uncond + code * uncond_stride, mask=inside, other=0.0)
    else:
        u = c
    return c, u


@triton.jit
def _quads(s0, s1, s2, s3):
    """[R, N, 4] of four [R, N]."""
    pairs = tl.join(tl.join(s0, s2), tl.join(s1, s3))  # [.., a, b] is number 2 a + b: each join adds the last dimension
    return tl.reshape(pairs, [s0.shape[0], s0.shape[1], 4])


@triton.jit
def _load_tile(
    cond, uncond, first, columns, cond_stride, uncond_stride,
    TILE: tl.constexpr, GUIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of the codes first .. first + TILE, [R, TILE / 4, 4], such that a thread has all four of a block."""
    if ALIGNED:
        code = first + tl.arange(0, TILE)[None, :]
        flat_c, flat_u = _load(cond, uncond, code, columns, cond_stride, uncond_stride, GUIDED)
        c = tl.reshape(flat_c, [flat_c.shape[0], TILE // 4, 4])
        u = tl.reshape(flat_u, [flat_u.shape[0], TILE // 4, 4])
    else:  # one number per load, and neighbours would go to different threads
        code = first + 4 * tl.arange(0, TILE // 4)[None, :]
        c0, u0 = _load(cond, uncond, code, columns, cond_stride, uncond_stride, GUIDED)
        c1, u1 = _load(cond, uncond, code + 1, columns, cond_stride, uncond_stride, GUIDED)
        c2, u2 = _load(cond, uncond, code + 2, columns, cond_stride, uncond_stride, GUIDED)
        c3, u3 = _load(cond, uncond, code + 3, columns, cond_stride, uncond_stride, GUIDED)
        c, u = _quads(c0, c1, c2, c3), _quads(u0, u1, u2, u3)
    return c, u


@triton.jit
def _guide(cond, uncond, cond_factor, uncond_factor, GUIDED: tl.constexpr):
    z = cond.to(tl.float32)
    if GUIDED:
        z = z * cond_factor - uncond.to(tl.float32) * uncond_factor
    return z


@triton.jit
def _exp(z, high):
    """e^(z - high); where nothing but -inf has come so far, 0 and not the NaN of -inf - -inf."""
    # exp2 is one instruction; exp would spend three more on keeping results below 2^-126.
    return tl.exp2((z - tl.where(high == float("-inf"), 0.0, high)) * 1.4426950408889634)


# What changes from call to call without changing the code: no compilation of its own for a size of 1 or of 16 n.
@triton.jit(do_not_specialize=["rows", "stride_seed", "stride_position", "stride_step", "stream"])
def _sample_kernel(
    cond, uncond, seeds, positions, steps, codes, confidences,
    rows, columns, cond_row, cond_stride, uncond_row, uncond_stride, stride_seed, stride_position, stride_step,
    cond_factor, uncond_factor, inverse_temperature, stream,
    ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    GUIDED: tl.constexpr, NOISY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # The last program may hold the last row several times: equal work, equal results, and no masks.
    row = tl.minimum(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], rows - 1)
    seed = tl.load(seeds + row * stride_seed)
    position = tl.load(positions + row * stride_position)
    step = tl.load(steps + row * stride_step)
    cond += row * cond_row
    uncond += row * uncond_row

    # One pass. Slot j of a row holds the codes 4 j .. 4 j + 3 of every tile.
    slot = tl.arange(0, TILE // 4)[None, :]
    high = tl.full([ROWS, TILE // 4], float("-inf"), tl.float32)  # the largest z of each slot
    total = tl.zeros([ROWS, TILE // 4], tl.float32)  # its sum of e^(z - high)
    bound = tl.full([ROWS, TILE // 4], float("-inf"), tl.float32)  # no key of it is larger
    c, u = _load_tile(cond, uncond, 0, columns, cond_stride, uncond_stride, TILE, GUIDED, ALIGNED)
    for first in range(0, columns, TILE):
        z = _guide(c, u, cond_factor, uncond_factor, GUIDED)
        # The next tile is on its way while this one is worked on.
        c, u = _load_tile(cond, uncond, first + TILE, columns, cond_stride, uncond_stride, TILE, GUIDED, ALIGNED)
        top = tl.max(z, 2)
        before, high = high, tl.maximum(high, top)
        total = total * _exp(before, high) + tl.sum(_exp(z, high[:, :, None]), 2)
        if NOISY:
            w0, w1, w2, w3 = noise.block_words(seed, position, step, stream, first // 4 + slot)
            smallest = tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3))
            top = top * inverse_temperature + noise.gumbel_bound(smallest)
        bound = tl.maximum(bound, top)

    # Exact keys, a slot at a time, the most promising first, until no slot can hold the winner.
    best = tl.full([ROWS, 1], float("-inf"), tl.float32)
    best_code = tl.zeros([ROWS, 1], tl.int32)  # code 0 where every key is -inf
    best_c, best_u = _load(cond, uncond, best_code, columns, cond_stride, uncond_stride, GUIDED)
    best_z = _guide(best_c, best_u, cond_factor, uncond_factor, GUIDED)
    place = tl.arange(0, 4 * TILES)[None, :]
    may_win = bound > best
    while tl.max(may_win.to(tl.int32)) > 0:
        at = tl.argmax(tl.where(may_win, bound, float("-inf")), 1, keep_dims=True)  # a row that is done looks at slot 0
        bound = tl.where(slot == at, float("-inf"), bound)
        code = place // 4 * TILE + 4 * at + place % 4
        slot_c, slot_u = _load(cond, uncond, code, columns, cond_stride, uncond_stride, GUIDED)
        slot_z = _guide(slot_c, slot_u, cond_factor, uncond_factor, GUIDED)
        key = slot_z
        if NOISY:
            key = slot_z * inverse_temperature + noise.gumbel(noise.word(seed, position, step, stream, code))
        found = tl.max(key, 1, keep_dims=True)
        found_code = tl.min(tl.where(key == found, code, columns), 1, keep_dims=True)
        found_z = tl.sum(tl.where(code == found_code, slot_z, 0.0), 1, keep_dims=True)
        better = (found > best) | ((found == best) & (found_code < best_code))
        best = tl.where(better, found, best)
        best_code = tl.where(better, found_code, best_code)
        best_z = tl.where(better, found_z, best_z)
        # A bound that equals the best key promises a tie at most, which only a lower code would win.
        may_win = (bound > best) | ((bound == best) & (4 * slot < best_code))

    highest = tl.max(high, 1, keep_dims=True)
    confidence = (best_z - highest) - noise.log(tl.sum(total * _exp(high, highest), 1, keep_dims=True))
    tl.store(codes + row, best_code)
    tl.store(confidences + row, confidence)


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
    tiles = triton.next_power_of_2(triton.cdiv(columns, tile))
    rows_per_program = PROGRAM_CODES // tile
    _sample_kernel[(triton.cdiv(rows, rows_per_program),)](
        logits, other, seeds, positions, steps, codes, confidences,
        rows, columns, *logits.stride(), *other.stride(), seeds.stride(0), positions.stride(0), steps.stride(0),
        1.0 + guidance, guidance, 1.0 / temperature if temperature > 0.0 else 0.0, stream,
        ROWS=rows_per_program, TILE=tile, TILES=tiles, GUIDED=uncond is not None, NOISY=temperature > 0.0,
        ALIGNED=all(_is_aligned(scores) for scores in (logits, other)), num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _is_aligned(scores: Tensor) -> bool:
    """Will Triton load 16 bytes at a time? It knows of addresses, strides and sizes only whether 16 divides them."""
    (rows, columns), (row, column) = scores.shape, scores.stride()
    return scores.data_ptr() % 16 == 0 and column == 1 and columns % 16 == 0 and (row % 16 == 0 or rows == 1)


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
