// Reading and writing float32, bfloat16 and float16 memory as vectors of float32.
//
// Integer arithmetic only, on the compiler's own vector types: no intrinsics, so one source serves every instruction
// set, and the same bits come out on all of them. Stores round to nearest, ties to even, as torch does.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/lanes.h"

namespace unif2ace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

typedef uint16_t Words4 __attribute__((vector_size(8)));
typedef uint16_t Words8 __attribute__((vector_size(16)));
typedef uint16_t Words16 __attribute__((vector_size(32)));

// 16-bit words, as many as F has lanes, and their exchange with 32-bit lanes.
template <class F>
struct WordsOf;
template <>
struct WordsOf<Floats4> {
  using type = Words4;
};
template <>
struct WordsOf<Floats8> {
  using type = Words8;
};
template <>
struct WordsOf<Floats16> {
  using type = Words16;
};

// Number of lanes.
template <class F>
constexpr int kWidth = sizeof(F) / sizeof(float);

template <class F>
UNIF2ACE_INLINE Integers<F> load_words(const void* from) {
  return __builtin_convertvector(load<typename WordsOf<F>::type>(from), Integers<F>);
}

template <class F>
UNIF2ACE_INLINE void store_words(void* to, Integers<F> words) {
  store(to, __builtin_convertvector(words, typename WordsOf<F>::type));
}

template <class F>
UNIF2ACE_INLINE F load_floats(const float* from) {
  return load<F>(from);
}

template <class F>
UNIF2ACE_INLINE F load_floats(const BFloat16* from) {
  return bits_float<F>(load_words<F>(from) << 16);
}

// A half is 2^112 too small when its bits are read as a float's: one exact product mends normals and subnormals alike.
template <class F>
UNIF2ACE_INLINE F load_floats(const Half* from) {
  const Integers<F> word = load_words<F>(from);
  const Integers<F> magnitude = (word & 0x7fff) << 13;
  const Integers<F> finite = float_bits(bits_float<F>(magnitude) * 0x1p112f);
  const Integers<F> special = magnitude | 0x7f800000;  // infinity and NaN: the largest exponent stays the largest
  return bits_float<F>((magnitude >= (0x7c00 << 13) ? special : finite) | ((word & 0x8000) << 16));
}

template <class F>
UNIF2ACE_INLINE void store_floats(float* to, F x) {
  store(to, x);
}

template <class F>
UNIF2ACE_INLINE void store_floats(BFloat16* to, F x) {
  const Integers<F> bits = float_bits(x);
  const Integers<F> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words<F>(to, (x == x ? rounded : Integers<F>{} + 0x7fc0) & 0xffff);
}

template <class F>
UNIF2ACE_INLINE void store_floats(Half* to, F x) {
  const Integers<F> bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const Integers<F> normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the spacing is 2^-24: adding 1/2, whose last bit is 2^-24, rounds there.
  const Integers<F> tiny = float_bits(bits_float<F>(magnitude) + 0.5f) - (126 << 23);
  const Integers<F> huge = magnitude > 0x7f800000 ? Integers<F>{} + 0x7e00 : Integers<F>{} + 0x7c00;
  const Integers<F> word = magnitude < (113 << 23) ? tiny : (magnitude < (143 << 23) ? normal : huge);
  store_words<F>(to, word | ((bits >> 16) & 0x8000));
}

// The first n < lanes elements, zeros behind them; and the way back.
template <class F, class T>
UNIF2ACE_INLINE F load_some(const T* from, int n) {
  T buffer[kWidth<F>] = {};
  memcpy(buffer, from, n * sizeof(T));
  return load_floats<F>(buffer);
}

template <class F, class T>
UNIF2ACE_INLINE void store_some(T* to, F x, int n) {
  T buffer[kWidth<F>];
  store_floats(buffer, x);
  memcpy(to, buffer, n * sizeof(T));
}

}  // namespace unif2ace
