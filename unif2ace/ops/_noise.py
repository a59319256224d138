"""Stateless noise: a random number is a pure function of (seed, code, position, step, stream).

This file is the specification that the C++, CUDA and Triton kernels reproduce **bit for bit**.

**Counter.** Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
64-bit seed of the request, low word first. The counter is `(code >> 2, position, step, stream)`; its four output words
belong to the codes `4j, 4j + 1, 4j + 2, 4j + 3`. The noise of an image therefore depends on its own seed only: not on
the batch it travels in, the tile shape, the device or the back end. One round, on 32-bit words:

    c0, c1, c2, c3 = hi(M1 * c2) ^ c1 ^ k0,  lo(M1 * c2),  hi(M0 * c0) ^ c3 ^ k1,  lo(M0 * c0)

**Word to Gumbel.** With v = (x + 1/2) / 2^32, `E = -log(1 - v)` is exponential and `g = -log E` is standard Gumbel.
Both tails are exact: large g comes from small v, which keeps its leading zeros. In float32, every operation rounded on
its own (no fused multiply-add), in this order:

    x <  2^30:   f = -(float(x) + 0.5) * 2^-32,                         E = -log1p_core(f, 0)
    x >= 2^30:   w =  (float(2^32 - 1 - x) + 0.5) * 2^-32, w = 2^n m,   E = -log1p_core(m - 1, n)
    E = 2^n m:   g = -log1p_core(m - 1, n)

`float()` rounds an unsigned integer to nearest even. `2^n m` splits the bit pattern b of a positive normal number so
that m lies in [sqrt(1/2), sqrt(2)), with s = 0x3F3504F3, the bits of sqrt(1/2):
`t = b - s; n = t >> 23 (arithmetic); m = bits((t & 0x7FFFFF) + s)`.

**log1p_core(f, n)** = log((1 + f) 2^n) for f in [sqrt(1/2) - 1, sqrt(2) - 1]:

    q = C8;   q = q * f + C7;  ...  q = q * f + C1;  q = q * f - 0.5       # 8 x (multiply, then add)
    r = (q * (f * f)) + f;     r = r + n * LN2

C1 .. C8 are the minimax fit of (log(1 + f) - f + f^2 / 2) / f^3, error weighted by f^2, rounded to float32: the
relative error of the polynomial is below 2^-27, so that the rounding of the last few operations dominates.

Cost: about 30 integer operations per word and 45 float operations per Gumbel; nothing is read from memory. On a CPU
this file takes about 40 ns per number on one core (measured for 64 rows of 1000 codes).
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10
MASK32 = 0xFFFFFFFF

# Streams: one per purpose, so that two uses of the same (seed, position, step) never share a number.
TOKEN_STREAM, CONFIDENCE_STREAM, TEXT_STREAM = 0, 1, 2

# C8 .. C1: all are float32 numbers, written exactly.
LOG_COEFFICIENTS = tuple(
    float.fromhex(text)
    for text in (
        "-0x1.38b482p-4", "0x1.055aeap-3", "-0x1.0d8536p-3", "0x1.22da30p-3",
        "-0x1.547248p-3", "0x1.99a008p-3", "-0x1.000226p-2", "0x1.555554p-2",
    )
)  # fmt: skip
LN2 = float.fromhex("0x1.62e430p-1")  # float32(log 2)
SQRT_HALF_BITS = 0x3F3504F3  # bit pattern of float32(sqrt(1/2))
SERIES_LIMIT = 1 << 30  # x below: v < 1/4, where 1 - v would lose the low bits of v


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32-10 on int64 tensors that hold uint32 values; shapes broadcast. Returns the four output words."""
    for _ in range(PHILOX_ROUNDS):
        # The int64 product wraps, but its 64 bits are those of the unsigned product: shift and mask give the high word.
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c2 = ((p1 >> 32) ^ (c1 ^ k0)).bitwise_and_(MASK32), ((p0 >> 32) ^ (c3 ^ k1)).bitwise_and_(MASK32)
        c1, c3 = p1.bitwise_and_(MASK32), p0.bitwise_and_(MASK32)
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return c0, c1, c2, c3


def random_words(seeds: Tensor, positions: Tensor, steps: Tensor, stream: int, num_codes: int) -> Tensor:
    """Words of codes 0 .. num_codes - 1 for each row: [R, num_codes] int64 in [0, 2^32).

    seeds [R] int64 (any bit pattern); positions, steps [R] int32 or int64 (their low 32 bits are used).
    """
    device = seeds.device
    seeds = seeds.to(torch.int64)[:, None]
    # Words that do not depend on the code stay [R, 1] and broadcast: the first round is almost free.
    words = philox_4x32(
        torch.arange((num_codes + 3) // 4, device=device)[None, :],
        positions.to(torch.int64)[:, None] & MASK32,
        steps.to(torch.int64)[:, None] & MASK32,
        torch.full((1, 1), stream, dtype=torch.int64, device=device),
        seeds & MASK32,
        (seeds >> 32) & MASK32,
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :num_codes]


def log1p_core(f: Tensor, n: Tensor) -> Tensor:
    """log((1 + f) * 2^n) by the polynomial above; f and n float32 of one shape."""
    q = f * LOG_COEFFICIENTS[0]
    for coefficient in LOG_COEFFICIENTS[1:]:
        q = q.add_(coefficient).mul_(f)
    return q.sub_(0.5).mul_(f * f).add_(f).add_(n * LN2)


def split_exponent(y: Tensor) -> tuple[Tensor, Tensor]:
    """Positive normal float32 y = 2^n (1 + f), with 1 + f in [sqrt(1/2), sqrt(2)); returns float32 (f, n)."""
    shifted = y.contiguous().view(torch.int32) - SQRT_HALF_BITS
    mantissa = (shifted & 0x7FFFFF).add_(SQRT_HALF_BITS).view(torch.float32)
    return mantissa.sub_(1.0), (shifted >> 23).to(torch.float32)


def gumbel_from_words(x: Tensor) -> Tensor:
    """Standard Gumbel numbers (float32) from words x (int64 holding uint32 values), shape kept."""
    # Selection by exact multiplication with 0 and 1: torch.where and masked_fill are ten times slower on a CPU.
    large = (x >= SERIES_LIMIT).to(torch.int64)
    # 2^32 - 1 - x counts from the other end, so both halves convert small integers to float without losing bits.
    y = (x ^ (large * MASK32)).to(torch.float32).add_(0.5).mul_(2.0**-32)
    large = large.to(torch.float32)
    f, n = split_exponent(y)
    f, n = f.mul_(large).sub_(y.mul_(1.0 - large)), n.mul_(large)
    exponential = log1p_core(f, n).neg_()
    return log1p_core(*split_exponent(exponential)).neg_()


def gumbel_noise(seeds: Tensor, positions: Tensor, steps: Tensor, stream: int, num_codes: int) -> Tensor:
    """Gumbel noise of every (row, code): [R, num_codes] float32. See `random_words` for the arguments."""
    return gumbel_from_words(random_words(seeds, positions, steps, stream, num_codes))
