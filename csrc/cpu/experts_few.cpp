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
#include "cpu/isa.h"
#include "cpu/lanes16.h"

namespace unif2ace::experts {
namespace {

constexpr int kWeightRows = 4;  // 16 sums, 4 weights and a value fill the 32 registers of AVX-512 without spilling
constexpr int kTokenRows = 4;

// `left` elements from here on, at most 16. A constant in the loop over whole vectors.
template <class F, class D, int J, int R>
UNIF2ACE_INLINE void dot_step(const D* w, int64_t length, const float* x, int64_t x_stride, Lanes16<F> (&sum)[J][R],
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
      for (int j = 0; j < J; ++j) sum[j][r].part[part] += weight[j] * value;
    }
  }
}

template <class F, class D, int J, int R>
UNIF2ACE_INLINE void dot_block(const D* w, int64_t length, const float* x, int64_t x_stride, const float* bias,
                               float* out, int64_t out_stride) {
  Lanes16<F> sum[J][R];
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) dot_step<F, D, J, R>(w + i, length, x + i, x_stride, sum, 16);
  if (i < length) dot_step<F, D, J, R>(w + i, length, x + i, x_stride, sum, length - i);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) out[r * out_stride + j] = sum[j][r].sum() + bias[j];
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

// Element `at` of an optional tensor.
const void* element(const std::optional<Tensor>& tensor, int64_t at) {
  if (!tensor) return nullptr;
  return static_cast<const char*>(tensor->const_data_ptr()) + at * size_of(tensor->scalar_type());
}

const void* element(const Tensor& tensor, int64_t at) {
  return static_cast<const char*>(tensor.const_data_ptr()) + at * size_of(tensor.scalar_type());
}

// Columns first .. first + width - 1 of the activation of all rows -> act[slots, padded_length(inner)].
void up_columns(const Mlp& p, int64_t first, int64_t width, float* act, char* pre_out) {
  const int64_t length = padded_length(p.hidden), act_length = padded_length(p.inner);
  const int parts = is_gated(p.activation) ? 2 : 1;
  const Rows source = p.rows_of(p.x);
  std::vector<float> x, pre, values;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t begin = p.offsets[e], rows = p.offsets[e + 1] - begin;
    if (rows == 0) continue;
    x.assign(rows * length, 0.0f);
    pre.resize(rows * parts * width);
    values.resize(rows * width);
    for (int64_t r = 0; r < rows; ++r) to_float(p.dtype, source.row(begin + r), p.hidden, x.data() + r * length);
    for (int part = 0; part < parts; ++part) {
      const int64_t row = e * p.up_rows + part * p.inner + first;
      dots(p.dtype, element(p.w_up, row * p.hidden), element(p.b_up, row), width, p.hidden, x.data(), rows,
           pre.data() + part * width, parts * width);
    }
    activate(p.activation, ScalarType::Float, pre.data(), rows, width, values.data());
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(values.data() + r * width, width, act + (begin + r) * act_length + first);
      for (int part = 0; pre_out != nullptr && part < parts; ++part)
        from_float(p.dtype, pre.data() + (r * parts + part) * width, width,
                   pre_out + ((begin + r) * p.up_rows + part * p.inner + first) * size_of(p.dtype));
    }
  }
}

// Columns first .. first + width - 1 of y.
void down_columns(const Mlp& p, int64_t first, int64_t width, const float* act, char* y) {
  std::vector<float> down(p.slots * width);
  std::vector<const void*> row(p.slots, nullptr);
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t begin = p.offsets[e], rows = p.offsets[e + 1] - begin, at = e * p.hidden + first;
    if (rows == 0) continue;
    dots(p.dtype, element(p.w_down, at * p.inner), element(p.b_down, at), width, p.inner,
         act + begin * padded_length(p.inner), rows, down.data() + begin * width, width);
    for (int64_t m = begin; m < begin + rows; ++m) row[m] = down.data() + m * width;
  }
  combine_tokens(p, ScalarType::Float, row.data(), pointer<float>(p.weights), width, y + first * size_of(p.dtype),
                 p.hidden, 0, p.tokens);
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
  std::vector<float> act(p.slots * padded_length(p.inner));
  const auto blocks = [](int64_t columns) { return (columns + 15) / 16; };
  torch::stable::parallel_for(0, blocks(p.inner), 1, [&](int64_t begin, int64_t end) {
    up_columns(p, begin * 16, std::min(end * 16, p.inner) - begin * 16, act.data(), static_cast<char*>(pre));
  });
  torch::stable::parallel_for(0, blocks(p.hidden), 1, [&](int64_t begin, int64_t end) {
    down_columns(p, begin * 16, std::min(end * 16, p.hidden) - begin * 16, act.data(), static_cast<char*>(y));
  });
}

}  // namespace unif2ace::experts
