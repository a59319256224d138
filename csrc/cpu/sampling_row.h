// Sampling of one row of logits in one pass: the hot loops of cpu/sampling.cpp. Semantics: unif2ace/ops/sampling.py.
//
// A row is read once, in spans of 1024 codes that stay in the first-level cache:
//   1. z = a * cond - w * uncond, as float32;                      memory traffic, 3 operations per code
//   2. sum of e^(z - max), rescaled when a span raises the max;    about 24 operations per code
//   3. argmax of z / T + Gumbel.                                   Philox: about 2 vector operations per code
// The third step is an exact search with upper bounds. A block of 128 codes can be skipped without noise if its largest
// z / T plus the largest Gumbel number there is does not beat the best key so far; and without Gumbel numbers if the
// bound of its smallest Philox words does not. So logarithms are computed for a handful of blocks per row.
//
// **The bounds are exact**, not merely very likely: rounded sums and products by a positive number, conversions and
// comparisons are monotone. With s = fl(z * 1/T) of any code of the block, s' that of its largest z, g the computed
// Gumbel number and G >= g a bound: s <= s' and so key = fl(s + g) <= fl(s' + G). A block is only skipped where
// fl(s' + G) <= best, when no key in it exceeds the best; and as blocks come in order of their codes, an equal key
// would lose the tie. Nothing here depends on how good the bound is.
//
// Measured on a Zen 5, one core, 8192 guided codes in the cache: steps 1 and 2 take 3 us, step 3 4 us with flat logits
// and 3.3 us with steep ones.
//
// Sums run over 32 fixed lanes of each span, spans in order, in double: the same bits on any instruction set.
#pragma once

#include <cstdint>

#include "common/gumbel.h"
#include "common/philox.h"
#include "common/stable.h"
#include "cpu/convert.h"

namespace unif2ace::sampling {

// Codes per decision to skip. At AVX-512 they are four registers of counters, which hide each other's latency in
// Philox: 0.19 ns per word on a Zen 5, 0.27 with half as many.
constexpr int kBlock = 128;
constexpr int kCounters = kBlock / 4;
constexpr int kSpan = 1024;    // codes per step: 4 KiB of z, an eighth of the smallest first-level cache in use
constexpr int kSumLanes = 32;  // running sums: two registers at AVX-512

// Scores of some rows, as they lie in memory. Strides count elements; columns are dense.
struct Scores {
  ScalarType dtype;           // Float, BFloat16 or Half
  const void *cond, *uncond;  // uncond: null without guidance
  int64_t cond_stride, uncond_stride;
  float cond_factor, uncond_factor;  // 1 + w, w
};

// The noise of one row: everything but the code.
template <class F>
struct RowNoise {
  PhiloxKeys<typename WideOf<F>::type> keys;
  uint32_t position, step, stream;
};

// What has been found in the codes read so far.
struct Row {
  float max = -__builtin_inff();
  double sum = 0.0;                // of e^(z - max)
  float best = -__builtin_inff();  // largest key
  float best_z = -__builtin_inff();
  int32_t code = 0;
};

template <class F, class Logit>
UNIF2ACE_INLINE void load_guided(const Logit* cond, const Logit* uncond, float a, float w, int n, float* z) {
  constexpr int width = kWidth<F>;
  int i = 0;
  if (uncond == nullptr) {
    for (; i + width <= n; i += width) store(z + i, load_floats<F>(cond + i));
    if (i < n) store(z + i, load_some<F>(cond + i, n - i));
  } else {
    for (; i + width <= n; i += width) store(z + i, a * load_floats<F>(cond + i) - w * load_floats<F>(uncond + i));
    if (i < n) store(z + i, a * load_some<F>(cond + i, n - i) - w * load_some<F>(uncond + i, n - i));
  }
}

// z of the codes first .. first + n of a row, and -inf behind them, up to a whole block. The dtype is looked at once
// per span, so that the rest is compiled once and not once per dtype.
template <class F, class Logit>
UNIF2ACE_INLINE void load_as(const Scores& s, int64_t row, int64_t first, int n, float* z) {
  const Logit* cond = static_cast<const Logit*>(s.cond) + row * s.cond_stride + first;
  const Logit* uncond =
      s.uncond == nullptr ? nullptr : static_cast<const Logit*>(s.uncond) + row * s.uncond_stride + first;
  load_guided<F>(cond, uncond, s.cond_factor, s.uncond_factor, n, z);
}

template <class F>
UNIF2ACE_INLINE void load_span(const Scores& s, int64_t row, int64_t first, int n, float* z) {
  if (s.dtype == ScalarType::Float)
    load_as<F, float>(s, row, first, n, z);
  else if (s.dtype == ScalarType::BFloat16)
    load_as<F, BFloat16>(s, row, first, n, z);
  else
    load_as<F, Half>(s, row, first, n, z);
  for (int i = n; i % kBlock != 0; ++i) z[i] = -__builtin_inff();
}

// The largest of a block. Loses NaN now and then; the sum of exponentials does not.
template <class F>
UNIF2ACE_INLINE float block_maximum(const float* z) {
  F high = load<F>(z);
  for (int i = kWidth<F>; i < kBlock; i += kWidth<F>) high = maximum(high, load<F>(z + i));
  float lanes[kWidth<F>];
  store(lanes, high);
  for (int half = kWidth<F> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = maximum(lanes[i], lanes[i + half]);
  return lanes[0];
}

// Sum of e^(z - max) over n values, a multiple of kSumLanes.
template <class F>
UNIF2ACE_INLINE float exponential_sum(const float* z, int n, float max) {
  constexpr int width = kWidth<F>, parts = kSumLanes / width;
  F sum[parts] = {};
  for (int i = 0; i < n; i += kSumLanes)
    for (int p = 0; p < parts; ++p) sum[p] += exp_nonpositive(load<F>(z + i + p * width) - max);
  float lanes[kSumLanes];
  for (int p = 0; p < parts; ++p) store(lanes + p * width, sum[p]);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class F>
UNIF2ACE_INLINE void add_exponentials(const float* z, int n, float max, Row& row) {
  if (max > row.max) {
    row.sum *= exp_nonpositive(row.max - max);
    row.max = max;
  }
  // Nothing but -inf so far: with any finite max the terms are zeros, with that one they would be NaN.
  row.sum += exponential_sum<F>(z, n, row.max == -__builtin_inff() ? 0.0f : row.max);
}

// The words of one block: word[k][j] belongs to code 4 j + k of the block.
struct BlockWords {
  int32_t word[4][kCounters];
};

template <class F>
UNIF2ACE_INLINE Integers<F> smaller_unsigned(Integers<F> a, Integers<F> b) {
  return (a ^ INT32_MIN) < (b ^ INT32_MIN) ? a : b;
}

template <class F>
UNIF2ACE_INLINE void draw_words(const RowNoise<F>& noise, int64_t first_code, BlockWords& words) {
  using W = typename WideOf<F>::type;
  constexpr int count = sizeof(F) == 64 ? 4 : 2;  // registers of counters side by side: AVX2 has half as many
  W even;
  for (int i = 0; i < kWidth<F> / 2; ++i) even[i] = 2 * i;
  for (int j = 0; j < kCounters; j += count / 2 * kWidth<F>) {
    PhiloxWords<W> c[count] = {};
    for (int i = 0; i < count; ++i) {
      const uint64_t start = first_code / 4 + j + i / 2 * kWidth<F> + i % 2;
      c[i] = {even + start, W{} + noise.position, W{} + noise.step, W{} + noise.stream};
    }
    philox(c, noise.keys);
    for (int i = 0; i < count; i += 2) {
      int32_t* to = words.word[0] + j + i / 2 * kWidth<F>;
      store(to, interleave_low_halves<F>(c[i].c0, c[i + 1].c0));
      store(to + kCounters, interleave_low_halves<F>(c[i].c1, c[i + 1].c1));
      store(to + 2 * kCounters, interleave_low_halves<F>(c[i].c2, c[i + 1].c2));
      store(to + 3 * kCounters, interleave_low_halves<F>(c[i].c3, c[i + 1].c3));
    }
  }
}

template <class I>
UNIF2ACE_INLINE bool any(I mask) {
  uint64_t parts[sizeof(I) / sizeof(uint64_t)], some = 0;
  store(parts, mask);
  for (uint64_t part : parts) some |= part;
  return some != 0;
}

// Can a code of the block beat `best`? `top` is the block's largest z / T.
template <class F>
UNIF2ACE_INLINE bool may_beat(const BlockWords& words, float top, float best) {
  using I = Integers<F>;
  I hit = {};
  for (int j = 0; j < kCounters; j += kWidth<F>) {
    const I low = smaller_unsigned<F>(smaller_unsigned<F>(load<I>(words.word[0] + j), load<I>(words.word[1] + j)),
                                      smaller_unsigned<F>(load<I>(words.word[2] + j), load<I>(words.word[3] + j)));
    hit = top + gumbel_bound<F>(low) > best ? I{} - 1 : hit;
  }
  return any(hit);
}

// The same test with each code's own z, a register of codes at a time, and exact keys where it succeeds. Codes do not
// come in order here, so equal keys are compared by code, and bounds that equal the best are not skipped.
template <class F>
UNIF2ACE_INLINE void search_block(const float* z, const BlockWords& words, float inverse_temperature,
                                  int64_t first_code, Row& row) {
  using I = Integers<F>;
  constexpr int width = kWidth<F>;
  float turned[4][kCounters];  // z in the order of the words
  for (int j = 0; j < kCounters; ++j)
    for (int k = 0; k < 4; ++k) turned[k][j] = z[4 * j + k];
  for (int k = 0; k < 4; ++k)
    for (int j = 0; j < kCounters; j += width) {
      const F scaled = load<F>(turned[k] + j) * inverse_temperature;
      const I word = load<I>(words.word[k] + j);
      if (!any(scaled + gumbel_bound<F>(word) >= row.best ? I{} - 1 : I{})) continue;
      float keys[width];
      store(keys, scaled + gumbel<F>(word));
      for (int i = 0; i < width; ++i) {
        const int32_t code = static_cast<int32_t>(first_code) + 4 * (j + i) + k;
        if (keys[i] > row.best || (keys[i] == row.best && code < row.code)) {
          row.best = keys[i];
          row.best_z = turned[k][j + i];
          row.code = code;
        }
      }
    }
}

template <class F>
UNIF2ACE_INLINE void sample_span(const float* z, int n, int64_t first, float inverse_temperature,
                                 const RowNoise<F>& noise, Row& row) {
  const int blocks = (n + kBlock - 1) / kBlock;
  float high[kSpan / kBlock], max = -__builtin_inff();
  for (int b = 0; b < blocks; ++b) {
    high[b] = block_maximum<F>(z + b * kBlock);
    max = maximum(max, high[b]);
  }
  add_exponentials<F>(z, blocks * kBlock, max, row);
  if (first == 0) row.best_z = z[0];  // code 0 wins where every key is -inf
  if (inverse_temperature == 0.0f) {
    if (!(max > row.best)) return;
    int i = 0;
    while (z[i] != max) ++i;
    row.best = row.best_z = max;
    row.code = static_cast<int32_t>(first + i);
    return;
  }
  for (int b = 0; b < blocks; ++b) {
    const float top = high[b] * inverse_temperature;
    if (!(top + kLargestGumbel > row.best)) continue;
    BlockWords words;
    draw_words<F>(noise, first + b * kBlock, words);
    if (may_beat<F>(words, top, row.best))
      search_block<F>(z + b * kBlock, words, inverse_temperature, first + b * kBlock, row);
  }
}

// log softmax(z) of the chosen code; NaN where the row holds NaN, +inf or nothing finite.
UNIF2ACE_INLINE float log_confidence(const Row& row) {
  const float sum = static_cast<float>(row.sum);
  const float log_sum = log_positive(sum) + static_cast<float>((row.sum - sum) / sum);  // what float(sum) rounded away
  return (row.best_z - row.max) - log_sum;
}

}  // namespace unif2ace::sampling
