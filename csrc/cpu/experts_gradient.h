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

// Strips that cover `width` columns of every expert. An expert with many rows gets narrow strips: a transposed strip
// holds all rows, since bfloat16 products must not be added up in bfloat16, and should stay in the cache.
inline std::vector<Strip> make_strips(const int32_t* offsets, int64_t experts, int64_t width, int64_t element_size) {
  constexpr int64_t kBytes = 4 << 20;  // an eighth of the third-level cache of the machine this was tuned on
  std::vector<Strip> strips;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t row_bytes = padded_rows(offsets[e + 1] - offsets[e]) * element_size;
    int64_t columns = kTile;
    while (columns > 64 && columns * row_bytes > kBytes) columns /= 2;
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
  void* transposed = memory.fit(strip.columns * padded * size_of(compute));
  gather_transposed(left, begin, rows, padded, strip.first, strip.columns, transposed);
  return linear(matrix(transposed, strip.columns, padded, padded, compute),
                matrix_t(right, padded, width, width, compute));
}

// Column sums of one expert, from the sums of its tiles.
inline void sum_tiles(const Tiles& cut, int64_t expert, ScalarType dtype, const std::vector<float>& sums, int64_t width,
                      char* out) {
  const int64_t first = cut.first[expert], count = cut.first[expert + 1] - first;
  sum_vectors(dtype, sums.data() + first * width, count, width, out + expert * width * size_of(dtype));
}

}  // namespace unif2ace::experts
