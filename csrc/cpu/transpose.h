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
    const Floats4 ab = UNIF2ACE_PICK(a, b, 0, 4, 1, 5), ab_high = UNIF2ACE_PICK(a, b, 2, 6, 3, 7);
    const Floats4 ce = UNIF2ACE_PICK(c, e, 0, 4, 1, 5), ce_high = UNIF2ACE_PICK(c, e, 2, 6, 3, 7);
    store(to + d * to_stride, UNIF2ACE_PICK(ab, ce, 0, 1, 4, 5));
    store(to + (d + 1) * to_stride, UNIF2ACE_PICK(ab, ce, 2, 3, 6, 7));
    store(to + (d + 2) * to_stride, UNIF2ACE_PICK(ab_high, ce_high, 0, 1, 4, 5));
    store(to + (d + 3) * to_stride, UNIF2ACE_PICK(ab_high, ce_high, 2, 3, 6, 7));
  }
}

}  // namespace unif2ace
