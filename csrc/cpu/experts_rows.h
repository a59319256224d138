// Everything of the op `experts` that is no matrix product, row by row: gather, activation, weighted sums over the
// choices of a token, transposition, conversion.
//
// Two dtypes run through these files: that of the tensors (float32, bfloat16, float16), called `dtype`, and the one the
// library multiplies in, `compute_dtype(dtype)`: float16 becomes float32, because oneDNN has no float16 product on
// most CPUs (torch's own runs at a tenth of the float32 rate); the others stay. Arithmetic is float32 in registers.
// Sums run over 16 lanes in a fixed order, so that every instruction set returns the same bits.
#pragma once

#include "common/stable.h"
#include "cpu/experts_activation.h"

namespace unif2ace::experts {

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

inline int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? 4 : 2;
}

// Rows m of a matrix, in place: row m is row index[m] / repeat of `data` (index null: row m itself).
struct Rows {
  ScalarType dtype;
  const void* data;  // contiguous rows of `width` elements
  int64_t width;
  const int32_t* index;
  int32_t repeat;

  const char* row(int64_t m) const {
    const int64_t source = index == nullptr ? m : index[m] / repeat;
    return static_cast<const char*>(data) + source * width * size_of(dtype);
  }
};

// n elements of `dtype` -> compute dtype, and back.
void widen(ScalarType dtype, const void* from, int64_t n, void* to);
void narrow(ScalarType dtype, const void* from, int64_t n, void* to);

// n elements of `dtype` -> float32, and back.
void to_float(ScalarType dtype, const void* from, int64_t n, float* to);
void from_float(ScalarType dtype, const float* from, int64_t n, void* to);

// Rows begin .. begin + rows - 1 -> to[padded, width] in the compute dtype; zeros in the padding.
void gather(const Rows& source, int64_t begin, int64_t rows, int64_t padded, void* to);

// Columns first .. first + columns - 1 of those rows, transposed: to[columns, padded].
void gather_transposed(const Rows& source, int64_t begin, int64_t rows, int64_t padded, int64_t first, int64_t columns,
                       void* to);

// from[rows, columns], compute dtype -> to[columns][row_stride], dtype, transposed.
void store_transposed(ScalarType dtype, const void* from, int64_t rows, int64_t columns, void* to, int64_t row_stride);

// act[rows, inner] = activation(pre[rows, inner or 2 inner]), both in `compute` dtype.
void activate(Activation activation, ScalarType compute, const void* pre, int64_t rows, int64_t inner, void* act);

// What the gradient needs between its two products: with a = activation(pre), g the gradient of a before weighting,
//   act = w a,   grad_pre = w g a'(pre),   dot = <g, a>.
struct ActivationGradient {
  Activation activation;
  ScalarType dtype;
  int64_t rows, inner;
  const void* pre;       // [rows, inner or 2 inner], dtype
  const void* grad_act;  // g [rows, inner], compute dtype
  const float* weight;   // [rows]
  void* act;             // [rows, inner], compute dtype
  void* grad_pre;        // as pre, compute dtype
  float* dot;            // [rows]
};
void activation_gradient(const ActivationGradient& a);

// sums[width] = sum over rows of weight * row (weight null: 1). Rows in compute dtype.
void weighted_sum(ScalarType compute, const void* from, int64_t rows, int64_t width, const float* weight, float* sums);

// dot[row] += <row, vector>; rows in compute dtype.
void add_dots(ScalarType compute, const void* from, int64_t rows, int64_t width, const float* vector, float* dot);

// Sum of `count` consecutive vectors of n floats, in order -> dtype. Zeros for count = 0.
void sum_vectors(ScalarType dtype, const float* from, int64_t count, int64_t n, void* to);

// out = sum over k < count of weight[k] * row[k] (weight null: 1), in the order of k. Rows: `from` dtype.
void combine(ScalarType from, ScalarType dtype, const void* const* row, const float* weight, int64_t count,
             int64_t width, void* out);

}  // namespace unif2ace::experts
