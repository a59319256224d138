// Products of few rows with a matrix: the weights are streamed through once, as dot products.
#pragma once

#include "common/stable.h"

namespace unif2ace::experts {

// Row length of float32 rows that dots() reads: zeros up to a multiple of 16.
inline int64_t padded_length(int64_t n) {
  return (n + 15) / 16 * 16;
}

// out[r * out_stride + j] = <x_r, w_j> + bias_j for r < rows, j < count. w: [count, length] of `dtype`; bias: [count]
// of `dtype` or null; x: [rows, padded_length(length)] float32. Float32 sums over 16 lanes: a number depends on nothing
// but its two rows, and is the same on every instruction set.
void dots(ScalarType dtype, const void* w, const void* bias, int64_t count, int64_t length, const float* x,
          int64_t rows, float* out, int64_t out_stride);

}  // namespace unif2ace::experts
