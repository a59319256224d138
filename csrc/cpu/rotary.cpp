// Native CPU kernels of the op `rotary`: LayerNorm over each head and rotary embedding, in one pass, and its gradient.
//
// Semantics: unif2ace/ops/rotary.py. A head is short (32 or 64 numbers), so it stays in the first-level cache as
// float32 from its load to its store; the sums over a head run over 16 lanes, whatever the width of the vectors, and
// gradients of weight and bias are summed per chunk of tokens, then chunk by chunk: the same bits for any number of
// threads and any instruction set.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace unif2ace::rotary {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kChunk = 64;  // tokens: fixed, so that sums do not depend on the number of threads

struct Heads {
  const void* data;
  int64_t stride_token, stride_head;  // elements; a head's dimensions are contiguous
};

struct Problem {
  ScalarType dtype;
  int64_t tokens, heads;
  int dim, wide, half;  // wide: dim rounded up to whole lanes; half: r
  float eps;
  Heads x, grad;  // grad: of the result, in backward
  const void *weight, *bias, *cos, *sin;
  void* out;            // result, or gradient of x: [tokens, heads, dim], contiguous
  float* chunk_weight;  // [chunks, wide]: gradients of this chunk's tokens
  float* chunk_bias;
};

// Working memory of one thread: rows of `wide` floats.
struct Scratch {
  std::vector<float> floats;
  float *weight, *bias, *x, *grad, *cos, *sin;

  explicit Scratch(const Problem& a) : floats(6 * a.wide) {
    weight = floats.data();
    bias = weight + a.wide;
    x = bias + a.wide;
    grad = x + a.wide;
    cos = grad + a.wide;
    sin = cos + a.wide;
  }
};

// n numbers as float32, zeros behind them up to whole lanes.
template <class F, class T>
UNIF2ACE_INLINE void load_row(const T* from, int n, float* to) {
  int i = 0;
  for (; i + kWidth<F> <= n; i += kWidth<F>) store(to + i, load_floats<F>(from + i));
  if (i < n) store(to + i, load_some<F>(from + i, n - i)), i += kWidth<F>;
  for (; i % kLanes != 0; i += kWidth<F>) store(to + i, F{});
}

template <class F>
UNIF2ACE_INLINE void load_row(ScalarType dtype, const void* from, int64_t at, int n, float* to) {
  if (dtype == ScalarType::Float)
    load_row<F>(static_cast<const float*>(from) + at, n, to);
  else if (dtype == ScalarType::BFloat16)
    load_row<F>(static_cast<const BFloat16*>(from) + at, n, to);
  else
    load_row<F>(static_cast<const Half*>(from) + at, n, to);
}

template <class F, class T>
UNIF2ACE_INLINE void store_row(const float* from, int n, T* to) {
  int i = 0;
  for (; i + kWidth<F> <= n; i += kWidth<F>) store_floats(to + i, load<F>(from + i));
  if (i < n) store_some(to + i, load<F>(from + i), n - i);
}

template <class F>
UNIF2ACE_INLINE void store_head(const Problem& a, int64_t token, int64_t head, const float* from) {
  const int64_t at = (token * a.heads + head) * a.dim;
  if (a.dtype == ScalarType::Float)
    store_row<F>(from, a.dim, static_cast<float*>(a.out) + at);
  else if (a.dtype == ScalarType::BFloat16)
    store_row<F>(from, a.dim, static_cast<BFloat16*>(a.out) + at);
  else
    store_row<F>(from, a.dim, static_cast<Half*>(a.out) + at);
}

// Sum over a row of term(i, x): lanes first, then across them in pairs.
template <class F, class Term>
UNIF2ACE_INLINE float sum_row(int wide, const Term& term) {
  constexpr int parts = kLanes / kWidth<F>;
  F sums[parts];
  for (int p = 0; p < parts; ++p) sums[p] = F{};
  for (int i = 0; i < wide; i += kLanes)
    for (int p = 0; p < parts; ++p) sums[p] += term(i + p * kWidth<F>);
  float lanes[kLanes];
  memcpy(lanes, sums, sizeof lanes);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  return lanes[0];
}

// One factor or a product of two, as terms of sum_row. (Not lambdas: those would not carry the instruction set.)
template <class F>
struct Row {
  const float* x;
  UNIF2ACE_INLINE F operator()(int i) const { return load<F>(x + i); }
};
template <class F>
struct Product {
  const float *x, *y;
  UNIF2ACE_INLINE F operator()(int i) const { return load<F>(x + i) * load<F>(y + i); }
};

// x -> (x - mean) / sqrt(var + eps) in place, zeros kept behind the head; returns 1 / sqrt(var + eps).
template <class F>
UNIF2ACE_INLINE float normalise(const Problem& a, float* x) {
  const float mean = sum_row<F>(a.wide, Row<F>{x}) / static_cast<float>(a.dim);
  for (int i = 0; i < a.wide; i += kWidth<F>) store(x + i, load<F>(x + i) - mean);
  for (int i = a.dim; i < a.wide; ++i) x[i] = 0.0f;
  const float variance = sum_row<F>(a.wide, Product<F>{x, x}) / static_cast<float>(a.dim);
  const float scale = 1.0f / __builtin_sqrtf(variance + a.eps);
  for (int i = 0; i < a.wide; i += kWidth<F>) store(x + i, load<F>(x + i) * scale);
  return scale;
}

// Turns the first 2 half dimensions by the angles; with `sign` -1 back.
UNIF2ACE_INLINE void rotate(float* x, const float* cos, const float* sin, int half, float sign) {
  float* second = x + half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = second[i], s = sign * sin[i];
    x[i] = a * cos[i] - b * s;
    second[i] = b * cos[i] + a * s;
  }
}

template <class F>
UNIF2ACE_INLINE void load_angles(const Problem& a, int64_t token, const Scratch& s) {
  load_row<F>(a.dtype, a.cos, token * a.half, a.half, s.cos);
  load_row<F>(a.dtype, a.sin, token * a.half, a.half, s.sin);
}

template <class F>
UNIF2ACE_INLINE void forward_body(const Problem& a, int64_t first, int64_t last, const Scratch& s) {
  load_row<F>(a.dtype, a.weight, 0, a.dim, s.weight);
  load_row<F>(a.dtype, a.bias, 0, a.dim, s.bias);
  for (int64_t token = first * kChunk; token < std::min(last * kChunk, a.tokens); ++token) {
    load_angles<F>(a, token, s);
    for (int64_t head = 0; head < a.heads; ++head) {
      load_row<F>(a.dtype, a.x.data, token * a.x.stride_token + head * a.x.stride_head, a.dim, s.x);
      normalise<F>(a, s.x);
      for (int i = 0; i < a.wide; i += kWidth<F>)
        store(s.x + i, load<F>(s.x + i) * load<F>(s.weight + i) + load<F>(s.bias + i));
      rotate(s.x, s.cos, s.sin, a.half, 1.0f);
      store_head<F>(a, token, head, s.x);
    }
  }
}

template <class F>
UNIF2ACE_INLINE void backward_body(const Problem& a, int64_t first, int64_t last, const Scratch& s) {
  load_row<F>(a.dtype, a.weight, 0, a.dim, s.weight);
  const float count = static_cast<float>(a.dim);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    float *sum_weight = a.chunk_weight + chunk * a.wide, *sum_bias = a.chunk_bias + chunk * a.wide;
    for (int64_t token = chunk * kChunk; token < std::min((chunk + 1) * kChunk, a.tokens); ++token) {
      load_angles<F>(a, token, s);
      for (int64_t head = 0; head < a.heads; ++head) {
        load_row<F>(a.dtype, a.x.data, token * a.x.stride_token + head * a.x.stride_head, a.dim, s.x);
        load_row<F>(a.dtype, a.grad.data, token * a.grad.stride_token + head * a.grad.stride_head, a.dim, s.grad);
        const float scale = normalise<F>(a, s.x);
        rotate(s.grad, s.cos, s.sin, a.half, -1.0f);
        for (int i = 0; i < a.wide; i += kWidth<F>) {
          const F g = load<F>(s.grad + i);
          store(sum_weight + i, load<F>(sum_weight + i) + g * load<F>(s.x + i));
          store(sum_bias + i, load<F>(sum_bias + i) + g);
          store(s.grad + i, g * load<F>(s.weight + i));
        }
        const float mean = sum_row<F>(a.wide, Row<F>{s.grad}) / count;
        const float slope = sum_row<F>(a.wide, Product<F>{s.grad, s.x}) / count;
        for (int i = 0; i < a.wide; i += kWidth<F>)
          store(s.x + i, (load<F>(s.grad + i) - mean - load<F>(s.x + i) * slope) * scale);
        store_head<F>(a, token, head, s.x);
      }
    }
  }
}

UNIF2ACE_MULTIVERSION(run_forward, forward_body, (const Problem& a, int64_t first, int64_t last, const Scratch& s),
                      (a, first, last, s))
UNIF2ACE_MULTIVERSION(run_backward, backward_body, (const Problem& a, int64_t first, int64_t last, const Scratch& s),
                      (a, first, last, s))

Tensor dense_heads(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : dense(x);
}

Heads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

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
    a.wide = (dim + kLanes - 1) / kLanes * kLanes;
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
  std::vector<float> row(a.wide);
  for (int i = 0; i < a.dim; ++i) {
    double sum = 0.0;
    for (size_t at = i; at < sums.size(); at += a.wide) sum += sums[at];
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
  std::vector<float> weights(arguments.chunks() * a.wide), biases(arguments.chunks() * a.wide);
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
