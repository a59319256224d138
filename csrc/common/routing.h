// What the CPU and the CUDA kernels of `routing` share: names, checks, and the order of a row's sums.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "common/numerics.h"

namespace unif2ace::routing {

enum class Scoring { softmax, sigmoid };

inline Scoring parse_scoring(const std::string& name) {
  check(name == "softmax" || name == "sigmoid", "route: scoring must be 'softmax' or 'sigmoid', got '", name, "'");
  return name == "softmax" ? Scoring::softmax : Scoring::sigmoid;
}

// Checks everything about shapes that memory safety hangs on; returns the number of columns of the largest group.
inline int check_shapes(const Tensor& logits, int64_t top_k, bool with_groups, const std::vector<int64_t>& bounds,
                        int64_t most_experts) {
  check_float("route", "logits", logits);
  check(logits.dim() == 2, "route: logits must be [T, E], got ", logits.dim(), " dimensions");
  const int64_t experts = logits.size(1);
  check(experts >= 1 && experts <= most_experts, "route: the number of experts must be 1..", most_experts, ", got ",
        experts);
  check(bounds.size() >= 2 && bounds.front() == 0 && bounds.back() == experts,
        "route: group_bounds must run from 0 to ", experts);
  int widest = 0;
  for (size_t g = 0; g + 1 < bounds.size(); ++g) {
    const int64_t width = bounds[g + 1] - bounds[g];
    check(width >= std::max<int64_t>(top_k, 1), "route: top_k = ", top_k, " is more than the ", width,
          " experts of group ", g);
    widest = std::max(widest, static_cast<int>(width));
  }
  check(top_k >= 1, "route: top_k must be at least 1, got ", top_k);
  check(logits.size(0) * top_k <= INT32_MAX, "route: T * top_k must fit into int32, got ", logits.size(0) * top_k);
  const size_t groups = bounds.size() - 1;
  check(groups == 1 || with_groups, "route: token_group is needed with ", groups, " groups");
  return widest;
}

// Terms of a part of a sum over columns. With hundreds of columns the rounding errors of one running sum would show.
constexpr int kPart = 16;

// A sum in two levels: parts of kPart terms, and the sum of the parts.
template <class F>
struct Sum {
  F total = splat<F>(0.0f), part = splat<F>(0.0f);
  int terms = 0;
  UNIF2ACE_INLINE void add(F x) {
    part += x;
    if (++terms % kPart == 0) {
      total += part;
      part = splat<F>(0.0f);
    }
  }
  UNIF2ACE_INLINE F value() const { return total + part; }
};

}  // namespace unif2ace::routing
