// Native CPU kernels of the op `rotary`: LayerNorm over each head and rotary embedding, in one pass, and its gradient.
//
// Semantics: unif2ace/ops/rotary.py. A head is short (32 or 64 numbers), so the lanes run over *tokens*: one head of 16
// tokens is loaded, transposed to x[dimension][token], and every loop is "for each dimension, for all 16 tokens". No
// sums across lanes, the angles of 16 tokens serve all their heads, and a token's numbers depend on nothing else.
//
// Gradients of weight and bias are summed per lane and chunk of tokens, then chunk by chunk: the same bits for any
// number of threads and any instruction set.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/heads.h"
#include "cpu/isa.h"
#include "cpu/transpose.h"

namespace unif2ace::rotary {
namespace {

constexpr int64_t kChunk = 64;  // tokens: fixed, so that sums do not depend on the number of threads

struct Problem {
  ScalarType dtype;
  int64_t tokens, heads;
  int dim, half;  // half: r
  float eps;
  Heads x, grad;  // grad: of the result, in backward
  const void *weight, *bias, *cos, *sin;
  void* out;            // result, or gradient of x: [tokens, heads, dim], contiguous
  float* chunk_weight;  // [chunks, dim]: gradients of this chunk's tokens
  float* chunk_bias;
};

// Working memory of one thread. Tiles are [dimension][token], their dimensions padded to whole lanes.
struct Scratch {
  std::vector<float> floats;
  float *rows, *x, *grad, *cos, *sin, *sum_weight, *sum_bias, *weight, *bias;

  explicit Scratch(const Problem& a) {
    const int64_t wide = padded(a.dim), tile = wide * kLanes;
    floats.resize(7 * tile + 2 * wide);
    rows = floats.data();  // [token][dimension]
    x = rows + tile;
    grad = x + tile;
    cos = grad + tile;
    sin = cos + tile;
    sum_weight = sin + tile;
    sum_bias = sum_weight + tile;
    weight = sum_bias + tile;
    bias = weight + wide;
  }
};

// n numbers of each of 16 tokens, transposed. A short last tile repeats its last token; float32 numbers of whole tiles
// need no copy.
template <class F>
UNIF2ACE_INLINE void load_tile(ScalarType dtype, const void* from, int64_t at, int64_t stride, int64_t live, int n,
                               float* rows, float* to) {
  if (dtype == ScalarType::Float && live == kLanes && n % 4 == 0) {
    const float* first = static_cast<const float*>(from) + at;
    for (int l = 0; l < kLanes; l += 4) transpose_rows(first + l * stride, stride, n, to + l, kLanes);
    return;
  }
  const int64_t wide = padded(n);
  for (int64_t l = 0; l < kLanes; ++l)
    load_row<F>(dtype, from, at + std::min(l, live - 1) * stride, n, rows + l * wide);
  for (int l = 0; l < kLanes; l += 4) transpose_rows(rows + l * wide, wide, wide, to + l, kLanes);
}

// The way back, to the result.
template <class F>
UNIF2ACE_INLINE void store_tile(const Problem& a, int64_t token, int64_t live, int64_t head, const float* from,
                                float* rows) {
  const int64_t wide = padded(a.dim), stride = a.heads * a.dim, at = token * stride + head * a.dim;
  if (a.dtype == ScalarType::Float && live == kLanes && a.dim % 4 == 0) {
    float* first = static_cast<float*>(a.out) + at;
    for (int d = 0; d < a.dim; d += 4) transpose_rows(from + d * kLanes, kLanes, kLanes, first + d, stride);
    return;
  }
  for (int64_t d = 0; d < wide; d += 4) transpose_rows(from + d * kLanes, kLanes, kLanes, rows + d, wide);
  for (int64_t l = 0; l < live; ++l) store_row<F>(a.dtype, rows + l * wide, a.dim, a.out, at + l * stride);
}

// The functions below handle the F-wide part of a tile that starts at the given pointers.

// Square root lane by lane, which compilers turn into the instruction for vectors: it is exact everywhere.
template <class F>
UNIF2ACE_INLINE F inverse_root(F x) {
  float lanes[kWidth<F>];
  store(lanes, x);
  for (int l = 0; l < kWidth<F>; ++l) lanes[l] = __builtin_sqrtf(lanes[l]);
  return 1.0f / load<F>(lanes);
}

template <class F>
struct Statistics {
  F mean, scale;  // scale: 1 / sqrt(var + eps)
};

template <class F>
UNIF2ACE_INLINE Statistics<F> statistics(const Problem& a, const float* x) {
  const float count = static_cast<float>(a.dim);
  F sum{}, squares{};
  for (int d = 0; d < a.dim; ++d) sum += load<F>(x + d * kLanes);
  const F mean = sum / count;
  for (int d = 0; d < a.dim; ++d) {
    const F deviation = load<F>(x + d * kLanes) - mean;
    squares += deviation * deviation;
  }
  return {mean, inverse_root(squares / count + a.eps)};
}

// Dimension d without mean and variance.
template <class F>
UNIF2ACE_INLINE F normalised(const float* x, int d, const Statistics<F>& of) {
  return (load<F>(x + d * kLanes) - of.mean) * of.scale;
}

template <class F>
UNIF2ACE_INLINE void forward_part(const Problem& a, const Scratch& s, int lane) {
  float* x = s.x + lane;
  const Statistics<F> of = statistics<F>(a, x);
  for (int i = 0, j = a.half; i < a.half; ++i, ++j) {
    const F cos = load<F>(s.cos + i * kLanes + lane), sin = load<F>(s.sin + i * kLanes + lane);
    const F first = normalised<F>(x, i, of) * s.weight[i] + s.bias[i];
    const F second = normalised<F>(x, j, of) * s.weight[j] + s.bias[j];
    store(x + i * kLanes, first * cos - second * sin);
    store(x + j * kLanes, second * cos + first * sin);
  }
  for (int d = 2 * a.half; d < a.dim; ++d) store(x + d * kLanes, normalised<F>(x, d, of) * s.weight[d] + s.bias[d]);
}

// Turns the first 2 half dimensions of a gradient back.
template <class F>
UNIF2ACE_INLINE void rotate_back(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const F c = load<F>(cos + i * kLanes), s = load<F>(sin + i * kLanes);
    const F first = load<F>(x + i * kLanes), second = load<F>(x + (half + i) * kLanes);
    store(x + i * kLanes, first * c + second * s);
    store(x + (half + i) * kLanes, second * c - first * s);
  }
}

// Leaves the gradient of x in its place and adds to the sums; `counted` is 0 in lanes that repeat a token.
template <class F>
UNIF2ACE_INLINE void backward_part(const Problem& a, const Scratch& s, int lane, const float* counted) {
  const float count = static_cast<float>(a.dim);
  float *x = s.x + lane, *grad = s.grad + lane;
  const Statistics<F> of = statistics<F>(a, x);
  const F once = load<F>(counted + lane);
  rotate_back<F>(grad, s.cos + lane, s.sin + lane, a.half);
  F mean{}, slope{};
  for (int d = 0; d < a.dim; ++d) {
    const F g = load<F>(grad + d * kLanes), u = normalised<F>(x, d, of), v = g * s.weight[d];
    float *sum_weight = s.sum_weight + d * kLanes + lane, *sum_bias = s.sum_bias + d * kLanes + lane;
    store(sum_weight, load<F>(sum_weight) + g * u * once);
    store(sum_bias, load<F>(sum_bias) + g * once);
    store(grad + d * kLanes, v);
    mean += v;
    slope += v * u;
  }
  mean = mean / count;
  slope = slope / count;
  for (int d = 0; d < a.dim; ++d) {
    const F u = normalised<F>(x, d, of);
    store(x + d * kLanes, (load<F>(grad + d * kLanes) - mean - u * slope) * of.scale);
  }
}

template <class F>
UNIF2ACE_INLINE void load_angles(const Problem& a, int64_t token, int64_t live, const Scratch& s) {
  load_tile<F>(a.dtype, a.cos, token * a.half, a.half, live, a.half, s.rows, s.cos);
  load_tile<F>(a.dtype, a.sin, token * a.half, a.half, live, a.half, s.rows, s.sin);
}

template <class F>
UNIF2ACE_INLINE void load_heads(const Problem& a, const Heads& heads, int64_t token, int64_t live, int64_t head,
                                const Scratch& s, float* to) {
  load_tile<F>(a.dtype, heads.data, heads.at(token, head), heads.stride_token, live, a.dim, s.rows, to);
}

template <class F>
UNIF2ACE_INLINE void forward_body(const Problem& a, int64_t first, int64_t last, const Scratch& s) {
  load_row<F>(a.dtype, a.weight, 0, a.dim, s.weight);
  load_row<F>(a.dtype, a.bias, 0, a.dim, s.bias);
  const int64_t end = std::min(last * kChunk, a.tokens);
  for (int64_t token = first * kChunk; token < end; token += kLanes) {
    const int64_t live = std::min<int64_t>(kLanes, end - token);
    load_angles<F>(a, token, live, s);
    for (int64_t head = 0; head < a.heads; ++head) {
      load_heads<F>(a, a.x, token, live, head, s, s.x);
      for (int lane = 0; lane < kLanes; lane += kWidth<F>) forward_part<F>(a, s, lane);
      store_tile<F>(a, token, live, head, s.x, s.rows);
    }
  }
}

template <class F>
UNIF2ACE_INLINE void backward_body(const Problem& a, int64_t first, int64_t last, const Scratch& s) {
  load_row<F>(a.dtype, a.weight, 0, a.dim, s.weight);
  float counted[kLanes];
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t end = std::min((chunk + 1) * kChunk, a.tokens);
    for (int i = 0; i < a.dim * kLanes; ++i) s.sum_weight[i] = s.sum_bias[i] = 0.0f;
    for (int64_t token = chunk * kChunk; token < end; token += kLanes) {
      const int64_t live = std::min<int64_t>(kLanes, end - token);
      for (int l = 0; l < kLanes; ++l) counted[l] = l < live ? 1.0f : 0.0f;
      load_angles<F>(a, token, live, s);
      for (int64_t head = 0; head < a.heads; ++head) {
        load_heads<F>(a, a.x, token, live, head, s, s.x);
        load_heads<F>(a, a.grad, token, live, head, s, s.grad);
        for (int lane = 0; lane < kLanes; lane += kWidth<F>) backward_part<F>(a, s, lane, counted);
        store_tile<F>(a, token, live, head, s.x, s.rows);
      }
    }
    for (int d = 0; d < a.dim; ++d) {
      float weight = 0.0f, bias = 0.0f;
      for (int l = 0; l < kLanes; ++l) weight += s.sum_weight[d * kLanes + l], bias += s.sum_bias[d * kLanes + l];
      a.chunk_weight[chunk * a.dim + d] = weight;
      a.chunk_bias[chunk * a.dim + d] = bias;
    }
  }
}

UNIF2ACE_MULTIVERSION(run_forward, forward_body, (const Problem& a, int64_t first, int64_t last, const Scratch& s),
                      (a, first, last, s))
UNIF2ACE_MULTIVERSION(run_backward, backward_body, (const Problem& a, int64_t first, int64_t last, const Scratch& s),
                      (a, first, last, s))

// The arguments of both directions, checked; contiguous copies live as long as this does.
struct Arguments {
  Tensor x, weight, bias, cos, sin;

  Arguments(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, const Tensor& cos_, const Tensor& sin_)
      : x(x_), weight(weight_), bias(bias_), cos(cos_), sin(sin_) {
    check_float("rotate_heads", "x", x);
    check(x.dim() == 3 && x.size(2) >= 1, "rotate_heads: x must be [T, heads, dim >= 1]");
    check(cos.dim() == 2 && 2 * cos.size(1) <= x.size(2), "rotate_heads: cos must be [T, r], 2 r <= dim");
    const ScalarType dtype = x.scalar_type();
    const int64_t angles = x.size(0) * cos.size(1);
    x = dense_heads(x);
    weight = argument("rotate_heads", "weight", weight, dtype, x.size(2));
    bias = argument("rotate_heads", "bias", bias, dtype, x.size(2));
    cos = argument("rotate_heads", "cos", cos, dtype, angles);
    sin = argument("rotate_heads", "sin", sin, dtype, angles);
  }

  Problem problem(double eps, void* out) const {
    const int dim = static_cast<int>(x.size(2));
    Problem a{};
    a.dtype = x.scalar_type();
    a.tokens = x.size(0);
    a.heads = x.size(1);
    a.dim = dim;
    a.half = static_cast<int>(cos.size(1));
    a.eps = static_cast<float>(eps);
    a.x = heads_of(x);
    a.weight = weight.const_data_ptr();
    a.bias = bias.const_data_ptr();
    a.cos = cos.const_data_ptr();
    a.sin = sin.const_data_ptr();
    a.out = out;
    return a;
  }

  int64_t chunks() const { return (x.size(0) + kChunk - 1) / kChunk; }
};

Tensor rotate_heads(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& cos, const Tensor& sin,
                    double eps) {
  const Arguments arguments(x, weight, bias, cos, sin);
  Tensor out = empty_cpu<3>({x.size(0), x.size(1), x.size(2)}, aoti_dtype(x));
  const Problem a = arguments.problem(eps, out.mutable_data_ptr());
  torch::stable::parallel_for(0, arguments.chunks(), 1,
                              [&](int64_t begin, int64_t end) { run_forward(a, begin, end, Scratch(a)); });
  return out;
}

// Adds the chunks up, in order, as float64; the result takes the dtype of the parameter.
Tensor sum_chunks(const std::vector<float>& sums, const Problem& a) {
  std::vector<float> row(a.dim);
  for (int i = 0; i < a.dim; ++i) {
    double sum = 0.0;
    for (size_t at = i; at < sums.size(); at += a.dim) sum += sums[at];
    row[i] = static_cast<float>(sum);
  }
  const Tensor total = torch::stable::from_blob(
      row.data(), {a.dim}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
  return a.dtype == ScalarType::Float ? torch::stable::clone(total) : torch::stable::to(total, a.dtype);
}

std::tuple<Tensor, Tensor, Tensor> rotate_heads_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                         const Tensor& bias, const Tensor& cos, const Tensor& sin,
                                                         double eps) {
  const Arguments arguments(x, weight, bias, cos, sin);
  check(grad.scalar_type() == x.scalar_type() && grad.dim() == 3 && grad.size(0) == x.size(0) &&
            grad.size(1) == x.size(1) && grad.size(2) == x.size(2),
        "rotate_heads: the gradient must have the shape and dtype of x");
  const Tensor grad_dense = dense_heads(grad);
  Tensor grad_x = empty_cpu<3>({x.size(0), x.size(1), x.size(2)}, aoti_dtype(x));
  Problem a = arguments.problem(eps, grad_x.mutable_data_ptr());
  a.grad = heads_of(grad_dense);
  std::vector<float> weights(arguments.chunks() * a.dim), biases(arguments.chunks() * a.dim);
  a.chunk_weight = weights.data();
  a.chunk_bias = biases.data();
  torch::stable::parallel_for(0, arguments.chunks(), 1,
                              [&](int64_t begin, int64_t end) { run_backward(a, begin, end, Scratch(a)); });
  return {grad_x, sum_chunks(weights, a), sum_chunks(biases, a)};
}

}  // namespace
}  // namespace unif2ace::rotary

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("rotate_heads", TORCH_BOX(&unif2ace::rotary::rotate_heads));
  m.impl("rotate_heads_backward", TORCH_BOX(&unif2ace::rotary::rotate_heads_backward));
}
