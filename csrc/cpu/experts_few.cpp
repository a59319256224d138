// The op `experts` for few rows per expert, as in decoding: bound by reading the weights.
//
// Each thread takes a range of output columns of *all* experts, so the cores are equally busy however the tokens fall,
// and reads its part of every used matrix once, in long runs. Two sweeps: up projection and activation, then down
// projection and the weighted sum over the choices of a token, for which a thread has all it needs in its own columns.
//
// Four rows of weights meet four token rows at a time: 16 sums in registers, 8 loads for 16 multiply-adds; further
// token rows find the four rows of weights in the first-level cache. The next four are prefetched: rows are too short
// for the processor to follow by itself (8 tokens, 16 experts of 2048 x 512 in bfloat16: 1.9 -> 1.2 ms, the speed of
// memory). bfloat16 and float16 are converted as they are loaded.
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
constexpr int64_t kBlockBytes = 24 << 10;

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

int64_t block_rows(int64_t length) {
  return std::max<int64_t>(kBlockBytes / (4 * padded_length(length)) / kTokenRows * kTokenRows, kTokenRows);
}

void padded_row(ScalarType dtype, const void* from, int64_t length, float* to) {
  to_float(dtype, from, length, to);
  std::fill(to + length, to + padded_length(length), 0.0f);
}

// ------------------------------------------------------------------------------------------------------- forward pass

constexpr int64_t kPanelBytes = 640 << 10;
constexpr int64_t kWideRows = 16;

// Rows of weights of one expert, and their biases.
struct Panel {
  ScalarType dtype;
  const void *w, *bias;
  int64_t count, length;
};

struct Scratch {
  Buffer w[2], bias[2], x, pre, values, down;
};

Panel panel_of(const Tensor& w, const std::optional<Tensor>& bias, int64_t row, int64_t count, int64_t length) {
  const ScalarType dtype = w.scalar_type();
  const auto element = [&](const Tensor& tensor, int64_t at) {
    return static_cast<const char*>(tensor.const_data_ptr()) + at * size_of(dtype);
  };
  return {dtype, element(w, row * length), bias ? element(*bias, row) : nullptr, count, length};
}

// The panel in float32.
Panel widened(const Panel& panel, Scratch& scratch, int64_t part) {
  const int64_t padded = padded_length(panel.length), size = size_of(panel.dtype);
  float* w = scratch.w[part].fit<float>(panel.count * padded * sizeof(float));
  for (int64_t j = 0; j < panel.count; ++j)
    padded_row(panel.dtype, static_cast<const char*>(panel.w) + j * panel.length * size, panel.length, w + j * padded);
  if (panel.bias == nullptr) return {ScalarType::Float, w, nullptr, panel.count, padded};
  float* bias = scratch.bias[part].fit<float>(panel.count * sizeof(float));
  to_float(panel.dtype, panel.bias, panel.count, bias);
  return {ScalarType::Float, w, bias, panel.count, padded};
}

Panel panel_for(int64_t rows, const Panel& panel, Scratch& scratch, int64_t part = 0) {
  return panel.dtype == ScalarType::Float || rows < kWideRows ? panel : widened(panel, scratch, part);
}

void multiply(const Panel& p, const float* x, int64_t rows, float* out, int64_t out_stride) {
  dots(p.dtype, p.w, p.bias, p.count, p.length, x, rows, out, out_stride);
}

// Columns first .. first + width - 1 of the activation of all rows -> act[slots, padded_length(inner)].
void up_columns(const Mlp& p, int64_t first, int64_t width, float* act, char* pre_out, Scratch& scratch) {
  const int64_t length = padded_length(p.hidden), act_length = padded_length(p.inner);
  const int64_t parts = is_gated(p.activation) ? 2 : 1, block = block_rows(p.hidden);
  const Rows source = p.rows_of(p.x);
  float* x = scratch.x.fit<float>(block * length * sizeof(float));
  float* pre = scratch.pre.fit<float>(block * parts * width * sizeof(float));
  float* values = scratch.values.fit<float>(block * width * sizeof(float));
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t end = p.offsets[e + 1];
    Panel panel[2];
    for (int64_t part = 0; part < parts && p.offsets[e] < end; ++part)
      panel[part] =
          panel_for(end - p.offsets[e],
                    panel_of(p.w_up, p.b_up, e * p.up_rows + part * p.inner + first, width, p.hidden), scratch, part);
    for (int64_t begin = p.offsets[e]; begin < end; begin += block) {
      const int64_t rows = std::min(block, end - begin);
      for (int64_t r = 0; r < rows; ++r) padded_row(p.dtype, source.row(begin + r), p.hidden, x + r * length);
      for (int64_t part = 0; part < parts; ++part) multiply(panel[part], x, rows, pre + part * width, parts * width);
      activate(p.activation, ScalarType::Float, pre, rows, width, values);
      for (int64_t r = 0; r < rows; ++r) {
        float* out = act + (begin + r) * act_length;
        std::copy_n(values + r * width, width, out + first);
        if (first == 0) std::fill(out + p.inner, out + act_length, 0.0f);
        for (int64_t part = 0; pre_out != nullptr && part < parts; ++part)
          from_float(p.dtype, pre + (r * parts + part) * width, width,
                     pre_out + ((begin + r) * p.up_rows + part * p.inner + first) * size_of(p.dtype));
      }
    }
  }
}

// Columns first .. first + width - 1 of y.
void down_columns(const Mlp& p, int64_t first, int64_t width, const float* act, char* y, Scratch& scratch) {
  const int64_t act_length = padded_length(p.inner), block = block_rows(p.inner);
  float* down = scratch.down.fit<float>(p.slots * width * sizeof(float));
  std::vector<const void*> row(p.slots, nullptr);
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t end = p.offsets[e + 1];
    if (p.offsets[e] == end) continue;
    const Panel panel =
        panel_for(end - p.offsets[e], panel_of(p.w_down, p.b_down, e * p.hidden + first, width, p.inner), scratch);
    for (int64_t begin = p.offsets[e]; begin < end; begin += block)
      multiply(panel, act + begin * act_length, std::min(block, end - begin), down + begin * width, width);
    for (int64_t m = p.offsets[e]; m < end; ++m) row[m] = down + m * width;
  }
  combine_tokens(p, ScalarType::Float, row.data(), pointer<float>(p.weights), width, y + first * size_of(p.dtype),
                 p.hidden, 0, p.tokens);
}

// Calls body(first, width, scratch) for panels of `columns`, whose rows of weights have `length` numbers.
template <class Body>
void for_panels(int64_t columns, int64_t length, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = (columns + 15) / 16;
  const int64_t wanted = (columns * length * 4 + kPanelBytes - 1) / kPanelBytes;
  const int64_t panels = std::min(blocks, (wanted + threads - 1) / threads * threads);
  run_tasks<Scratch>(panels, [&](int64_t i, Scratch& scratch) {
    const int64_t first = blocks * i / panels * 16, end = std::min(blocks * (i + 1) / panels * 16, columns);
    body(first, end - first, scratch);
  });
}

}  // namespace

UNIF2ACE_MULTIVERSION(dots, dots_body,
                      (ScalarType dtype, const void* w, const void* bias, int64_t count, int64_t length, const float* x,
                       int64_t rows, float* out, int64_t out_stride),
                      (dtype, w, bias, count, length, x, rows, out, out_stride))

// Microseconds of the forward pass this way / by tiles, on two Zen 5 cores, 16 experts of 512 x 256:
//   rows per expert   2          4          8          16          24           32
//   float32           173 / 734  245 / 900  477 / 937  878 / 1064  1228 / 1292  1690 / 1643
//   bfloat16          139 / 437  221 / 468  392 / 461  729 / 548   1196 / 653   1578 / 830
bool is_few(ScalarType dtype, int64_t rows, int64_t experts) {
  return rows <= (dtype == ScalarType::BFloat16 ? 8 : 16) * experts;
}

void forward_few(const Mlp& p, void* y, void* pre) {
  Buffer memory;
  float* act = memory.fit<float>(p.slots * padded_length(p.inner) * sizeof(float));
  for_panels(p.inner, p.hidden * (is_gated(p.activation) ? 2 : 1), [&](int64_t first, int64_t width, Scratch& scratch) {
    up_columns(p, first, width, act, static_cast<char*>(pre), scratch);
  });
  for_panels(p.hidden, p.inner, [&](int64_t first, int64_t width, Scratch& scratch) {
    down_columns(p, first, width, act, static_cast<char*>(y), scratch);
  });
}

}  // namespace unif2ace::experts
