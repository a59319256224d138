// Sums over 16 lanes whatever the width of the vectors, so that every instruction set adds in the same order; and loads
// and stores that stop at the end of a row.
#pragma once

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

// 16 running sums.
template <class F>
struct Lanes16 {
  F part[kParts<F>] = {};

  // Their total: halves are folded onto each other until four lanes are left.
  UNIF2ACE_INLINE float sum() const {
    float lane[16];
    memcpy(lane, part, sizeof lane);
    const Floats8 eight = load<Floats8>(lane) + load<Floats8>(lane + 8);
    float fold[8];
    store(fold, eight);
    const Floats4 four = load<Floats4>(fold) + load<Floats4>(fold + 4);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

}  // namespace unif2ace
