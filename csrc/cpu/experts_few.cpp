// The op `experts` as dot products of token rows with rows of weights: how a few rows per expert are done, as in
// decoding, and any number of them whose bits must not depend on their number.
//
// The columns of a matrix, of *all* experts, are shared out in panels, so the cores are equally busy however the tokens
// fall, and each reads its part of every used matrix once, in long runs. Two sweeps: up projection and activation, then
// down projection and the weighted sum over the choices of a token, for which a panel has all it needs in its own
// columns.
//
// Three levels, each with something that stays while the rest passes by:
//   registers      4 rows of weights meet 4 token rows: 16 sums, 8 loads for 16 multiply-adds;
//   L1             a block of token rows: the rows of weights pass by, four at a time;
//   L2             a panel: the blocks of all token rows of its expert pass by.
// Of few rows there is one block, and the weights come from memory. The next four rows of weights are prefetched: rows
// are too short for the processor to follow by itself (8 tokens, 16 experts of 2048 x 512 in bfloat16: 1.9 -> 1.2 ms,
// the speed of memory; 4096 tokens, top 2 of 16 experts of 768 x 384 in float32: 35 -> 28 ms). bfloat16 and float16 are
// converted as they are loaded, or where several blocks follow, once for all of them.
//
// Each number is a sum over 16 lanes, then over the lanes, whatever the block, panel and instruction set: the bits of a
// token depend on its row and its experts alone.
#include "cpu/experts_few.h"

#include <algorithm>

#include "cpu/experts_mlp.h"
#include "cpu/experts_tiles.h"
#include "cpu/isa.h"
#include "cpu/lanes16.h"

namespace unif2ace::experts {
namespace {

constexpr int kWeightRows = 4;  // 16 sums, 4 weights and a value fill the 32 registers of AVX-512 without spilling
constexpr int kTokenRows = 4;

// `left` elements from here on, at most 16. A constant in the loop over whole vectors.
template <class F, class D, int J, int R>
UNIF2ACE_INLINE void dot_step(const D* w, int64_t length, const float* x, int64_t x_stride, Lanes16<F>* sum,
                              int64_t left) {
  for (int part = 0; part < kParts<F>; ++part) {
    const int at = part * kWidth<F>;
    if (left <= at) break;
    F weight[J];
    for (int j = 0; j < J; ++j) {
      weight[j] = load_part<F>(w + j * length + at, left - at);
      __builtin_prefetch(w + (J + j) * length + at);  // the next J rows
    }
    for (int r = 0; r < R; ++r) {
      const F value = load<F>(x + r * x_stride + at);
      for (int j = 0; j < J; ++j) sum[r * kWeightRows + j].part[part] += weight[j] * value;
    }
  }
}

template <class F, class D, int J, int R>
UNIF2ACE_INLINE void dot_block(const D* w, int64_t length, const float* x, int64_t x_stride, const float* bias,
                               float* out, int64_t out_stride) {
  Lanes16<F> sum[kTokenRows * kWeightRows];
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) dot_step<F, D, J, R>(w + i, length, x + i, x_stride, sum, 16);
  if (i < length) dot_step<F, D, J, R>(w + i, length, x + i, x_stride, sum, length - i);
  float total[16];
  memcpy(total, sums(sum).part, sizeof total);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) out[r * out_stride + j] = total[r * kWeightRows + j] + bias[j];
}

template <class F, class D, int J>
UNIF2ACE_INLINE void dot_rows(const D* w, int64_t length, const float* x, int64_t rows, const float* bias, float* out,
                              int64_t out_stride) {
  const int64_t x_stride = padded_length(length);
  int64_t r = 0;
  for (; r + kTokenRows <= rows; r += kTokenRows)
    dot_block<F, D, J, kTokenRows>(w, length, x + r * x_stride, x_stride, bias, out + r * out_stride, out_stride);
  x += r * x_stride;
  out += r * out_stride;
  if (rows - r == 3)
    dot_block<F, D, J, 3>(w, length, x, x_stride, bias, out, out_stride);
  else if (rows - r == 2)
    dot_block<F, D, J, 2>(w, length, x, x_stride, bias, out, out_stride);
  else if (rows - r == 1)
    dot_block<F, D, J, 1>(w, length, x, x_stride, bias, out, out_stride);
}

template <class F, class D>
UNIF2ACE_INLINE void dot_matrix(const D* w, const D* bias, int64_t count, int64_t length, const float* x, int64_t rows,
                                float* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + kWeightRows <= count; j += kWeightRows) {
    float shift[kWeightRows] = {};
    for (int i = 0; bias != nullptr && i < kWeightRows; ++i) shift[i] = static_cast<float>(bias[j + i]);
    dot_rows<F, D, kWeightRows>(w + j * length, length, x, rows, shift, out + j, out_stride);
  }
  for (; j < count; ++j) {
    const float shift = bias == nullptr ? 0.0f : static_cast<float>(bias[j]);
    dot_rows<F, D, 1>(w + j * length, length, x, rows, &shift, out + j, out_stride);
  }
}

template <class F>
UNIF2ACE_INLINE void dots_body(ScalarType dtype, const void* w, const void* bias, int64_t count, int64_t length,
                               const float* x, int64_t rows, float* out, int64_t out_stride) {
  if (dtype == ScalarType::Float)
    dot_matrix<F>(static_cast<const float*>(w), static_cast<const float*>(bias), count, length, x, rows, out,
                  out_stride);
  else if (dtype == ScalarType::BFloat16)
    dot_matrix<F>(static_cast<const BFloat16*>(w), static_cast<const BFloat16*>(bias), count, length, x, rows, out,
                  out_stride);
  else
    dot_matrix<F>(static_cast<const Half*>(w), static_cast<const Half*>(bias), count, length, x, rows, out, out_stride);
}

// ------------------------------------------------------------------------------------------------------- forward pass

// Half of a first-level cache of 48 KiB, but at least 8 rows: with fewer the weights come from the second level too
// often (1024 tokens, top 4 of 16 experts of 2048 x 512, blocks of 4, 8 and 16 rows: 61, 56 and 64 ms).
constexpr int64_t kBlockBytes = 24 << 10;

// Of a second-level cache of 1 MiB. Smaller panels gather the token rows more often (4096 tokens, top 2 of 16 experts
// of 768 x 384, panels of 256 KiB: 30 ms instead of 28).
constexpr int64_t kPanelBytes = 640 << 10;

// Rows from which weights of 16 bits are converted beforehand (16 experts of 192 x 128 with 12 rows each, bfloat16: 139
// us without, 117 with that).
constexpr int64_t kWideRows = 8;

// Rows of weights of one expert, and their biases.
struct Panel {
  ScalarType dtype;
  const void *w, *bias;
  int64_t count, length;
};

struct Scratch {
  Buffer rows, weights[2];  // [2]: gate and up
};

int64_t block_rows(int64_t length) {
  const int64_t rows = kBlockBytes / sizeof(float) / std::max<int64_t>(padded_length(length), 1);
  return std::max<int64_t>(rows / kTokenRows, 2) * kTokenRows;
}

void padded_row(ScalarType dtype, const void* from, int64_t length, float* to) {
  to_float(dtype, from, length, to);
  std::fill(to + length, to + padded_length(length), 0.0f);
}

Panel panel_of(const Tensor& w, const std::optional<Tensor>& bias, int64_t row, int64_t count, int64_t length) {
  const ScalarType dtype = w.scalar_type();
  const auto element = [&](const Tensor& tensor, int64_t at) {
    return static_cast<const char*>(tensor.const_data_ptr()) + at * size_of(dtype);
  };
  return {dtype, element(w, row * length), bias ? element(*bias, row) : nullptr, count, length};
}

// What `rows` token rows are to be multiplied with: the panel, or its numbers in float32 in `memory`.
Panel panel_for(int64_t rows, const Panel& panel, Buffer& memory) {
  if (panel.dtype == ScalarType::Float || rows < kWideRows) return panel;
  const int64_t padded = padded_length(panel.length), size = size_of(panel.dtype);
  float* w = memory.fit<float>(panel.count * (padded + 1) * sizeof(float));
  for (int64_t j = 0; j < panel.count; ++j)
    padded_row(panel.dtype, static_cast<const char*>(panel.w) + j * panel.length * size, panel.length, w + j * padded);
  float* bias = panel.bias == nullptr ? nullptr : w + panel.count * padded;
  if (bias != nullptr) to_float(panel.dtype, panel.bias, panel.count, bias);
  return {ScalarType::Float, w, bias, panel.count, padded};
}

void multiply(const Panel& p, const float* x, int64_t rows, float* out, int64_t out_stride) {
  dots(p.dtype, p.w, p.bias, p.count, p.length, x, rows, out, out_stride);
}

// Columns first .. first + width - 1 of the activation of all rows -> act[slots, padded_length(inner)].
void up_columns(const Mlp& p, int64_t first, int64_t width, float* act, char* pre_out, Scratch& scratch) {
  const int64_t length = padded_length(p.hidden), act_length = padded_length(p.inner);
  const int64_t parts = is_gated(p.activation) ? 2 : 1, block = std::min(block_rows(p.hidden), p.slots);
  const Rows source = p.rows_of(p.x);
  float* x = scratch.rows.fit<float>(block * (length + parts * width) * sizeof(float));
  float* pre = x + block * length;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t end = p.offsets[e + 1];
    if (p.offsets[e] == end) continue;
    Panel panel[2];
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = e * p.up_rows + part * p.inner + first;
      panel[part] =
          panel_for(end - p.offsets[e], panel_of(p.w_up, p.b_up, row, width, p.hidden), scratch.weights[part]);
    }
    for (int64_t begin = p.offsets[e]; begin < end; begin += block) {
      const int64_t rows = std::min(block, end - begin);
      for (int64_t r = 0; r < rows; ++r) padded_row(p.dtype, source.row(begin + r), p.hidden, x + r * length);
      for (int64_t part = 0; part < parts; ++part) multiply(panel[part], x, rows, pre + part * width, parts * width);
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = pre + r * parts * width;
        float* out = act + (begin + r) * act_length;
        activate(p.activation, ScalarType::Float, row, 1, width, out + first);
        if (first == 0) std::fill(out + p.inner, out + act_length, 0.0f);
        for (int64_t part = 0; pre_out != nullptr && part < parts; ++part)
          from_float(p.dtype, row + part * width, width,
                     pre_out + ((begin + r) * p.up_rows + part * p.inner + first) * size_of(p.dtype));
      }
    }
  }
}

// Columns first .. first + width - 1 of y.
void down_columns(const Mlp& p, int64_t first, int64_t width, const float* act, char* y, Scratch& scratch) {
  const int64_t act_length = padded_length(p.inner), block = block_rows(p.inner);
  float* down = scratch.rows.fit<float>(p.slots * width * sizeof(float));
  std::vector<const void*> row(p.slots, nullptr);
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t end = p.offsets[e + 1];
    if (p.offsets[e] == end) continue;
    const Panel panel = panel_for(
        end - p.offsets[e], panel_of(p.w_down, p.b_down, e * p.hidden + first, width, p.inner), scratch.weights[0]);
    for (int64_t begin = p.offsets[e]; begin < end; begin += block)
      multiply(panel, act + begin * act_length, std::min(block, end - begin), down + begin * width, width);
    for (int64_t m = p.offsets[e]; m < end; ++m) row[m] = down + m * width;
  }
  combine_tokens(p, ScalarType::Float, row.data(), pointer<float>(p.weights), width, y + first * size_of(p.dtype),
                 p.hidden, 0, p.tokens);
}

// Calls body(first, width, scratch) for panels of `columns`, each of which has `length` weights per expert: equally
// wide ones, and equally many for each thread; a single one where no expert has several blocks of rows.
template <class Body>
void for_panels(const Mlp& p, int64_t columns, int64_t length, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads(), units = (columns + 15) / 16;
  int64_t most = 0;
  for (int64_t e = 0; e < p.experts; ++e) most = std::max<int64_t>(most, p.offsets[e + 1] - p.offsets[e]);
  const int64_t bytes = most <= block_rows(length) ? 0 : columns * length * sizeof(float);
  const int64_t panels = std::min(units, (bytes / (kPanelBytes * threads) + 1) * threads);
  // The same ones for a thread in each call: its cache may still have their weights.
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = units * i / panels * 16, last = std::min(units * (i + 1) / panels * 16, columns);
      body(first, last - first, scratch);
    }
  });
}

}  // namespace

UNIF2ACE_MULTIVERSION(dots, dots_body,
                      (ScalarType dtype, const void* w, const void* bias, int64_t count, int64_t length, const float* x,
                       int64_t rows, float* out, int64_t out_stride),
                      (dtype, w, bias, count, length, x, rows, out, out_stride))

// Microseconds of the forward pass this way / by tiles, on two Zen 5 cores, top 4 of 16 experts:
//   rows per expert          4          8            16           24           32           48
//   512 x 256, float32       141 / 666  229 / 718    396 / 870    578 / 1074   748 / 1219   1089 / 1515
//   512 x 256, bfloat16      184 / 443  330 / 480    515 / 546    649 / 654    818 / 746    1139 / 863
//   2048 x 512, float32                 3038 / 5765  4806 / 6653  6483 / 8134  8187 / 9070  11637 / 11119
//   2048 x 512, bfloat16                2579 / 3075  5056 / 3592  7781 / 4387
// The grouped GEMM alone tips earlier: at 24 rows 3818 / 3616 for 512 x 2048 in float32, 809 / 516 for 512 x 256 in
// float16.
bool is_few(ScalarType dtype, int64_t rows, int64_t experts) {
  return rows <= (dtype == ScalarType::BFloat16 ? 8 : 16) * experts;
}

void forward_few(const Mlp& p, void* y, void* pre) {
  Buffer memory;
  float* act = memory.fit<float>(p.slots * padded_length(p.inner) * sizeof(float));
  for_panels(p, p.inner, p.hidden * (is_gated(p.activation) ? 2 : 1),
             [&](int64_t first, int64_t width, Scratch& scratch) {
               up_columns(p, first, width, act, static_cast<char*>(pre), scratch);
             });
  for_panels(p, p.hidden, p.inner, [&](int64_t first, int64_t width, Scratch& scratch) {
    down_columns(p, first, width, act, static_cast<char*>(y), scratch);
  });
}

}  // namespace unif2ace::experts
