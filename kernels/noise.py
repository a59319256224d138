"""The stateless noise of `unif2ace/ops/_noise.py` on Triton tensors, bit for bit. No op of its own: `sampling` uses it.

That file defines counter, words and the way from a word to a Gumbel number; here are only the points where Triton needs
care to give the same bits:

* `tl.philox` with four uint32 counters and a 64-bit seed is exactly the generator of the contract. How `tl.rand` and
  `tl.randint4x` make counters of offsets differs between releases, so they are not used.
* A counter gives the words of four consecutive codes; a kernel that needs them all takes them as four tensors, since
  putting them in the order of the codes may move data between threads.
* No operation may be fused or approximated: every kernel that calls these functions has to be launched with
  `enable_fp_fusion=False`, and they use +, -, *, comparisons, conversions and integer operations only.

Cost, in instructions on Hopper: 60 per counter (40 of them multiplications, since the two halves of a product are two
instructions), 55 per Gumbel number, 5 per bound.
"""

import triton
import triton.language as tl

from unif2ace.ops import _noise

_C8, _C7, _C6, _C5, _C4, _C3, _C2, _C1 = (tl.constexpr(c) for c in _noise.LOG_COEFFICIENTS)
_LN2 = tl.constexpr(_noise.LN2)
_SQRT_HALF_BITS = tl.constexpr(_noise.SQRT_HALF_BITS)
_SERIES_LIMIT = tl.constexpr(_noise.SERIES_LIMIT)


@triton.jit
def block_words(seed, position, step, stream, block):
    """The words of the codes 4 j .. 4 j + 3 for every j of `block`, as four uint32 tensors.

    The arguments are integer tensors whose shapes broadcast, `stream` is one number; seeds use all 64 bits, the others
    their low 32.
    """
    c0, c1, c2 = block.to(tl.uint32), position.to(tl.uint32), step.to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, tl.full(c0.shape, stream, tl.uint32))


@triton.jit
def word(seed, position, step, stream, code):
    """The word of each code; a block of four is computed four times, so this is for few codes."""
    w0, w1, w2, w3 = block_words(seed, position, step, stream, code >> 2)
    return tl.where((code & 2) == 0, tl.where((code & 1) == 0, w0, w1), tl.where((code & 1) == 0, w2, w3))


@triton.jit
def _log1p_core(f, n):
    """log((1 + f) 2^n)."""
    q = f * _C8 + _C7
    q = q * f + _C6
    q = q * f + _C5
    q = q * f + _C4
    q = q * f + _C3
    q = q * f + _C2
    q = q * f + _C1
    q = q * f - 0.5
    return (q * (f * f) + f) + n * _LN2


@triton.jit
def _split_exponent(y):
    """Positive normal y = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)): (f, n)."""
    shifted = y.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    f = ((shifted & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    return f, (shifted >> 23).to(tl.float32)


@triton.jit
def log(y):
    """log of positive normal y, the contract's polynomial; NaN stays NaN."""
    f, n = _split_exponent(y)
    return tl.where(y == y, _log1p_core(f, n), y)


@triton.jit
def gumbel(word):
    """Standard Gumbel numbers of uint32 words."""
    small = word < _SERIES_LIMIT
    y = (tl.where(small, word, word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    f, n = _split_exponent(y)
    exponential = -_log1p_core(tl.where(small, -y, f), tl.where(small, 0.0, n))
    f, n = _split_exponent(exponential)
    return -_log1p_core(f, n)


@triton.jit
def gumbel_bound(word):
    """An upper bound of gumbel(word) for a sixth of its price, falling as the word rises.

    The bound of csrc/common/gumbel.h, where its derivation stands: 110.22 is 159 ln 2 + 0.01, the factor ln 2 / 2^23.
    """
    return 110.22 - word.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32) * 8.2629586e-8
