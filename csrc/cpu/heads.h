// Attention heads in memory: [tokens, heads, dim] of any float dtype and stride, a head's dimensions next to each
// other.
//
// A head is read into float32 scratch, padded with zeros to whole lanes, so that loops over it have no remainder.
#pragma once

#include "cpu/convert.h"
#include "cpu/tensors.h"

namespace unif2ace {

constexpr int kLanes = 16;  // padding unit: one vector of AVX-512, four of SSE or NEON

constexpr int64_t padded(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

struct Heads {
  const void* data;
  int64_t stride_token, stride_head;  // elements

  UNIF2ACE_INLINE int64_t at(int64_t token, int64_t head) const { return token * stride_token + head * stride_head; }
};

// A copy where a head's dimensions do not lie next to each other; any other strides stay.
inline Tensor dense_heads(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : dense(x);
}

inline Heads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

template <class F, class T>
UNIF2ACE_INLINE void load_row(const T* from, int n, float* to) {
  int i = 0;
  for (; i + kWidth<F> <= n; i += kWidth<F>) store(to + i, load_floats<F>(from + i));
  if (i < n) store(to + i, load_some<F>(from + i, n - i)), i += kWidth<F>;
  for (; i < padded(n); i += kWidth<F>) store(to + i, F{});
}

// n numbers from element `at` on, as float32, zeros behind them up to padded(n).
template <class F>
UNIF2ACE_INLINE void load_row(ScalarType dtype, const void* from, int64_t at, int n, float* to) {
  if (dtype == ScalarType::Float)
    load_row<F>(static_cast<const float*>(from) + at, n, to);
  else if (dtype == ScalarType::BFloat16)
    load_row<F>(static_cast<const BFloat16*>(from) + at, n, to);
  else
    load_row<F>(static_cast<const Half*>(from) + at, n, to);
}

template <class F, class T>
UNIF2ACE_INLINE void store_row(const float* from, int n, T* to) {
  int i = 0;
  for (; i + kWidth<F> <= n; i += kWidth<F>) store_floats(to + i, load<F>(from + i));
  if (i < n) store_some(to + i, load<F>(from + i), n - i);
}

// The way back, without the padding.
template <class F>
UNIF2ACE_INLINE void store_row(ScalarType dtype, const float* from, int n, void* to, int64_t at) {
  if (dtype == ScalarType::Float)
    store_row<F>(from, n, static_cast<float*>(to) + at);
  else if (dtype == ScalarType::BFloat16)
    store_row<F>(from, n, static_cast<BFloat16*>(to) + at);
  else
    store_row<F>(from, n, static_cast<Half*>(to) + at);
}

}  // namespace unif2ace
