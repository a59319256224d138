// Sums and maxima over 16 lanes whatever the width of the vectors, so that every instruction set adds in the same
// order; and loads and stores that stop at the end of a row.
#pragma once

#include <utility>

#include "cpu/convert.h"

namespace unif2ace {

// Vectors of F that make 16 lanes.
template <class F>
constexpr int kParts = 16 / kWidth<F>;

// The first `left` elements of a vector at `from`, at most a whole one; zeros behind them.
template <class F, class T>
UNIF2ACE_INLINE F load_part(const T* from, int64_t left) {
  return left >= kWidth<F> ? load_floats<F>(from) : load_some<F>(from, static_cast<int>(left));
}

template <class F, class T>
UNIF2ACE_INLINE void store_part(T* to, F x, int64_t left) {
  if (left >= kWidth<F>)
    store_floats(to, x);
  else
    store_some(to, x, static_cast<int>(left));
}

// 16 running sums or maxima.
template <class F>
struct Lanes16 {
  F part[kParts<F>] = {};

  // Their total: halves are folded onto each other until four lanes are left.
  UNIF2ACE_INLINE float sum() const {
    float lane[16], eight[8];
    memcpy(lane, part, sizeof lane);
    store(eight, load<Floats8>(lane) + load<Floats8>(lane + 8));
    const Floats4 four = load<Floats4>(eight) + load<Floats4>(eight + 4);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }

  // The largest. Vectors to the end: the maximum of two scalars would become a branch.
  UNIF2ACE_INLINE float highest() const {
    float lane[16], eight[8];
    memcpy(lane, part, sizeof lane);
    store(eight, maximum(load<Floats8>(lane), load<Floats8>(lane + 8)));
    const Floats4 four = maximum(load<Floats4>(eight), load<Floats4>(eight + 4));
    const Floats4 two = maximum(four, UNIF2ACE_PICK(four, four, 2, 3, 0, 1));
    return maximum(two, UNIF2ACE_PICK(two, two, 1, 0, 3, 2))[0];
  }
};

// Of the lanes of a and b, one behind the other and in groups of G: the first group plus the second, the third plus the
// fourth, ... Half as many lanes.
template <int G, class F, int... I>
UNIF2ACE_INLINE F add_neighbours(F a, F b, std::integer_sequence<int, I...>) {
  return UNIF2ACE_PICK(a, b, (I / G * 2 * G + I % G)...) + UNIF2ACE_PICK(a, b, (I / G * 2 * G + G + I % G)...);
}

template <int G, class F>
UNIF2ACE_INLINE Lanes16<F> add_neighbours(const Lanes16<F>& a, const Lanes16<F>& b) {
  const auto part = [&](int p) { return p < kParts<F> ? a.part[p] : b.part[p - kParts<F>]; };
  Lanes16<F> half;
  for (int p = 0; p < kParts<F>; ++p) {
    if constexpr (G < kWidth<F>) {
      half.part[p] = add_neighbours<G>(part(2 * p), part(2 * p + 1), std::make_integer_sequence<int, kWidth<F>>());
    } else {  // a group is whole vectors
      constexpr int wide = G / kWidth<F>;
      const int first = p / wide * 2 * wide + p % wide;
      half.part[p] = part(first) + part(first + wide);
    }
  }
  return half;
}

// Lane i: the total of x[i], of 16; the additions of sum(), in 45 instructions of AVX-512. Dot products of 192 numbers,
// 16 at a time out of the cache: 110 -> 210 GFLOP/s on a Zen 5 core.
template <class F, int G = 1>
UNIF2ACE_INLINE Lanes16<F> sums(const Lanes16<F>* x) {
  if constexpr (G == 16)
    return *x;
  else
    return add_neighbours<G>(sums<F, 2 * G>(x), sums<F, 2 * G>(x + 8 / G));
}

}  // namespace unif2ace
