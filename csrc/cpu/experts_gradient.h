// The gradient of expert matrices: for each expert a product over all of its rows.
#pragma once

#include <vector>

#include "cpu/experts_rows.h"
#include "cpu/experts_tiles.h"

namespace unif2ace::experts {

// The columns first .. first + columns - 1 of the left factor of expert e's gradient, left^T right: one task.
struct Strip {
  int64_t expert, first, columns;
};

// Rows that one product sums over. The library adds in one chain, whose rounding errors grow with its length (700 rows:
// 2.8 times the error of torch.mm): so float32 products are cut at 320 rows and their results added. For bfloat16 it is
// all rows, because a sum of bfloat16 results would be rounded too coarsely.
inline int64_t depth(ScalarType compute, int64_t padded) {
  if (compute != ScalarType::Float) return padded;
  const int64_t parts = (padded + 319) / 320;
  return parts == 0 ? 0 : ((padded + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
}

// Strips that cover `width` columns of every expert, narrow where many rows have to lie transposed in the cache.
inline std::vector<Strip> make_strips(const int32_t* offsets, int64_t experts, int64_t width, ScalarType compute) {
  constexpr int64_t kBytes = 4 << 20;  // an eighth of the third-level cache of the machine this was tuned on
  std::vector<Strip> strips;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t column_bytes = depth(compute, padded_rows(offsets[e + 1] - offsets[e])) * size_of(compute);
    int64_t columns = 256;
    while (columns > 64 && columns * column_bytes > kBytes) columns /= 2;
    for (int64_t first = 0; first < width; first += columns)
      strips.push_back({e, first, std::min(columns, width - first)});
  }
  return strips;
}

// left[rows, columns of the strip]^T right[rows, width] -> [columns, width]. `left` is gathered and transposed into
// `memory`; `right` has padded_rows rows, zeros in the padding.
inline Tensor strip_product(const Rows& left, int64_t begin, int64_t rows, const Strip& strip, const void* right,
                            int64_t width, Buffer& memory) {
  const int64_t padded = padded_rows(rows);
  const ScalarType compute = compute_dtype(left.dtype);
  const int64_t step = depth(compute, padded);
  void* transposed = memory.fit(strip.columns * step * size_of(compute));
  std::optional<Tensor> sum;
  for (int64_t r = 0; r < padded; r += step) {
    const int64_t deep = std::min(step, padded - r), live = std::clamp<int64_t>(rows - r, 0, deep);
    gather_transposed(left, begin + r, live, deep, strip.first, strip.columns, transposed);
    const Tensor part =
        linear(matrix(transposed, strip.columns, deep, deep, compute),
               matrix_t(static_cast<const char*>(right) + r * width * size_of(compute), deep, width, width, compute));
    if (!sum) {
      sum = part;
      continue;
    }
    float* total = mutable_pointer<float>(*sum);
    const float* more = pointer<float>(part);
    for (int64_t i = 0; i < strip.columns * width; ++i) total[i] += more[i];
  }
  return *sum;
}

// Column sums of one expert, from the sums of its tiles.
inline void sum_tiles(const Tiles& cut, int64_t expert, ScalarType dtype, const std::vector<float>& sums, int64_t width,
                      char* out) {
  const int64_t first = cut.first[expert], count = cut.first[expert + 1] - first;
  sum_vectors(dtype, sums.data() + first * width, count, width, out + expert * width * size_of(dtype));
}

}  // namespace unif2ace::experts
