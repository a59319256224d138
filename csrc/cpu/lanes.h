// Vectors of float32 and int32 as wide as the instruction set: the compiler's own vector types (GCC and Clang), so that
// +, <, ?: work on them and every architecture is served by one source.
#pragma once

#include "common/numerics.h"

namespace unif2ace {

typedef float Floats4 __attribute__((vector_size(16)));   // SSE, NEON
typedef float Floats8 __attribute__((vector_size(32)));   // AVX2
typedef float Floats16 __attribute__((vector_size(64)));  // AVX-512
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int32_t Ints16 __attribute__((vector_size(64)));

template <>
struct IntegersOf<Floats4> {
  using type = Ints4;
  static UNIF2ACE_INLINE Floats4 to_float(Ints4 i) { return __builtin_convertvector(i, Floats4); }
};
template <>
struct IntegersOf<Floats8> {
  using type = Ints8;
  static UNIF2ACE_INLINE Floats8 to_float(Ints8 i) { return __builtin_convertvector(i, Floats8); }
};
template <>
struct IntegersOf<Floats16> {
  using type = Ints16;
  static UNIF2ACE_INLINE Floats16 to_float(Ints16 i) { return __builtin_convertvector(i, Floats16); }
};

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

}  // namespace unif2ace
