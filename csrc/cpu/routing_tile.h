// Routing of one chunk of tokens: the hot loops of cpu/routing.cpp.
//
// A chunk is handled group by group, in tiles of 16 tokens. Rows are short (a group has 8 experts, or 64), so the
// vector lanes run over *tokens*: a tile is loaded transposed, `x[column][token]`, and every loop below is "for each
// column, for all 16 tokens at once". No horizontal operations, and a token's numbers depend on nothing else in its
// tile.
//
// Cost per token with n columns, k choices: n exponentials, k passes of n compares, n*sizeof(logit) + 12 k bytes of
// memory. Everything of a tile stays in the first-level cache for n up to about 128.
#pragma once

#include <cstdint>
#include <vector>

#include "common/routing.h"
#include "common/topk.h"
#include "cpu/convert.h"

namespace unif2ace::routing {

constexpr int kLanes = 16;       // tokens per tile, and the stride between its columns
constexpr int64_t kChunk = 256;  // tokens per chunk: fixed, so that sums do not depend on the number of threads

// What forward and backward have in common. Strides count elements.
struct Problem {
  ScalarType dtype;  // of logits and their gradient: Float, BFloat16 or Half
  const void* logits;
  int64_t stride_token, stride_expert;
  int64_t tokens;
  int experts, top_k, groups;
  const int32_t* token_group;   // [tokens], or null: everything in group 0
  const int64_t* group_bounds;  // [groups + 1]
  bool renormalize;
  float scale;
};

struct Forward {
  Problem problem;
  const float* selection_bias;  // [experts] or null
  float* weights;               // [tokens, top_k]
  int32_t* experts;             // [tokens, top_k]
  float* logsumexp;             // [tokens]
  int32_t* chunk_load;          // [chunks, experts]: slots of this chunk per expert
  float* chunk_importance;      // [chunks, experts]: sums of probabilities
  uint8_t* chunk_bad;           // [chunks]: saw a logit that is NaN or infinite
};

struct Backward {
  Problem problem;
  const float* grad_weights;    // [tokens, top_k]
  const float* grad_mean;       // [experts]: grad_importance / tokens of the expert's group
  const float* grad_logsumexp;  // [tokens]
  const int32_t* experts;       // [tokens, top_k]
  void* grad_logits;            // [tokens, experts], contiguous
  uint8_t* chunk_bad;           // [chunks]: saw an expert that its token cannot see
};

// Working memory of one thread: columns of 16 lanes each, in two allocations.
struct Scratch {
  std::vector<float> floats;
  std::vector<int32_t> integers;
  float *x, *z, *p, *q, *chosen, *grad, *sums;
  int32_t *members, *key, *index;  // members: the chunk's tokens of the current group, relative to the chunk

  Scratch(const Problem& problem, int widest_group) {
    const size_t wide = size_t(widest_group) * kLanes, narrow = size_t(problem.top_k) * kLanes;
    floats.resize(4 * wide + 2 * narrow + size_t(problem.experts) * kLanes);
    integers.resize(kChunk + wide + narrow);
    x = floats.data();
    z = x + wide;
    p = z + wide;
    q = p + wide;
    chosen = q + wide;
    grad = chosen + narrow;
    sums = grad + narrow;
    members = integers.data();
    key = members + kChunk;
    index = key + wide;
  }
};

// Stable list of the chunk's tokens that belong to `group`.
UNIF2ACE_INLINE int collect(const Problem& problem, int group, int64_t begin, int count, int32_t* members) {
  int found = 0;
  for (int i = 0; i < count; ++i) {
    members[found] = i;
    found += problem.token_group == nullptr || problem.token_group[begin + i] == group;
  }
  return found;
}

template <class Logit>
UNIF2ACE_INLINE void load_rows(const Problem& problem, const int64_t* token, int64_t first, int n, float* x) {
  for (int l = 0; l < kLanes; ++l) {
    const Logit* row =
        static_cast<const Logit*>(problem.logits) + token[l] * problem.stride_token + first * problem.stride_expert;
    for (int c = 0; c < n; ++c) x[c * kLanes + l] = static_cast<float>(row[c * problem.stride_expert]);
  }
}

// Columns first .. first + n of 16 tokens, as float32, transposed. The dtype is looked at once per tile, so the rest of
// the loops is compiled once and not once per dtype.
UNIF2ACE_INLINE void load_tile(const Problem& problem, const int64_t* token, int64_t first, int n, float* x) {
  if (problem.dtype == ScalarType::Float)
    load_rows<float>(problem, token, first, n, x);
  else if (problem.dtype == ScalarType::BFloat16)
    load_rows<torch::headeronly::BFloat16>(problem, token, first, n, x);
  else
    load_rows<torch::headeronly::Half>(problem, token, first, n, x);
}

// The way back for `live` tokens, whole rows: zeros in the columns of other groups.
template <class Logit>
UNIF2ACE_INLINE void store_rows(const Problem& problem, const int64_t* token, int live, int first, int n,
                                const float* x, void* out) {
  for (int l = 0; l < live; ++l) {
    Logit* row = static_cast<Logit*>(out) + token[l] * problem.experts;
    for (int e = 0; e < first; ++e) row[e] = static_cast<Logit>(0.0f);
    for (int c = 0; c < n; ++c) row[first + c] = static_cast<Logit>(x[c * kLanes + l]);
    for (int e = first + n; e < problem.experts; ++e) row[e] = static_cast<Logit>(0.0f);
  }
}

UNIF2ACE_INLINE void store_tile(const Problem& problem, const int64_t* token, int live, int first, int n,
                                const float* x, void* out) {
  if (problem.dtype == ScalarType::Float)
    store_rows<float>(problem, token, live, first, n, x, out);
  else if (problem.dtype == ScalarType::BFloat16)
    store_rows<torch::headeronly::BFloat16>(problem, token, live, first, n, x, out);
  else
    store_rows<torch::headeronly::Half>(problem, token, live, first, n, x, out);
}

// The functions below handle the F-wide part of a tile that starts at the given pointers.
// Softmax over n columns: x -> numerators e^(x - max) in p (which may be x), and the sum and maximum they belong to.
template <class F>
UNIF2ACE_INLINE void exponentials(const float* x, int n, float* p, F& max, F& sum) {
  max = load<F>(x);
  for (int c = 1; c < n; ++c) max = maximum(max, load<F>(x + c * kLanes));
  Sum<F> running;
  for (int c = 0; c < n; ++c) {
    const F e = exp_nonpositive(load<F>(x + c * kLanes) - max);
    store(p + c * kLanes, e);
    running.add(e);
  }
  sum = running.value();
}

// x / divisor * factor. A division, not a product with 1 / divisor: half the rounding error.
template <class F>
UNIF2ACE_INLINE void scale(float* x, int n, F divisor, float factor) {
  for (int c = 0; c < n; ++c) store(x + c * kLanes, load<F>(x + c * kLanes) / divisor * factor);
}

template <class F>
UNIF2ACE_INLINE void softmax(const float* x, int n, float* p) {
  F max, sum;
  exponentials(x, n, p, max, sum);
  scale(p, n, sum, 1.0f);
}

template <class F>
UNIF2ACE_INLINE void log_sigmoids(const float* x, int n, float* z) {
  for (int c = 0; c < n; ++c) store(z + c * kLanes, log_sigmoid(load<F>(x + c * kLanes)));
}

template <class F>
UNIF2ACE_INLINE void exp_all(float* z, int n) {
  for (int c = 0; c < n; ++c) store(z + c * kLanes, exp_nonpositive(load<F>(z + c * kLanes)));
}

// Values of the chosen columns: chosen[j] = x[index[j]].
template <class F>
UNIF2ACE_INLINE void gather(const float* x, const int32_t* index, int k, float* chosen) {
  for (int j = 0; j < k; ++j)
    for (int l = 0; l < kWidth<F>; ++l) chosen[j * kLanes + l] = x[index[j * kLanes + l] * kLanes + l];
}

// Scores, choice and weights of one part of a tile whose logits stand in x. Leaves probabilities * sum in p; returns
// 1 / sum. Non-finite logits set lanes of `bad`.
template <class F, Scoring scoring>
UNIF2ACE_INLINE F forward_part(const Forward& a, int first, int n, const Scratch& scratch, int lane, float* logsumexp,
                               Integers<F>& bad) {
  constexpr bool is_sigmoid = scoring == Scoring::sigmoid;
  const int k = a.problem.top_k;
  float *x = scratch.x + lane, *p = scratch.p + lane, *chosen = scratch.chosen + lane;
  int32_t *key = scratch.key + lane, *index = scratch.index + lane;
  for (int c = 0; c < n; ++c) bad |= load<F>(x + c * kLanes) - load<F>(x + c * kLanes) != 0.0f;  // inf - inf is NaN

  // z is the logarithm of the score up to a constant; p = softmax(z) * sum.
  F max, sum;
  exponentials(x, n, p, max, sum);
  store(logsumexp + lane, max + log_positive(sum));
  float* z = x;
  if constexpr (is_sigmoid) {
    z = scratch.z + lane;
    log_sigmoids<F>(x, n, z);
    exponentials(z, n, p, max, sum);
  }
  const F inverse = 1.0f / sum;

  // Choice by the logit: it grows with the score, stays distinct where scores round together, and depends on no exp.
  // A bias is defined on scores, so there the score has to be computed.
  for (int c = 0; c < n; ++c) {
    F preference = load<F>(x + c * kLanes);
    if (a.selection_bias != nullptr)
      preference = (is_sigmoid ? sigmoid(preference) : load<F>(p + c * kLanes) * inverse) + a.selection_bias[first + c];
    store(key + c * kLanes, ordered_key(preference));
  }
  select_top_k<F, kLanes>(key, n, k, index);

  // Weights: softmax of z over the chosen, or their plain scores.
  F divisor = sum;
  if (a.problem.renormalize) {
    gather<F>(z, index, k, chosen);
    exponentials(chosen, k, chosen, max, divisor);
  } else if constexpr (is_sigmoid) {
    gather<F>(z, index, k, chosen);
    exp_all<F>(chosen, k);
    divisor = splat<F>(1.0f);
  } else {
    gather<F>(p, index, k, chosen);
  }
  scale(chosen, k, divisor, a.problem.scale);
  return inverse;
}

template <class F, Scoring scoring>
UNIF2ACE_INLINE void forward_chunk(const Forward& a, int64_t chunk, Scratch& scratch) {
  const Problem& problem = a.problem;
  const int k = problem.top_k;
  const int64_t begin = chunk * kChunk;
  const int count = static_cast<int>(problem.tokens - begin < kChunk ? problem.tokens - begin : kChunk);
  int32_t* slots = a.chunk_load + chunk * problem.experts;
  Integers<F> bad = {};
  for (int i = 0; i < problem.experts * kLanes; ++i) scratch.sums[i] = 0.0f;
  for (int e = 0; e < problem.experts; ++e) slots[e] = 0;

  for (int group = 0; group < problem.groups; ++group) {
    const int first = static_cast<int>(problem.group_bounds[group]);
    const int n = static_cast<int>(problem.group_bounds[group + 1]) - first;
    const int members = collect(problem, group, begin, count, scratch.members);
    for (int at = 0; at < members; at += kLanes) {
      const int live = members - at < kLanes ? members - at : kLanes;
      int64_t token[kLanes];
      float logsumexp[kLanes], counted[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        token[l] =
            begin + scratch.members[at + (l < live ? l : live - 1)];  // a short last tile repeats its last token,
        counted[l] = l < live ? 1.0f : 0.0f;                          // which counts once
      }
      load_tile(problem, token, first, n, scratch.x);
      for (int lane = 0; lane < kLanes; lane += kWidth<F>) {
        const F inverse = forward_part<F, scoring>(a, first, n, scratch, lane, logsumexp, bad);
        const F share = inverse * load<F>(counted + lane);
        for (int c = 0; c < n; ++c) {
          float* sum = scratch.sums + (first + c) * kLanes + lane;
          store(sum, load<F>(sum) + load<F>(scratch.p + c * kLanes + lane) * share);
        }
      }
      for (int l = 0; l < live; ++l) {
        a.logsumexp[token[l]] = logsumexp[l];
        for (int j = 0; j < k; ++j) {
          const int32_t expert = first + scratch.index[j * kLanes + l];
          a.weights[token[l] * k + j] = scratch.chosen[j * kLanes + l];
          a.experts[token[l] * k + j] = expert;
          ++slots[expert];
        }
      }
    }
  }

  for (int e = 0; e < problem.experts; ++e) {
    float sum = 0.0f;
    for (int l = 0; l < kLanes; ++l) sum += scratch.sums[e * kLanes + l];
    a.chunk_importance[chunk * problem.experts + e] = sum;
  }
  int32_t any = 0;
  for (int l = 0; l < kWidth<F>; ++l) any |= bad[l];
  a.chunk_bad[chunk] = any != 0;
}

// Gradients of weights, importance and logsumexp, together, with respect to the logits x. With z = x or log sigmoid(x),
// q = softmax(z), w = softmax(z over the chosen), s = the scores, G = scale * grad_weights, m = grad_mean:
//   importance   dz_c  = q_c (m_c - sum q m)
//   weights      dz_j += w_j (G_j - sum G w)                             chosen j, renormalised
//                dz_j += s_j G_j     and, softmax: dz_c -= q_c sum s G      not renormalised
//   logsumexp    dx_c  = grad_logsumexp softmax(x)_c
//   and          dx_c += dz_c            or, sigmoid: dz_c (1 - sigmoid(x_c)).
// Reads x, index and grad (G) of the scratch, leaves dx in q. For softmax scoring z is x and q is p.
template <class F, Scoring scoring>
UNIF2ACE_INLINE void backward_part(const Backward& a, int first, int n, const Scratch& scratch, int lane,
                                   const float* grad_logsumexp) {
  constexpr bool is_sigmoid = scoring == Scoring::sigmoid;
  const bool renormalize = a.problem.renormalize;
  const int k = a.problem.top_k;
  float *x = scratch.x + lane, *p = scratch.p + lane, *chosen = scratch.chosen + lane, *grad = scratch.grad + lane;
  float *z = is_sigmoid ? scratch.z + lane : x, *q = is_sigmoid ? scratch.q + lane : p;
  const int32_t* index = scratch.index + lane;
  softmax<F>(x, n, p);
  if constexpr (is_sigmoid) {
    log_sigmoids<F>(x, n, z);
    softmax<F>(z, n, q);
  }

  // dz of the chosen, into grad.
  gather<F>(renormalize || is_sigmoid ? z : q, index, k, chosen);
  if (renormalize)
    softmax<F>(chosen, k, chosen);
  else if constexpr (is_sigmoid)
    exp_all<F>(chosen, k);
  F dot = splat<F>(0.0f);
  for (int j = 0; j < k; ++j) dot += load<F>(grad + j * kLanes) * load<F>(chosen + j * kLanes);
  const F through_chosen = renormalize ? dot : splat<F>(0.0f);
  for (int j = 0; j < k; ++j)
    store(grad + j * kLanes, load<F>(chosen + j * kLanes) * (load<F>(grad + j * kLanes) - through_chosen));

  // dz of all columns into q, with the gradient that logsumexp brings.
  Sum<F> mean;
  for (int c = 0; c < n; ++c) mean.add(load<F>(q + c * kLanes) * a.grad_mean[first + c]);
  const F shift = is_sigmoid || renormalize ? mean.value() : mean.value() + dot;
  const F lse = load<F>(grad_logsumexp + lane);
  if constexpr (!is_sigmoid)
    for (int c = 0; c < n; ++c) {
      const F old = load<F>(q + c * kLanes);
      store(q + c * kLanes, old * (a.grad_mean[first + c] - shift) + old * lse);
    }
  else
    for (int c = 0; c < n; ++c) store(q + c * kLanes, load<F>(q + c * kLanes) * (a.grad_mean[first + c] - shift));
  for (int j = 0; j < k; ++j)
    for (int l = 0; l < kWidth<F>; ++l) q[index[j * kLanes + l] * kLanes + l] += grad[j * kLanes + l];
  if constexpr (is_sigmoid)
    for (int c = 0; c < n; ++c) {
      const F slope = sigmoid(-load<F>(x + c * kLanes));
      store(q + c * kLanes, load<F>(q + c * kLanes) * slope + load<F>(p + c * kLanes) * lse);
    }
}

template <class F, Scoring scoring>
UNIF2ACE_INLINE void backward_chunk(const Backward& a, int64_t chunk, Scratch& scratch) {
  const Problem& problem = a.problem;
  const int k = problem.top_k;
  const int64_t begin = chunk * kChunk;
  const int count = static_cast<int>(problem.tokens - begin < kChunk ? problem.tokens - begin : kChunk);
  bool bad = false;
  for (int group = 0; group < problem.groups; ++group) {
    const int first = static_cast<int>(problem.group_bounds[group]);
    const int n = static_cast<int>(problem.group_bounds[group + 1]) - first;
    const int members = collect(problem, group, begin, count, scratch.members);
    for (int at = 0; at < members; at += kLanes) {
      const int live = members - at < kLanes ? members - at : kLanes;
      int64_t token[kLanes];
      float grad_logsumexp[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        token[l] = begin + scratch.members[at + (l < live ? l : live - 1)];
        grad_logsumexp[l] = a.grad_logsumexp[token[l]];
        for (int j = 0; j < k; ++j) {
          const int64_t column = static_cast<int64_t>(a.experts[token[l] * k + j]) - first;
          const bool inside = column >= 0 && column < n;
          bad |= !inside;
          scratch.index[j * kLanes + l] = inside ? static_cast<int32_t>(column) : 0;  // refused, but not yet
          scratch.grad[j * kLanes + l] = problem.scale * a.grad_weights[token[l] * k + j];
        }
      }
      load_tile(problem, token, first, n, scratch.x);
      for (int lane = 0; lane < kLanes; lane += kWidth<F>)
        backward_part<F, scoring>(a, first, n, scratch, lane, grad_logsumexp);
      store_tile(problem, token, live, first, n, scoring == Scoring::sigmoid ? scratch.q : scratch.p, a.grad_logits);
    }
  }
  a.chunk_bad[chunk] = bad;
}

}  // namespace unif2ace::routing
