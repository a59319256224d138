// Native CPU kernels of the op `sequence_mix`: every row becomes residual + s (a x + sum_j c_j S_j), backward included.
//
// Semantics: unif2ace/ops/sequence_mix.py. Both directions are bound by memory, so each reads every stream once and
// writes every result once:
//   forward   rows in parallel; a row in blocks of columns that stay in registers over the streams x, S_0, S_1, ..;
//   backward  rows in parallel; a row stream by stream, `out = factor * g` and `<in, g>` in one loop, while g stays in
//             the first-level cache. The dot products go to a table [R, 1 + J]; a second, tiny step sums them over the
//             rows of each sequence, in order and in double.
// A dot product runs in 16 fixed lanes: the same bits for any number of threads, any instruction set and any batch.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/convert.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"
#include "cpu/values.h"

namespace unif2ace::sequence_mix {
namespace {

constexpr int kBlock = 32;  // columns that a row mixes in registers: 2, 4 or 8 vectors
constexpr int kLanes = 16;  // partial sums of a dot product
// Elements of a stream below which another thread does not pay: waking it takes some 5 us, the time of 2^14 elements.
constexpr int64_t kGrain = 1 << 14;

// A matrix of the dtype of x: rows `stride` elements apart, columns side by side (copied where they are not).
struct Rows {
  Tensor owner;
  const char* data;
  int64_t stride;

  explicit Rows(const Tensor& tensor)
      : owner(tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor)),
        data(static_cast<const char*>(owner.const_data_ptr())),
        stride(owner.stride(0)) {}

  template <class T>
  UNIF2ACE_INLINE const T* row(int64_t r) const {
    return reinterpret_cast<const T*>(data) + r * stride;
  }
};

struct Problem {
  ScalarType dtype;
  int64_t rows, hidden, batch;
  std::vector<Rows> streams;    // x, S_0, S_1, ..
  std::vector<float> factors;   // [B, 1 + J]: a, c_0, c_1, ..
  std::vector<int64_t> offset;  // [B + 1]
  std::vector<int64_t> shift;   // [B]: row r of a sequence reads row r + shift of the features
  float layer_scale;

  int64_t count() const { return static_cast<int64_t>(streams.size()); }
  // The sequence that owns row r, or B for none.
  int64_t sequence_of(int64_t r) const {
    return std::upper_bound(offset.begin() + 1, offset.end(), r) - (offset.begin() + 1);
  }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, hidden)); }
};

struct Forward {
  Problem problem;
  std::optional<Rows> residual;
  void* out;  // [R, H]
};

struct Backward {
  Problem problem;
  Rows grad;
  std::vector<char*> out;  // for each stream [R, H]
  double* dots;            // [R, 1 + J]: <stream row, grad row>
};

// All of a vector, or its first n lanes.
template <bool whole, class F, class T>
UNIF2ACE_INLINE F load_lanes(const T* from, int n) {
  if constexpr (whole)
    return load_floats<F>(from);
  else
    return load_some<F>(from, n);
}

template <bool whole, class F, class T>
UNIF2ACE_INLINE void store_lanes(T* to, F x, int n) {
  if constexpr (whole)
    store_floats(to, x);
  else
    store_some(to, x, n);
}

// Columns c .. of a row, `in` of each stream: `vectors` whole vectors, or n columns of one.
template <class F, class T, int vectors, bool whole>
UNIF2ACE_INLINE void mix_columns(const Problem& a, const T* const* in, const float* factor, const T* residual, T* out,
                                 int64_t c, int n) {
  F total[vectors];
  for (int v = 0; v < vectors; ++v) total[v] = load_lanes<whole, F>(in[0] + c + v * kWidth<F>, n) * factor[0];
  for (int64_t j = 1; j < a.count(); ++j)
    for (int v = 0; v < vectors; ++v)
      total[v] = total[v] + load_lanes<whole, F>(in[j] + c + v * kWidth<F>, n) * factor[j];
  for (int v = 0; v < vectors; ++v) {
    total[v] = total[v] * a.layer_scale;
    if (residual != nullptr) total[v] = load_lanes<whole, F>(residual + c + v * kWidth<F>, n) + total[v];
    store_lanes<whole>(out + c + v * kWidth<F>, total[v], n);
  }
}

template <class F, class T>
UNIF2ACE_INLINE void forward_rows(const Forward& forward, int64_t begin, int64_t end) {
  const Problem& a = forward.problem;
  int64_t sequence = a.sequence_of(begin);
  std::vector<const T*> in(a.count());
  for (int64_t r = begin; r < end; ++r) {
    while (sequence < a.batch && r >= a.offset[sequence + 1]) ++sequence;
    T* out = static_cast<T*>(forward.out) + r * a.hidden;
    const T* residual = forward.residual ? forward.residual->row<T>(r) : nullptr;
    if (sequence == a.batch) {
      if (residual != nullptr)
        memcpy(out, residual, a.hidden * sizeof(T));
      else
        memset(static_cast<void*>(out), 0, a.hidden * sizeof(T));
      continue;
    }
    const float* factor = a.factors.data() + sequence * a.count();
    in[0] = a.streams[0].row<T>(r);
    for (int64_t j = 1; j < a.count(); ++j) in[j] = a.streams[j].row<T>(r + a.shift[sequence]);
    int64_t c = 0;
    for (; c + kBlock <= a.hidden; c += kBlock)
      mix_columns<F, T, kBlock / kWidth<F>, true>(a, in.data(), factor, residual, out, c, 0);
    for (; c + kWidth<F> <= a.hidden; c += kWidth<F>)
      mix_columns<F, T, 1, true>(a, in.data(), factor, residual, out, c, 0);
    if (c < a.hidden)
      mix_columns<F, T, 1, false>(a, in.data(), factor, residual, out, c, static_cast<int>(a.hidden - c));
  }
}

// out = factor * grad, returns <in, grad>.
template <class F, class T>
UNIF2ACE_INLINE double scale_and_dot(const T* grad, const T* in, float factor, T* out, int64_t n) {
  constexpr int vectors = kLanes / kWidth<F>;
  F sum[vectors] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (int v = 0; v < vectors; ++v) {
      const F g = load_floats<F>(grad + c + v * kWidth<F>);
      store_floats(out + c + v * kWidth<F>, g * factor);
      sum[v] += load_floats<F>(in + c + v * kWidth<F>) * g;
    }
  float lane[kLanes];
  for (int v = 0; v < vectors; ++v) store(lane + v * kWidth<F>, sum[v]);
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += lane[i];
  for (; c < n; ++c) {  // what is left of the row, in double: with few columns it is all there is
    const float g = static_cast<float>(grad[c]);
    out[c] = static_cast<T>(g * factor);
    total += static_cast<double>(static_cast<float>(in[c])) * g;
  }
  return total;
}

template <class F, class T>
UNIF2ACE_INLINE void backward_rows(const Backward& backward, int64_t begin, int64_t end) {
  const Problem& a = backward.problem;
  const int64_t count = a.count();
  int64_t sequence = a.sequence_of(begin);
  for (int64_t r = begin; r < end; ++r) {
    while (sequence < a.batch && r >= a.offset[sequence + 1]) ++sequence;
    for (int64_t j = 0; j < count; ++j) {
      T* out = reinterpret_cast<T*>(backward.out[j]) + r * a.hidden;
      if (sequence == a.batch)
        memset(static_cast<void*>(out), 0, a.hidden * sizeof(T));
      else
        backward.dots[r * count + j] = scale_and_dot<F>(backward.grad.row<T>(r), a.streams[j].row<T>(r),
                                                        a.layer_scale * a.factors[sequence * count + j], out, a.hidden);
    }
  }
}

template <class F>
UNIF2ACE_INLINE void forward_body(const Forward& a, int64_t begin, int64_t end) {
  if (a.problem.dtype == ScalarType::Float)
    forward_rows<F, float>(a, begin, end);
  else if (a.problem.dtype == ScalarType::BFloat16)
    forward_rows<F, BFloat16>(a, begin, end);
  else
    forward_rows<F, Half>(a, begin, end);
}

template <class F>
UNIF2ACE_INLINE void backward_body(const Backward& a, int64_t begin, int64_t end) {
  if (a.problem.dtype == ScalarType::Float)
    backward_rows<F, float>(a, begin, end);
  else if (a.problem.dtype == ScalarType::BFloat16)
    backward_rows<F, BFloat16>(a, begin, end);
  else
    backward_rows<F, Half>(a, begin, end);
}

UNIF2ACE_MULTIVERSION(run_forward, forward_body, (const Forward& a, int64_t begin, int64_t end), (a, begin, end))
UNIF2ACE_MULTIVERSION(run_backward, backward_body, (const Backward& a, int64_t begin, int64_t end), (a, begin, end))

Rows stream_like_x(const char* name, const Tensor& tensor, const Tensor& x, int64_t rows) {
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == x.size(1) &&
            tensor.scalar_type() == x.scalar_type(),
        "mix_sequences: ", name, " must have ", rows, " rows of the width and dtype of x");
  return Rows(tensor);
}

// Checks everything that memory safety hangs on.
Problem make_problem(const Tensor& x, const Tensor& scale, const std::vector<Tensor>& features,
                     const Tensor& coefficients, const Tensor& row_offsets, const std::optional<Tensor>& layer_scale,
                     const std::optional<Tensor>& feature_starts = std::nullopt) {
  check_float("mix_sequences", "x", x);
  check(x.dim() == 2, "mix_sequences: x must be [R, H], got ", x.dim(), " dimensions");
  const int64_t batch = scale.numel(), count = static_cast<int64_t>(features.size());
  check(scale.dim() == 1, "mix_sequences: scale must be [B], got ", scale.dim(), " dimensions");
  check(coefficients.dim() == 2 && coefficients.size(0) == batch && coefficients.size(1) == count,
        "mix_sequences: coefficients must be [", batch, ", ", count, "]");
  check(!layer_scale || layer_scale->numel() == 1, "mix_sequences: layer_scale must be one number");

  Problem problem{x.scalar_type(), x.size(0), x.size(1), batch, {}, {}, {}, {}, 1.0f};
  problem.streams.emplace_back(x);
  const int64_t feature_rows = feature_starts && count > 0 ? features[0].size(0) : problem.rows;
  for (const Tensor& feature : features) problem.streams.push_back(stream_like_x("features", feature, x, feature_rows));
  const std::vector<float> a = read_floats("mix_sequences", "scale", scale);
  const std::vector<float> c = read_floats("mix_sequences", "coefficients", coefficients);
  for (int64_t b = 0; b < batch; ++b) {
    problem.factors.push_back(a[b]);
    problem.factors.insert(problem.factors.end(), c.begin() + b * count, c.begin() + (b + 1) * count);
  }
  if (layer_scale) problem.layer_scale = read_floats("mix_sequences", "layer_scale", *layer_scale)[0];

  const Tensor offsets = argument("mix_sequences", "row_offsets", row_offsets, ScalarType::Int, batch + 1);
  problem.offset.assign(pointer<int32_t>(offsets), pointer<int32_t>(offsets) + batch + 1);
  check(problem.offset[0] == 0 && std::is_sorted(problem.offset.begin(), problem.offset.end()) &&
            problem.offset[batch] <= problem.rows,
        "mix_sequences: row_offsets must not decrease, from 0 to at most ", problem.rows, " rows");

  problem.shift.assign(batch, 0);
  if (feature_starts && count > 0) {
    const Tensor starts = argument("mix_sequences", "feature_starts", *feature_starts, ScalarType::Int, batch);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t start = pointer<int32_t>(starts)[b], length = problem.offset[b + 1] - problem.offset[b];
      check(start >= 0 && start + length <= feature_rows, "mix_sequences: feature_starts and lengths must stay within ",
            feature_rows, " rows, got ", start, " and ", length);
      problem.shift[b] = start - problem.offset[b];
    }
  }
  return problem;
}

Tensor mix_sequences(const Tensor& x, const Tensor& scale, std::vector<Tensor> features, const Tensor& coefficients,
                     const Tensor& row_offsets, std::optional<Tensor> residual, std::optional<Tensor> layer_scale,
                     std::optional<Tensor> feature_starts) {
  Forward a{make_problem(x, scale, features, coefficients, row_offsets, layer_scale, feature_starts), std::nullopt,
            nullptr};
  if (residual) a.residual = stream_like_x("residual", *residual, x, x.size(0));
  Tensor out = empty_large<2>({a.problem.rows, a.problem.hidden}, aoti_dtype(x));
  a.out = out.mutable_data_ptr();
  torch::stable::parallel_for(0, a.problem.rows, a.problem.grain(),
                              [&](int64_t begin, int64_t end) { run_forward(a, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix_sequences_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, std::vector<Tensor> features, const Tensor& coefficients,
    const Tensor& row_offsets, std::optional<Tensor> layer_scale) {
  Backward a{make_problem(x, scale, features, coefficients, row_offsets, layer_scale),
             stream_like_x("grad", grad, x, x.size(0)),
             {},
             nullptr};
  const Problem& problem = a.problem;
  const int64_t rows = problem.rows, hidden = problem.hidden, count = problem.count();
  Tensor grad_x = empty_large<2>({rows, hidden}, aoti_dtype(x));
  Tensor grad_features = empty_large<3>({count - 1, rows, hidden}, aoti_dtype(x));
  a.out.push_back(mutable_pointer<char>(grad_x));
  for (int64_t j = 1; j < count; ++j)
    a.out.push_back(mutable_pointer<char>(grad_features) +
                    (j - 1) * rows * hidden * static_cast<int64_t>(grad_x.element_size()));
  std::vector<double> dots(rows * count);
  a.dots = dots.data();
  torch::stable::parallel_for(0, rows, problem.grain(),
                              [&](int64_t begin, int64_t end) { run_backward(a, begin, end); });

  // d(factor) = s * sum of <stream, grad>; ds = sum of factor * <stream, grad>.
  std::vector<float> grad_scale, grad_coefficients;
  double grad_layer_scale = 0.0;
  std::vector<double> sums(count);
  for (int64_t b = 0; b < problem.batch; ++b) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t r = problem.offset[b]; r < problem.offset[b + 1]; ++r)
      for (int64_t j = 0; j < count; ++j) sums[j] += dots[r * count + j];
    for (int64_t j = 0; j < count; ++j) {
      (j == 0 ? grad_scale : grad_coefficients).push_back(static_cast<float>(problem.layer_scale * sums[j]));
      grad_layer_scale += problem.factors[b * count + j] * sums[j];
    }
  }
  return {grad_x, write_floats(grad_scale, scale), grad_features, write_floats(grad_coefficients, coefficients),
          layer_scale ? write_floats({static_cast<float>(grad_layer_scale)}, *layer_scale)
                      : empty_cpu<1>({0}, aoti_dtype(x))};
}

}  // namespace
}  // namespace unif2ace::sequence_mix

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("mix_sequences", TORCH_BOX(&unif2ace::sequence_mix::mix_sequences));
  m.impl("mix_sequences_backward", TORCH_BOX(&unif2ace::sequence_mix::mix_sequences_backward));
}
