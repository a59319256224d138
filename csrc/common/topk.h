// Top-k selection on integer keys, for every lane at once.
//
// k passes of n compares: for the few choices of a router (k up to 16) cheaper than any sort, straight-line, and
// without a branch that depends on data. Ties go to the lower column. NaN hangs nothing: keys are integers
// (`ordered_key`).
#pragma once

#include "common/numerics.h"

namespace unif2ace {

constexpr int32_t kTaken = INT32_MIN;  // marks a chosen column: below the key of -inf

// The k <= n columns with the largest keys, best first. Column c of a lane stands at key[c * stride], its j-th choice
// goes to index[j * stride]. Destroys the keys.
template <class F, int stride>
UNIF2ACE_INLINE void select_top_k(int32_t* key, int n, int k, int32_t* index) {
  using I = Integers<F>;
  I taken = I{} - 1;  // column to cross out on the way: the winner of the pass before
  for (int j = 0; j < k; ++j) {
    I best = I{} + kTaken, at = I{};
    for (int c = 0; c < n; ++c) {
      const I candidate = taken == c ? I{} + kTaken : load<I>(key + c * stride);
      store(key + c * stride, candidate);
      const I better = candidate > best;
      at = better ? I{} + c : at;
      best = better ? candidate : best;
    }
    store(index + j * stride, at);
    taken = at;
  }
}

}  // namespace unif2ace
