// One token's row, worked on by a team of 1 to 32 lanes: scores, choice, weights, and their gradients.
//
// Lane l owns the columns 16 l .. 16 l + 15 of the token's group, in registers. 16 is also the length of a part in the
// row sums (Sum, common/routing.h): a lane adds its columns one after the other, and the team adds the parts in order
// of the lanes. So every sum runs in the order of the CPU kernels, and with the functions of common/numerics.h all
// results of a row, the choice under a selection bias included, have the *same bits* as theirs.
//
// Full warps only: lanes without a token work on somebody else's and store nothing. Arrays are indexed by constants
// after unrolling, which keeps them in registers.
#pragma once

#include "common/routing.h"
#include "common/topk.h"

namespace unif2ace::routing::gpu {

constexpr unsigned kAllLanes = 0xffffffff;

// The columns [first, first + n) of a token's group, seen by one lane of its team.
struct Team {
  int lanes, lane;  // lanes: a power of two
  int own;          // columns of this lane

  __device__ __forceinline__ Team(int lanes, int lane, int n)
      : lanes(lanes),
        lane(lane),
        own(n - lane * kPart < 0       ? 0
            : n - lane * kPart < kPart ? n - lane * kPart
                                       : kPart) {}

  __device__ __forceinline__ float max(float x) const {
    for (int step = lanes / 2; step > 0; step /= 2) x = maximum(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
  }

  // The sum over all lanes, in order of the lanes.
  __device__ __forceinline__ float sum(float part) const {
    float total = 0.0f;
    for (int from = 0; from < lanes; ++from) total += __shfl_sync(kAllLanes, part, from, lanes);
    return total;
  }
};

// Own columns of a row of any stride as float32; 0 beyond them. 16 bytes at once where memory allows.
template <class Logit>
__device__ __forceinline__ void load_columns(const Logit* row, int64_t stride, int own, float (&x)[kPart]) {
  constexpr int kVector = 16 / sizeof(Logit);
  const bool wide = stride == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll
  for (int c = 0; c < kPart; c += kVector) {
    if (wide && c + kVector <= own) {
      Logit loaded[kVector];
      const uint4 bits = *reinterpret_cast<const uint4*>(row + c);
      memcpy(loaded, &bits, sizeof bits);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[c + i] = static_cast<float>(loaded[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[c + i] = c + i < own ? static_cast<float>(row[(c + i) * stride]) : 0.0f;
    }
  }
}

template <class Logit>
__device__ __forceinline__ void store_columns(const float (&x)[kPart], int own, Logit* row) {
  constexpr int kVector = 16 / sizeof(Logit);
  const bool wide = reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll
  for (int c = 0; c < kPart; c += kVector) {
    if (wide && c + kVector <= own) {
      Logit stored[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) stored[i] = static_cast<Logit>(x[c + i]);
      uint4 bits;
      memcpy(&bits, stored, sizeof bits);
      *reinterpret_cast<uint4*>(row + c) = bits;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (c + i < own) row[c + i] = static_cast<Logit>(x[c + i]);
    }
  }
}

// Softmax of the row: numerators e^(z - max), 0 beyond the own columns, with the maximum and the sum.
__device__ __forceinline__ void exponentials(const Team& team, const float (&z)[kPart], float (&p)[kPart], float& max,
                                             float& sum) {
  max = -INFINITY;
#pragma unroll
  for (int c = 0; c < kPart; ++c)
    if (c < team.own) max = maximum(max, z[c]);
  max = team.max(max);
  float part = 0.0f;
#pragma unroll
  for (int c = 0; c < kPart; ++c) {
    p[c] = c < team.own ? exp_nonpositive(z[c] - max) : 0.0f;
    part += p[c];
  }
  sum = team.sum(part);
}

__device__ __forceinline__ void softmax(const Team& team, const float (&z)[kPart], float (&p)[kPart]) {
  float max, sum;
  exponentials(team, z, p, max, sum);
#pragma unroll
  for (int c = 0; c < kPart; ++c) p[c] = p[c] / sum;
}

// Softmax of the k values of a list in shared memory: maximum and sum, the same in every lane.
__device__ __forceinline__ void list_exponentials(const float* values, int k, float& max, float& sum) {
  max = values[0];
  for (int j = 1; j < k; ++j) max = maximum(max, values[j]);
  Sum<float> running;
  for (int j = 0; j < k; ++j) running.add(exp_nonpositive(values[j] - max));
  sum = running.value();
}

// The k columns with the largest keys, best first, ties to the lower column: index[j] = column, chosen[j] = its value.
// One pass per choice: every lane finds its best, the team the best of them, and the winner's lane crosses it out.
__device__ __forceinline__ void select_top_k(const Team& team, int32_t (&key)[kPart], const float (&value)[kPart],
                                             int k, int16_t* index, float* chosen) {
  for (int j = 0; j < k; ++j) {
    int32_t best = kTaken;
    int at = 0;
    float best_value = 0.0f;
#pragma unroll
    for (int c = 0; c < kPart; ++c)
      if (key[c] > best) {
        best = key[c];
        at = c;
        best_value = value[c];
      }
    int column = team.lane * kPart + at;
    for (int step = team.lanes / 2; step > 0; step /= 2) {
      const int32_t other = __shfl_xor_sync(kAllLanes, best, step);
      const int other_column = __shfl_xor_sync(kAllLanes, column, step);
      const float other_value = __shfl_xor_sync(kAllLanes, best_value, step);
      if (other > best || (other == best && other_column < column)) {
        best = other;
        column = other_column;
        best_value = other_value;
      }
    }
#pragma unroll
    for (int c = 0; c < kPart; ++c)
      if (column == team.lane * kPart + c) key[c] = kTaken;
    if (team.lane == 0) {
      index[j] = static_cast<int16_t>(column);
      chosen[j] = best_value;
    }
  }
  __syncwarp();
}

// What the row functions have to know; pointers to float are of the group's columns.
struct Rule {
  bool is_sigmoid, renormalize;
  int top_k;
  float scale;
};

// Forward of one row, whose logits stand in x. Leaves the probabilities in p, the choice in index (columns of the
// group) and the weights in chosen. `bias` may be null. `bad`: this lane saw a logit that is not finite.
__device__ __forceinline__ void forward_row(const Team& team, const Rule& rule, const float* bias, float (&x)[kPart],
                                            float (&p)[kPart], int16_t* index, float* chosen, float& logsumexp,
                                            bool& bad) {
  bad = false;
#pragma unroll
  for (int c = 0; c < kPart; ++c) bad |= c < team.own && x[c] - x[c] != 0.0f;  // inf - inf is NaN

  float max, sum;
  exponentials(team, x, p, max, sum);
  logsumexp = max + log_positive(sum);
  float z[kPart];
#pragma unroll
  for (int c = 0; c < kPart; ++c) z[c] = x[c];
  if (rule.is_sigmoid) {
#pragma unroll
    for (int c = 0; c < kPart; ++c) z[c] = log_sigmoid(x[c]);
    exponentials(team, z, p, max, sum);
  }
  const float inverse = 1.0f / sum;

  // Choice by the logit; a bias is defined on scores, so there the score has to be computed.
  int32_t key[kPart];
#pragma unroll
  for (int c = 0; c < kPart; ++c) {
    float preference = x[c];
    if (bias != nullptr && c < team.own)
      preference = (rule.is_sigmoid ? sigmoid(preference) : p[c] * inverse) + bias[team.lane * kPart + c];
    key[c] = c < team.own ? ordered_key(preference) : kTaken;
    if (!rule.renormalize && !rule.is_sigmoid) z[c] = p[c];  // the weight is a share of all, not of the chosen
  }
  select_top_k(team, key, z, rule.top_k, index, chosen);

  float divisor = sum;
  if (rule.renormalize)
    list_exponentials(chosen, rule.top_k, max, divisor);
  else if (rule.is_sigmoid)
    divisor = 1.0f;
  __syncwarp();  // everybody has read
  for (int j = team.lane; j < rule.top_k; j += team.lanes) {
    float weight = chosen[j];
    if (rule.renormalize)
      weight = exp_nonpositive(weight - max);
    else if (rule.is_sigmoid)
      weight = exp_nonpositive(weight);
    chosen[j] = weight / divisor * rule.scale;
  }
#pragma unroll
  for (int c = 0; c < kPart; ++c) p[c] *= inverse;
}

// The value of one column of the row, in every lane. The test is of a bit: out of `column % kPart == c` the compiler
// would conclude x[column % kPart], a load from local memory.
__device__ __forceinline__ float pick(const Team& team, const float (&x)[kPart], int column) {
  const unsigned bit = 1u << (column % kPart);
  float value = 0.0f;
#pragma unroll
  for (int c = 0; c < kPart; ++c) value = bit & (1u << c) ? x[c] : value;
  return __shfl_sync(kAllLanes, value, column / kPart, team.lanes);
}

// Gradient of one row, whose logits stand in x; the mathematics stands at backward_part of cpu/routing_tile.h. `index`
// (columns) and `grad` (scale * grad_weights) are lists of the team; `chosen` is its scratch. Leaves dx in dx.
__device__ __forceinline__ void backward_row(const Team& team, const Rule& rule, const float* grad_mean,
                                             float grad_logsumexp, const float (&x)[kPart], const int16_t* index,
                                             float* grad, float* chosen, float (&dx)[kPart]) {
  const int k = rule.top_k;
  float p[kPart], z[kPart];
  softmax(team, x, p);
#pragma unroll
  for (int c = 0; c < kPart; ++c) {
    z[c] = rule.is_sigmoid ? log_sigmoid(x[c]) : x[c];
    dx[c] = p[c];  // the softmax of z
  }
  if (rule.is_sigmoid) softmax(team, z, dx);
#pragma unroll
  for (int c = 0; c < kPart; ++c)
    if (!rule.renormalize && !rule.is_sigmoid) z[c] = dx[c];  // the weight is a share of all, not of the chosen

  // dz of the chosen, into grad.
  for (int j = 0; j < k; ++j) {
    float value = pick(team, z, index[j]);
    if (!rule.renormalize && rule.is_sigmoid) value = exp_nonpositive(value);
    if (team.lane == 0) chosen[j] = value;
  }
  __syncwarp();
  float max = 0.0f, sum = 1.0f, dot = 0.0f;
  if (rule.renormalize) list_exponentials(chosen, k, max, sum);
  const auto weight = [&](int j) { return rule.renormalize ? exp_nonpositive(chosen[j] - max) / sum : chosen[j]; };
  for (int j = 0; j < k; ++j) dot += grad[j] * weight(j);
  const float through_chosen = rule.renormalize ? dot : 0.0f;
  __syncwarp();  // everybody has read
  for (int j = team.lane; j < k; j += team.lanes) grad[j] = weight(j) * (grad[j] - through_chosen);
  __syncwarp();

  // dz of all columns, with the gradient that logsumexp brings.
  float mean[kPart], part = 0.0f;
#pragma unroll
  for (int c = 0; c < kPart; ++c) {
    mean[c] = c < team.own ? grad_mean[team.lane * kPart + c] : 0.0f;
    part += dx[c] * mean[c];
  }
  const float through_mean = team.sum(part);
  const float shift = rule.is_sigmoid || rule.renormalize ? through_mean : through_mean + dot;
#pragma unroll
  for (int c = 0; c < kPart; ++c) {
    const float old = dx[c];
    dx[c] = old * (mean[c] - shift);
    if (!rule.is_sigmoid) dx[c] += old * grad_logsumexp;
  }
  for (int j = 0; j < k; ++j) {
    const int column = index[j] - team.lane * kPart;
    const float step = grad[j];
#pragma unroll
    for (int c = 0; c < kPart; ++c) dx[c] += column == c ? step : 0.0f;
  }
  if (rule.is_sigmoid)
#pragma unroll
    for (int c = 0; c < kPart; ++c) dx[c] = dx[c] * sigmoid(-x[c]) + p[c] * grad_logsumexp;
}

}  // namespace unif2ace::routing::gpu
