// Matrix products of the library that torch ships: y = x w^T + b, on tensors or on slices of them.
//
// Called outside a parallel region a product uses all threads of torch, inside one it stays on its thread. Which
// library: oneDNN, through torch's C function `aoti_torch_cpu__linear_pointwise`. torch itself sends float32 products
// to MKL, which on AMD processors runs at half the rate (measured on a Zen 5, one thread, 256 x 512 x 256: MKL 109
// GFLOP/s, oneDNN 228). float16, and a torch without oneDNN: torch's own choice.
//
// From two rows on, a row's result does not depend on how many rows stand beside it, nor on the number of threads
// (float32: tests/ops/test_linear.py); a single row takes a matrix-vector path that sums in another order.
#pragma once

#include "common/stable.h"

namespace unif2ace {

// A view of memory as [rows, columns] with the given row stride (elements), column stride 1. Holds no reference.
Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype);

// The transposed view: [columns, rows]. oneDNN takes either orientation of w at the same speed, if w is dense (on a
// slice of wider rows it runs a reference loop, hundreds of times slower); an x of this orientation is copied first.
Tensor matrix_t(const void* data, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype);

// A view of `size` contiguous elements: a bias.
Tensor vector_of(const void* data, int64_t size, ScalarType dtype);

// x [M, K], w [N, K], bias [N] or null -> a new [M, N], sums in float32.
Tensor linear(const Tensor& x, const Tensor& w, const Tensor* bias = nullptr);

// The same by `aten::linear`: the library that torch chooses.
Tensor linear_of_torch(const Tensor& x, const Tensor& w, const Tensor* bias);

}  // namespace unif2ace
