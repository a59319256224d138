"""Float32 functions with fixed steps, the twins of csrc/common/numerics.h: same constants, same order, same bits.

Triton's `tl.exp` and `tl.log` are the approximations of the chip, whose last bits differ from those of any CPU. A
kernel whose *choices* hang on such a value uses these instead, and is launched with `enable_fp_fusion=False`, so that
no product and sum are rounded as one. About 15 operations an element: nothing where memory is the bound.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_nonpositive(x):
    """e^x for x <= 0; 0 below -86, NaN of NaN. x = n ln 2 + r, a polynomial for e^r, and n added to the exponent."""
    SHIFT: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
    t = tl.where(x < -86.0, -86.0, x) * 1.44269504 + SHIFT
    n = t - SHIFT
    r = (tl.where(x < -86.0, -86.0, x) - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts
    y = r * (1.0 / 5040.0) + 1.0 / 720.0
    y = y * r + 1.0 / 120.0
    y = y * r + 1.0 / 24.0
    y = y * r + 1.0 / 6.0
    y = y * r + 0.5
    y = (y * (r * r) + r) + 1.0
    bits = y.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23)
    return tl.where(x < -86.0, 0.0, tl.where(x == x, bits.to(tl.float32, bitcast=True), x))


@triton.jit
def log_positive(x):
    """ln x for normal x > 0: x = m 2^e, ln m = 2 artanh((m - 1) / (m + 1))."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    q = s * s
    tail = q * (2.0 / 3.0 + q * (2.0 / 5.0 + q * (2.0 / 7.0 + q * (2.0 / 9.0))))
    e = exponent.to(tl.float32)
    result = e * 0.693359375 + (s * tail - e * 2.12194440e-4 + 2.0 * s)
    return tl.where(x == x, result, x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), out of e^-|x|: neither side overflows or cancels."""
    e = exp_nonpositive(tl.where(x < 0.0, x, -x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def log_sigmoid(x):
    """ln sigmoid(x); ln(1 + e) with a correction for the rounding of 1 + e."""
    e = exp_nonpositive(tl.where(x < 0.0, x, -x))
    u = 1.0 + e
    return tl.where(x < 0.0, x, 0.0) - (log_positive(u) + tl.div_rn(e - (u - 1.0), u))


@triton.jit
def ordered_key(x):
    """An int32 that sorts like the float; +0 and -0 tie, NaN stands above infinity (as sorting has it)."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
