// Vectors of float32 and int32 as wide as the instruction set: the compiler's own vector types (GCC and Clang), so that
// +, <, ?: work on them and every architecture is served by one source.
#pragma once

#include <type_traits>

#include "common/numerics.h"

// Lanes of two vectors, those of b counted on from those of a. GCC moves {a[0], b[0], a[1], b[1]} lane by lane instead,
// through integer registers.
#if __has_builtin(__builtin_shufflevector)
#define UNIF2ACE_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
#define UNIF2ACE_PICK(a, b, ...) __builtin_shuffle(a, b, Integers<std::decay_t<decltype(a)>>{__VA_ARGS__})
#endif

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

// 64-bit lanes that fill the register of F.
template <class F>
struct WideOf;
template <>
struct WideOf<Floats4> {
  typedef uint64_t type __attribute__((vector_size(16)));
};
template <>
struct WideOf<Floats8> {
  typedef uint64_t type __attribute__((vector_size(32)));
};
template <>
struct WideOf<Floats16> {
  typedef uint64_t type __attribute__((vector_size(64)));
};

// Products of the low halves of 64-bit lanes, for philox.h. x86 has one instruction for it, which GCC does not find: it
// multiplies all 64 bits. Measured on a Zen 5 for Philox as a whole, ns per word: AVX2 1.44 -> 0.57, AVX-512 0.31 ->
// 0.27.
#if defined(__x86_64__)
UNIF2ACE_INLINE WideOf<Floats4>::type multiply_low_halves(WideOf<Floats4>::type a, WideOf<Floats4>::type b) {
  asm("pmuludq %1, %0" : "+x"(a) : "x"(b));
  return a;
}
UNIF2ACE_INLINE WideOf<Floats8>::type multiply_low_halves(WideOf<Floats8>::type a, WideOf<Floats8>::type b) {
  asm("vpmuludq %1, %0, %0" : "+x"(a) : "x"(b));
  return a;
}
UNIF2ACE_INLINE WideOf<Floats16>::type multiply_low_halves(WideOf<Floats16>::type a, WideOf<Floats16>::type b) {
  asm("vpmuludq %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}
#else
template <class W>
UNIF2ACE_INLINE W multiply_low_halves(W a, W b) {
  return (a & 0xffffffff) * (b & 0xffffffff);
}
#endif

// Low halves of 64-bit lanes as 32-bit lanes: even, odd, even, ... (The high halves drop out; little-endian.)
template <class F>
UNIF2ACE_INLINE Integers<F> interleave_low_halves(typename WideOf<F>::type even, typename WideOf<F>::type odd) {
  const typename WideOf<F>::type both = (even & 0xffffffff) | (odd << 32);
  Integers<F> halves;
  memcpy(&halves, &both, sizeof both);
  return halves;
}

}  // namespace unif2ace
