// 32-bit words to standard Gumbel numbers, bit for bit as unif2ace/ops/_noise.py defines it, and upper bounds.
//
// With v = (x + 1/2) / 2^32, E = -log(1 - v) is exponential and g = -log E is Gumbel. Both logarithms are one
// polynomial of separately rounded products and sums. Words below 2^30 feed v straight into the polynomial, the others
// feed 1 - v, counted from the other end: neither tail loses bits. Cost: about 50 float operations.
//
// g falls as the word rises. Checked for all 2^32 words: gumbel(x) is within [-3.13, 22.88], never rises with x, and
// never exceeds gumbel_bound(x).
#pragma once

#include "common/numerics.h"

namespace unif2ace {

// 33 ln 2, the Gumbel number of the word 0: there is no larger one.
constexpr float kLargestGumbel = 0x1.6dfb52p+4f;

// float(x) of a word read as an unsigned number, rounded to nearest even: both halves are exact, so only their sum
// rounds. (Few instruction sets convert unsigned integers.)
template <class F>
UNIF2ACE_INLINE F unsigned_to_float(Integers<F> x) {
  return IntegersOf<F>::to_float((x >> 16) & 0xffff) * 65536.0f + IntegersOf<F>::to_float(x & 0xffff);
}
template <>
UNIF2ACE_INLINE float unsigned_to_float<float>(int32_t x) {
  return static_cast<float>(static_cast<uint32_t>(x));
}

// Normal y > 0 as 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
template <class F>
UNIF2ACE_INLINE void split_exponent(F y, F& f, F& n) {
  const Integers<F> shifted = float_bits(y) - 0x3f3504f3;  // bits of sqrt(1/2)
  f = bits_float<F>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  n = IntegersOf<F>::to_float(shifted >> 23);
}

// log((1 + f) 2^n); coefficients and accuracy: _noise.py.
template <class F>
UNIF2ACE_INLINE F log1p_core(F f, F n) {
  F q = f * -0x1.38b482p-4f + 0x1.055aeap-3f;
  q = q * f + -0x1.0d8536p-3f;
  q = q * f + 0x1.22da30p-3f;
  q = q * f + -0x1.547248p-3f;
  q = q * f + 0x1.99a008p-3f;
  q = q * f + -0x1.000226p-2f;
  q = q * f + 0x1.555554p-2f;
  q = q * f - 0.5f;
  return (q * (f * f) + f) + n * 0x1.62e430p-1f;
}

template <class F>
UNIF2ACE_INLINE F gumbel(Integers<F> x) {
  const auto small = (x >> 30) == 0;
  const F y = (unsigned_to_float<F>(small ? x : ~x) + 0.5f) * 0x1p-32f;
  F f, n;
  split_exponent(y, f, n);
  f = small ? -y : f;
  n = small ? splat<F>(0.0f) : n;
  split_exponent(-log1p_core(f, n), f, n);
  return -log1p_core(f, n);
}

// An upper bound of gumbel(x) for a quarter of its price. g <= -log v since E >= v; and -log2(m 2^e) <= -e - (m - 1),
// which is linear in the bits of a float. Too large by 0.06 or less for the words that matter (by 0.41 for x = 1; x = 0
// gives 110). Every step falls, or stays, as x rises, rounding included: so the bound of the smallest of some words
// bounds them all. 110.22 is 159 ln 2 + 0.01: 127 for the exponent's bias, 32 for 2^-32, and room for rounding.
template <class F>
UNIF2ACE_INLINE F gumbel_bound(Integers<F> x) {
  return 110.22f - IntegersOf<F>::to_float(float_bits(unsigned_to_float<F>(x))) * 8.2629586e-8f;  // ln 2 / 2^23
}

}  // namespace unif2ace
