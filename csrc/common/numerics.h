// Float32 mathematics shared by CPU loops and CUDA kernels.
//
// Every function is straight-line code out of +, -, *, /, comparisons and integer operations, written once for F =
// float and for the vector types of cpu/lanes.h. So it becomes vector code on any instruction set (no library call in
// the way), and the result has the same bits everywhere, provided the compiler may not fuse a*b+c into one rounding
// (-ffp-contract=off, --fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define UNIF2ACE_INLINE __host__ __device__ __forceinline__
#else
// always_inline also carries the code into callers compiled for a wider instruction set (see cpu/isa.h).
#define UNIF2ACE_INLINE inline __attribute__((always_inline))
#endif
#define UNIF2ACE_PRAGMA_(text) _Pragma(#text)
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define UNIF2ACE_UNROLL(times) UNIF2ACE_PRAGMA_(GCC unroll times)
#else
#define UNIF2ACE_UNROLL(times) UNIF2ACE_PRAGMA_(unroll)
#endif

namespace unif2ace {

// The integers that go with F: same number of lanes, 32 bits each.
template <class F>
struct IntegersOf;
template <>
struct IntegersOf<float> {
  using type = int32_t;
  static UNIF2ACE_INLINE float to_float(int32_t i) { return static_cast<float>(i); }
};
template <class F>
using Integers = typename IntegersOf<F>::type;

// Unaligned access to memory, as wide as V.
template <class V, class T>
UNIF2ACE_INLINE V load(const T* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
UNIF2ACE_INLINE void store(T* to, V value) {
  memcpy(to, &value, sizeof value);
}

// The same value in every lane.
template <class F>
UNIF2ACE_INLINE F splat(float value) {
  return F{} + value;
}

template <class F>
UNIF2ACE_INLINE Integers<F> float_bits(F x) {
  Integers<F> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class F>
UNIF2ACE_INLINE F bits_float(Integers<F> bits) {
  F x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Bits pushed out at the top are lost, whatever the sign: for a scalar C++17 promises that of unsigned numbers only.
UNIF2ACE_INLINE int32_t shift_left(int32_t bits, int by) {
  return static_cast<int32_t>(static_cast<uint32_t>(bits) << by);
}
template <class Vector>
UNIF2ACE_INLINE Vector shift_left(Vector bits, int by) {
  return bits << by;
}

template <class F>
UNIF2ACE_INLINE F maximum(F a, F b) {
  return a > b ? a : b;
}

// An integer that sorts like the float: a < b as floats exactly when key(a) < key(b); any NaN comes last, as sorting
// has it. Lets top-k mark a taken entry with a key below that of -inf, and never hang on NaN.
template <class F>
UNIF2ACE_INLINE Integers<F> ordered_key(F x) {
  const Integers<F> bits = float_bits(x + 0.0f);               // -0 + 0 = +0: the two zeros are equal and have to tie
  const Integers<F> key = bits ^ ((bits >> 31) & 0x7fffffff);  // negative floats grow with their bits: turn them around
  return x == x ? key : Integers<F>{} + INT32_MAX;
}

// e^x for x <= 0, within one unit in the last place; 0 below -86 (e^-86 = 4.5e-38, the edge of the normal floats); NaN
// stays NaN. x = n ln 2 + r with |r| <= ln(2)/2; the Taylor remainder r^8/8! is under 6e-9, a tenth of that.
template <class F>
UNIF2ACE_INLINE F exp_nonpositive(F x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
  const F clamped = x < -86.0f ? splat<F>(-86.0f) : x;
  const F t = clamped * 1.44269504f + shift;
  const F n = t - shift;
  const F r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
  F y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = (y * (r * r) + r) + 1.0f;  // the small terms first: the last addition alone rounds at full size
  const F scaled =
      bits_float<F>(float_bits(y) + shift_left(float_bits(t), 23));  // n arrives in the exponent, the rest falls off
  return x < -86.0f ? splat<F>(0.0f) : (x == x ? scaled : x);
}

// 2^x for x <= 0, within two units in the last place; 0 below -126.5; NaN stays NaN. Cheaper than e^x where a factor of
// log2(e) costs nothing. x = n + r with |r| <= 1/2; the polynomial is the minimax one of 2^r, error below 2e-9.
template <class F>
UNIF2ACE_INLINE F exp2_nonpositive(F x) {
  const float shift = 12582912.0f + 127.0f;  // as above; 127 is the exponent of 1, so that -127 ends as the float 0
  const F clamped = maximum(splat<F>(-127.0f), x);
  const F t = clamped + shift;
  const F r = clamped - (t - shift);
  F y = r * 1.53533620e-4f + 1.33988746e-3f;
  y = y * r + 9.61843736e-3f;
  y = y * r + 5.55033247e-2f;
  y = y * r + 2.40226479e-1f;
  y = y * r + 6.93147203e-1f;
  y = y * r + 1.0f;
  return y * bits_float<F>(shift_left(float_bits(t), 23));
}

// ln x for normal x > 0, error below 1.5e-7 (absolute near 1, relative elsewhere).
// x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m-1)/(m+1), |s| < 0.172: five odd terms suffice.
template <class F>
UNIF2ACE_INLINE F log_positive(F x) {
  const Integers<F> exponent = (float_bits(x) - 0x3f3504f3) >> 23;  // bits of sqrt(1/2)
  const F m = bits_float<F>(float_bits(x) - shift_left(exponent, 23));
  const F s = (m - 1.0f) / (m + 1.0f);
  const F q = s * s;
  const F tail = q * (2.0f / 3.0f + q * (2.0f / 5.0f + q * (2.0f / 7.0f + q * (2.0f / 9.0f))));
  const F e = IntegersOf<F>::to_float(exponent);
  const F result = e * 0.693359375f + (s * tail - e * 2.12194440e-4f + 2.0f * s);
  return x == x ? result : x;
}

// 1 / (1 + e^-x), computed from e^-|x| so that neither side overflows or cancels.
template <class F>
UNIF2ACE_INLINE F sigmoid(F x) {
  const F e = exp_nonpositive(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : splat<F>(1.0f)) / (1.0f + e);
}

// ln(1 / (1 + e^-x)), by the same trick; ln(1 + e) with a correction for the rounding of 1 + e.
template <class F>
UNIF2ACE_INLINE F log_sigmoid(F x) {
  const F e = exp_nonpositive(x < 0.0f ? x : -x);
  const F u = 1.0f + e;
  return (x < 0.0f ? x : splat<F>(0.0f)) - (log_positive(u) + (e - (u - 1.0f)) / u);
}

}  // namespace unif2ace
