// Turning rows into columns in registers, four by four.
#pragma once

#include "cpu/lanes.h"

namespace unif2ace {

// to[d][r] = from[r][d] for 4 rows and `columns` (a multiple of 4).
UNIF2ACE_INLINE void transpose_rows(const float* from, int64_t from_stride, int64_t columns, float* to,
                                    int64_t to_stride) {
  for (int64_t d = 0; d < columns; d += 4) {
    const Floats4 a = load<Floats4>(from + d), b = load<Floats4>(from + from_stride + d);
    const Floats4 c = load<Floats4>(from + 2 * from_stride + d), e = load<Floats4>(from + 3 * from_stride + d);
    for (int i = 0; i < 4; ++i) store(to + (d + i) * to_stride, Floats4{a[i], b[i], c[i], e[i]});
  }
}

}  // namespace unif2ace
