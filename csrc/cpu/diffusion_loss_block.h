// Softmax over one block of columns: the hot loops of cpu/diffusion_loss.cpp.
//
// A chunk of rows has its logits in blocks of columns, each a dense [rows, width] matrix as the product left it. Per
// block and row the first pass keeps three numbers (maximum m, sum of e^(z - m), the same sum over the mass columns);
// `combine` makes the row's softmax out of them; the second pass turns logits into gradients in place.
//
// Cost per logit: two exponentials of about 20 vector instructions, against 6 H FLOPs in the products around them.
// Sums over columns run in 16 fixed lanes, sums over rows in row order: the same bits on any instruction set.
#pragma once

#include <cfloat>

#include "cpu/convert.h"

namespace unif2ace::diffusion_loss {

constexpr int kLanes = 16;     // partial sums over columns
constexpr int kRowGroup = 16;  // rows that a bias gradient sums before it adds them to the total: two-level summation

// What a chunk knows about its rows; every array has `padded` elements, a multiple of 16.
struct Rows {
  int64_t rows, padded;
  const int64_t* target;  // column of the target, counted from the first column of the softmax
  float* target_logit;
  float *weight, *pull;     // row_weight, mass_weight (0 without one)
  float* max;               // of the row's logits
  float *outside, *inside;  // gradient of a logit = e^(z - max) times this, outside or inside of the mass columns
  float *sum, *mass;        // of e^(z - max); probability of the mass columns
};

// One block of columns; the statistics are [rows].
struct Block {
  void* logits;                  // [rows, width]; turned into gradients in place
  int64_t first, width;          // columns first .. first + width of the softmax
  int64_t mass_begin, mass_end;  // mass columns within the block, 0 .. width
  float *max, *sum, *mass;
  float* grad_bias;  // [width], added to
};

template <class F>
UNIF2ACE_INLINE float fold_sum(const F* lanes) {
  float lane[kLanes];
  for (int v = 0; v < kLanes / kWidth<F>; ++v) store(lane + v * kWidth<F>, lanes[v]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

template <class F>
UNIF2ACE_INLINE float fold_max(const F* lanes) {
  float lane[kLanes];
  for (int v = 0; v < kLanes / kWidth<F>; ++v) store(lane + v * kWidth<F>, lanes[v]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = maximum(lane[i], lane[i + half]);
  return lane[0];
}

// The last n < 16 of a row's logits, filled up with -inf: no maximum, and nothing in a sum of exponentials.
template <class T>
struct Tail {
  T logits[kLanes];
  UNIF2ACE_INLINE Tail(const T* from, int64_t n) {
    for (int i = 0; i < kLanes; ++i) logits[i] = i < n ? from[i] : static_cast<T>(-__builtin_inff());
  }
};

// At least -FLT_MAX, so that -inf - max is -inf and not NaN in a block of nothing but -inf.
template <class F, class T>
UNIF2ACE_INLINE float max_of(const T* logits, int64_t n) {
  F lanes[kLanes / kWidth<F>];
  for (F& lane : lanes) lane = splat<F>(-FLT_MAX);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int v = 0; v < kLanes / kWidth<F>; ++v)
      lanes[v] = maximum(lanes[v], load_floats<F>(logits + c + v * kWidth<F>));
  if (c < n) {
    const Tail<T> tail(logits + c, n - c);
    for (int v = 0; v < kLanes / kWidth<F>; ++v)
      lanes[v] = maximum(lanes[v], load_floats<F>(tail.logits + v * kWidth<F>));
  }
  return fold_max(lanes);
}

// Sum of e^(z - max).
template <class F, class T>
UNIF2ACE_INLINE float sum_exp(const T* logits, int64_t n, float max) {
  F lanes[kLanes / kWidth<F>] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int v = 0; v < kLanes / kWidth<F>; ++v)
      lanes[v] += exp_nonpositive(load_floats<F>(logits + c + v * kWidth<F>) - max);
  if (c < n) {
    const Tail<T> tail(logits + c, n - c);
    for (int v = 0; v < kLanes / kWidth<F>; ++v)
      lanes[v] += exp_nonpositive(load_floats<F>(tail.logits + v * kWidth<F>) - max);
  }
  return fold_sum(lanes);
}

// First pass over a block.
template <class F, class T>
UNIF2ACE_INLINE void statistics(const Block& block, const Rows& rows) {
  for (int64_t r = 0; r < rows.rows; ++r) {
    const T* logits = static_cast<const T*>(block.logits) + r * block.width;
    const float max = max_of<F>(logits, block.width);
    const float sum = sum_exp<F>(logits, block.width, max);
    const int64_t inside = block.mass_end - block.mass_begin, column = rows.target[r] - block.first;
    block.max[r] = max;
    block.sum[r] = sum;
    block.mass[r] = inside == block.width ? sum
                    : inside == 0         ? 0.0f
                                          : sum_exp<F>(logits + block.mass_begin, inside, max);
    if (column >= 0 && column < block.width) rows.target_logit[r] = static_cast<float>(logits[column]);
  }
  for (int64_t r = rows.rows; r < rows.padded; ++r) block.max[r] = block.sum[r] = block.mass[r] = 0.0f;
}

// The softmax of rows r .. r + lanes from the statistics of all blocks, a lane a row.
template <class F>
UNIF2ACE_INLINE void combine(const Block* blocks, int64_t count, const Rows& rows, int64_t r) {
  F max = splat<F>(-FLT_MAX), sum = splat<F>(0.0f), mass = splat<F>(0.0f);
  for (int64_t b = 0; b < count; ++b) max = maximum(load<F>(blocks[b].max + r), max);
  for (int64_t b = 0; b < count; ++b) {
    const F share = exp_nonpositive(load<F>(blocks[b].max + r) - max);
    sum += load<F>(blocks[b].sum + r) * share;
    mass += load<F>(blocks[b].mass + r) * share;
  }
  mass = mass / sum;
  const F weight = load<F>(rows.weight + r), pull = load<F>(rows.pull + r);
  store(rows.sum + r, sum);
  store(rows.mass + r, mass);
  store(rows.max + r, max);
  store(rows.outside + r, (weight - pull * mass) / sum);
  store(rows.inside + r, (weight - pull * mass + pull) / sum);
}

// n logits of a row become e^(z - max) * factor, which is also added to `sum`.
template <class F, class T>
UNIF2ACE_INLINE void scale_exp(T* logits, int64_t n, float max, float factor, float* sum) {
  int64_t c = 0;
  for (; c + kWidth<F> <= n; c += kWidth<F>) {
    const F grad = exp_nonpositive(load_floats<F>(logits + c) - max) * factor;
    store_floats(logits + c, grad);
    store(sum + c, load<F>(sum + c) + grad);
  }
  for (; c < n; ++c) {
    const float grad = exp_nonpositive(static_cast<float>(logits[c]) - max) * factor;
    logits[c] = static_cast<T>(grad);
    sum[c] += grad;
  }
}

// Second pass: logits -> gradients with respect to them, and the gradient of the bias. `group` holds [width] floats.
template <class F, class T>
UNIF2ACE_INLINE void gradients(const Block& block, const Rows& rows, float* group) {
  for (int64_t begin = 0; begin < rows.rows; begin += kRowGroup) {
    const int64_t end = begin + kRowGroup < rows.rows ? begin + kRowGroup : rows.rows;
    for (int64_t c = 0; c < block.width; ++c) group[c] = 0.0f;
    for (int64_t r = begin; r < end; ++r) {
      T* row = static_cast<T*>(block.logits) + r * block.width;
      const float max = rows.max[r], outside = rows.outside[r], inside = rows.inside[r];
      scale_exp<F>(row, block.mass_begin, max, outside, group);
      scale_exp<F>(row + block.mass_begin, block.mass_end - block.mass_begin, max, inside, group + block.mass_begin);
      scale_exp<F>(row + block.mass_end, block.width - block.mass_end, max, outside, group + block.mass_end);
      const int64_t column = rows.target[r] - block.first;
      if (column >= 0 && column < block.width) {  // minus the weight; from float32, before any rounding to T
        const float factor = column >= block.mass_begin && column < block.mass_end ? inside : outside;
        row[column] = static_cast<T>(exp_nonpositive(rows.target_logit[r] - max) * factor - rows.weight[r]);
        group[column] -= rows.weight[r];
      }
    }
    for (int64_t c = 0; c < block.width; ++c) block.grad_bias[c] += group[c];
  }
}

}  // namespace unif2ace::diffusion_loss
