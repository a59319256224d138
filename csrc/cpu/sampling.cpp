// Native CPU kernels of the op `sampling`: logits -> tokens and confidences. Semantics: unif2ace/ops/sampling.py.
//
// Rows are independent and shared out among the threads; what happens in a row is told in sampling_row.h.
#include <algorithm>
#include <tuple>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/sampling_row.h"
#include "cpu/tensors.h"

namespace unif2ace::sampling {
namespace {

// One integer each per row.
struct Places {
  IntegerColumn seeds, positions, steps;
};

// How rows are sampled.
struct Noise {
  float inverse_temperature;  // 0: no noise
  uint32_t stream;
};

struct Problem {
  Scores scores;
  int64_t columns;
  Noise noise;
  const Places& places;
  int64_t first_place;  // row 0 of the scores is this row of the places and the outputs
  int32_t* codes;
  float* confidence;
};

template <class F>
UNIF2ACE_INLINE void sample_rows_body(const Problem& p, int64_t begin, int64_t end) {
  alignas(64) float z[kSpan];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t place = p.first_place + r;
    const RowNoise<F> noise{PhiloxKeys<typename WideOf<F>::type>(static_cast<uint64_t>(p.places.seeds[place])),
                            static_cast<uint32_t>(p.places.positions[place]),
                            static_cast<uint32_t>(p.places.steps[place]), p.noise.stream};
    Row row;
    for (int64_t first = 0; first < p.columns; first += kSpan) {
      const int n = static_cast<int>(std::min<int64_t>(kSpan, p.columns - first));
      load_span<F>(p.scores, r, first, n, z);
      sample_span<F>(z, n, first, p.noise.inverse_temperature, noise, row);
    }
    p.codes[place] = row.code;
    p.confidence[place] = log_confidence(row);
  }
}

UNIF2ACE_MULTIVERSION(sample_rows, sample_rows_body, (const Problem& p, int64_t begin, int64_t end), (p, begin, end))

// Rows of one task hold at least this many logits: 30 us of work (0.9 ns per logit), well above the price of waking a
// thread. A single row stays on one thread: even 50 000 codes are 45 us.
constexpr int64_t kTaskLogits = 1 << 15;

void sample_parallel(const Problem& p, int64_t rows) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kTaskLogits / p.columns),
                              [&](int64_t begin, int64_t end) { sample_rows(p, begin, end); });
}

Noise make_noise(double temperature, int64_t stream) {
  return {temperature > 0.0 ? static_cast<float>(1.0 / temperature) : 0.0f, static_cast<uint32_t>(stream)};
}

Tensor dense_columns(const Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

const void* row_pointer(const Tensor& x, int64_t row) {
  const int64_t element = x.scalar_type() == ScalarType::Float ? 4 : 2;
  return static_cast<const char*>(x.const_data_ptr()) + row * x.stride(0) * element;
}

// 1 + w times `cond` minus w times `uncond`, or `cond` alone.
struct Guidance {
  bool on;
  float cond, uncond;

  Guidance(const std::optional<Tensor>& tensor, double w)
      : on(tensor && w != 0.0), cond(static_cast<float>(1.0 + w)), uncond(static_cast<float>(w)) {}
};

// The unconditional half, checked; null without guidance.
std::optional<Tensor> dense_uncond(const char* op, const char* name, const std::optional<Tensor>& uncond,
                                   const Tensor& cond, const Guidance& guidance) {
  if (!guidance.on) return std::nullopt;
  check(uncond->dim() == 2 && uncond->size(0) == cond.size(0) && uncond->size(1) == cond.size(1) &&
            uncond->scalar_type() == cond.scalar_type(),
        op, ": uncond_", name, " must have the shape and dtype of ", name);
  return dense_columns(*uncond);
}

Places make_places(const char* op, const Tensor& seeds, const Tensor& positions, const Tensor& steps, int64_t rows) {
  return {{op, "seeds", seeds, rows}, {op, "positions", positions, rows}, {op, "steps", steps, rows}};
}

using Result = std::tuple<Tensor, Tensor>;

Result sample_tokens(const Tensor& logits, const Tensor& seeds, const Tensor& positions, const Tensor& steps,
                     double temperature, std::optional<Tensor> uncond_logits, double w, int64_t stream) {
  const char* op = "sample_tokens";
  check_float(op, "logits", logits);
  check(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= INT32_MAX, op,
        ": logits must be [R, V] with V from 1 to 2^31 - 1");
  const int64_t rows = logits.size(0);
  const Guidance guidance(uncond_logits, w);
  const Tensor cond = dense_columns(logits);
  const std::optional<Tensor> uncond = dense_uncond(op, "logits", uncond_logits, logits, guidance);
  const Places places = make_places(op, seeds, positions, steps, rows);
  Tensor codes = empty_cpu<1>({rows}, aoti_torch_dtype_int32());
  Tensor confidence = empty_cpu<1>({rows}, aoti_torch_dtype_float32());
  const Scores scores{logits.scalar_type(), cond.const_data_ptr(),          uncond ? uncond->const_data_ptr() : nullptr,
                      cond.stride(0),       uncond ? uncond->stride(0) : 0, guidance.cond,
                      guidance.uncond};
  sample_parallel({scores, logits.size(1), make_noise(temperature, stream), places, 0, mutable_pointer<int32_t>(codes),
                   mutable_pointer<float>(confidence)},
                  rows);
  return {codes, confidence};
}

// ------------------------------------------------------------------------------------------------------- head_sample

// Guidance folded into rows begin .. end, rounded to Rounded, stored as Out.
template <class F, class In, class Rounded, class Out>
UNIF2ACE_INLINE void fold_as(const Scores& s, int64_t columns, int64_t begin, int64_t end, Out* out) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t i = 0; i < columns; i += kWidth<F>) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth<F>, columns - i));
      float z[kWidth<F>];
      Rounded rounded[kWidth<F>];
      load_as<F, In>(s, r, i, n, z);
      store_floats(rounded, load<F>(z));
      store_some<F>(out + r * columns + i, load_floats<F>(rounded), n);
    }
}

// What a product reads: float32 and bfloat16 as they are; float16 as float32 numbers, since oneDNN has no float16
// product on most processors. Float32 rounded to float16 is what such a product becomes.
template <class F>
UNIF2ACE_INLINE void fold_body(const Scores& s, ScalarType rounded, int64_t columns, int64_t begin, int64_t end,
                               void* out) {
  if (s.dtype == ScalarType::BFloat16)
    fold_as<F, BFloat16, BFloat16>(s, columns, begin, end, static_cast<BFloat16*>(out));
  else if (s.dtype == ScalarType::Half)
    fold_as<F, Half, Half>(s, columns, begin, end, static_cast<float*>(out));
  else if (rounded == ScalarType::Half)
    fold_as<F, float, Half>(s, columns, begin, end, static_cast<float*>(out));
  else
    fold_as<F, float, float>(s, columns, begin, end, static_cast<float*>(out));
}

UNIF2ACE_MULTIVERSION(fold, fold_body,
                      (const Scores& s, ScalarType rounded, int64_t columns, int64_t begin, int64_t end, void* out),
                      (s, rounded, columns, begin, end, out))

void fold_parallel(const Scores& s, ScalarType rounded, int64_t rows, int64_t columns, const Tensor& out) {
  void* data = const_cast<Tensor&>(out).mutable_data_ptr();
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kTaskLogits / columns),
                              [&](int64_t begin, int64_t end) { fold(s, rounded, columns, begin, end, data); });
}

// The matrix as a product wants it: float16 becomes float32.
Tensor product_operand(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Half) return dense(x);
  const int64_t rows = x.dim() == 2 ? x.size(0) : 1, columns = x.numel() / std::max<int64_t>(rows, 1);
  const Tensor source = dense(x);
  Tensor copy = x.dim() == 2 ? empty_cpu<2>({rows, columns}, aoti_torch_dtype_float32())
                             : empty_cpu<1>({columns}, aoti_torch_dtype_float32());
  fold_parallel({x.scalar_type(), source.const_data_ptr(), nullptr, columns, 0, 1.0f, 0.0f}, x.scalar_type(), rows,
                columns, copy);
  return copy;
}

// Logits of one chunk of rows, as in the reference: 2 MiB (bfloat16) or 4 MiB, which a third-level cache holds until
// the sampler has read them; and rows enough (128 of 8192) that the product rarely streams the weight.
constexpr int64_t kChunkLogits = 1 << 20;

Result head_sample(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& seeds,
                   const Tensor& positions, const Tensor& steps, double temperature,
                   std::optional<Tensor> uncond_hidden, double w, int64_t stream) {
  const char* op = "head_sample";
  check_float(op, "hidden", hidden);
  const ScalarType dtype = hidden.scalar_type();
  check(hidden.dim() == 2 && weight.dim() == 2 && weight.size(1) == hidden.size(1) && hidden.size(1) >= 1 &&
            weight.size(0) >= 1 && weight.size(0) <= INT32_MAX && weight.scalar_type() == dtype,
        op, ": hidden must be [R, H] and weight [V, H] of one dtype");
  const int64_t rows = hidden.size(0), inner = hidden.size(1), columns = weight.size(0);
  check(!bias || (bias->dim() == 1 && bias->size(0) == columns && bias->scalar_type() == dtype), op,
        ": bias must be [V] of the dtype of weight");
  const Guidance guidance(uncond_hidden, w);
  const Tensor cond = dense_columns(hidden);
  const std::optional<Tensor> uncond = dense_uncond(op, "hidden", uncond_hidden, hidden, guidance);
  const Places places = make_places(op, seeds, positions, steps, rows);
  Tensor codes = empty_cpu<1>({rows}, aoti_torch_dtype_int32());
  Tensor confidence = empty_cpu<1>({rows}, aoti_torch_dtype_float32());
  if (rows == 0) return {codes, confidence};

  const Tensor weight_c = product_operand(weight);
  const std::optional<Tensor> bias_c = bias ? std::optional<Tensor>(product_operand(*bias)) : std::nullopt;
  const ScalarType product_dtype = weight_c.scalar_type();
  const int64_t chunk = std::min(rows, std::max<int64_t>(2, kChunkLogits / columns));
  // At least two rows: the product of a single one sums in another order, and a row may not depend on its batch.
  const Tensor folded = empty_cpu<2>({std::max<int64_t>(chunk, 2), inner}, aoti_dtype(weight_c));
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t n = std::min(chunk, rows - first), product_rows = std::max<int64_t>(n, 2);
    Scores part{dtype,
                row_pointer(cond, first),
                uncond ? row_pointer(*uncond, first) : nullptr,
                n == 1 ? 0 : cond.stride(0),  // a single row twice
                uncond && n > 1 ? uncond->stride(0) : 0,
                guidance.cond,
                guidance.uncond};
    fold_parallel(part, dtype, product_rows, inner, folded);
    const Tensor logits = linear(matrix(folded.const_data_ptr(), product_rows, inner, inner, product_dtype), weight_c,
                                 bias_c ? &*bias_c : nullptr);
    const Scores scores{product_dtype, logits.const_data_ptr(), nullptr, logits.stride(0), 0, 1.0f, 0.0f};
    if (dtype == ScalarType::Half) fold_parallel(scores, dtype, n, columns, logits);
    sample_parallel({scores, columns, make_noise(temperature, stream), places, first, mutable_pointer<int32_t>(codes),
                     mutable_pointer<float>(confidence)},
                    n);
  }
  return {codes, confidence};
}

}  // namespace
}  // namespace unif2ace::sampling

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&unif2ace::sampling::sample_tokens));
  m.impl("head_sample", TORCH_BOX(&unif2ace::sampling::head_sample));
}
