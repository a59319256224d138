// See experts_rows.h.
#include "cpu/experts_rows.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lanes16.h"

namespace unif2ace::experts {
namespace {

// ---------------------------------------------------------------------------------------------------- conversion

template <class F, class From, class To>
UNIF2ACE_INLINE void convert(const From* from, int64_t n, To* to) {
  int64_t i = 0;
  for (; i + kWidth<F> <= n; i += kWidth<F>) store_floats(to + i, load_floats<F>(from + i));
  if (i < n) store_some(to + i, load_some<F>(from + i, n - i), n - i);
}

template <class F>
UNIF2ACE_INLINE void to_float_body(ScalarType dtype, const void* from, int64_t n, float* to) {
  if (dtype == ScalarType::Float)
    convert<F>(static_cast<const float*>(from), n, to);
  else if (dtype == ScalarType::BFloat16)
    convert<F>(static_cast<const BFloat16*>(from), n, to);
  else
    convert<F>(static_cast<const Half*>(from), n, to);
}

template <class F>
UNIF2ACE_INLINE void from_float_body(ScalarType dtype, const float* from, int64_t n, void* to) {
  if (dtype == ScalarType::Float)
    convert<F>(from, n, static_cast<float*>(to));
  else if (dtype == ScalarType::BFloat16)
    convert<F>(from, n, static_cast<BFloat16*>(to));
  else
    convert<F>(from, n, static_cast<Half*>(to));
}

// -------------------------------------------------------------------------------------------------- transposition

// Up to 16 rows -> to[column][0 .. high), zeros behind the `live` rows there are. The rows are read along, a column of
// the result is written 16 elements (a cache line of float32) at a time.
template <class Element>
void transpose_strip(const void* const* rows, int64_t live, int64_t high, int64_t columns, Element* to,
                     int64_t stride) {
  const Element* row[16];
  for (int64_t i = 0; i < live; ++i) row[i] = static_cast<const Element*>(rows[i]);
  if (live == 16) {
    for (int64_t c = 0; c < columns; ++c)
      for (int i = 0; i < 16; ++i) to[c * stride + i] = row[i][c];
    return;
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t i = 0; i < high; ++i) to[c * stride + i] = i < live ? row[i][c] : Element(0);
}

// ----------------------------------------------------------------------------------------------------- activation

// In this file a loop over a row is split: `step` for whole vectors, where `left` is a constant and the tests of
// load_part fold away, then once for the rest. With the rest inside the loop its calls of memcpy would keep the
// constants of the polynomials out of the registers (measured: 1.6 times the time).
template <class F, Activation activation, class C>
UNIF2ACE_INLINE void activate_step(const C* pre, int64_t inner, C* act, int64_t left) {
  F a = curve<activation>(load_part<F>(pre, left)).value;
  if constexpr (is_gated(activation)) a = a * load_part<F>(pre + inner, left);
  store_part(act, a, left);
}

template <class F, Activation activation, class C>
UNIF2ACE_INLINE void activate_rows(const C* pre, int64_t rows, int64_t inner, C* act) {
  constexpr bool gated = is_gated(activation);
  if (!gated) {  // one long row: the rows are contiguous on both sides
    inner *= rows;
    rows = std::min<int64_t>(rows, 1);
  }
  for (int64_t r = 0; r < rows; ++r, pre += (gated ? 2 : 1) * inner, act += inner) {
    int64_t i = 0;
    for (; i + kWidth<F> <= inner; i += kWidth<F>) activate_step<F, activation>(pre + i, inner, act + i, kWidth<F>);
    if (i < inner) activate_step<F, activation>(pre + i, inner, act + i, inner - i);
  }
}

template <class F, Activation activation>
UNIF2ACE_INLINE void activate_in(ScalarType compute, const void* pre, int64_t rows, int64_t inner, void* act) {
  if (compute == ScalarType::BFloat16)
    activate_rows<F, activation>(static_cast<const BFloat16*>(pre), rows, inner, static_cast<BFloat16*>(act));
  else
    activate_rows<F, activation>(static_cast<const float*>(pre), rows, inner, static_cast<float*>(act));
}

template <class F>
UNIF2ACE_INLINE void activate_body(Activation activation, ScalarType compute, const void* pre, int64_t rows,
                                   int64_t inner, void* act) {
  switch (activation) {
    case Activation::gelu_tanh:
      return activate_in<F, Activation::gelu_tanh>(compute, pre, rows, inner, act);
    case Activation::gelu:
      return activate_in<F, Activation::gelu>(compute, pre, rows, inner, act);
    case Activation::silu:
      return activate_in<F, Activation::silu>(compute, pre, rows, inner, act);
    case Activation::relu2:
      return activate_in<F, Activation::relu2>(compute, pre, rows, inner, act);
    case Activation::swiglu:
      return activate_in<F, Activation::swiglu>(compute, pre, rows, inner, act);
    case Activation::geglu:
      return activate_in<F, Activation::geglu>(compute, pre, rows, inner, act);
  }
}

// `left` elements from here on, at most 16.
template <class F, Activation activation, class D, class C>
UNIF2ACE_INLINE void gradient_step(const D* pre, const C* grad, float weight, int64_t inner, C* act, C* grad_pre,
                                   Lanes16<F>& dot, int64_t left) {
  for (int part = 0; part < kParts<F>; ++part) {
    const int at = part * kWidth<F>;
    const int64_t rest = left - at;
    if (rest <= 0) break;
    const Curve<F> f = curve<activation>(load_part<F>(pre + at, rest));
    const F g = load_part<F>(grad + at, rest), weighted = g * weight;
    F value = f.value, through = weighted * f.slope;
    if constexpr (is_gated(activation)) {
      const F up = load_part<F>(pre + inner + at, rest), grad_up = weighted * f.value;
      value = value * up;
      through = through * up;
      store_part(grad_pre + inner + at, grad_up, rest);
    }
    dot.part[part] += g * value;
    store_part(act + at, value * weight, rest);
    store_part(grad_pre + at, through, rest);
  }
}

template <class F, Activation activation, class D, class C>
UNIF2ACE_INLINE void gradient_rows(const ActivationGradient& a) {
  const int64_t inner = a.inner, up_rows = (is_gated(activation) ? 2 : 1) * inner;
  for (int64_t r = 0; r < a.rows; ++r) {
    const D* pre = static_cast<const D*>(a.pre) + r * up_rows;
    const C* grad = static_cast<const C*>(a.grad_act) + r * inner;
    C *act = static_cast<C*>(a.act) + r * inner, *grad_pre = static_cast<C*>(a.grad_pre) + r * up_rows;
    Lanes16<F> dot;
    int64_t i = 0;
    for (; i + 16 <= inner; i += 16)
      gradient_step<F, activation>(pre + i, grad + i, a.weight[r], inner, act + i, grad_pre + i, dot, 16);
    if (i < inner)
      gradient_step<F, activation>(pre + i, grad + i, a.weight[r], inner, act + i, grad_pre + i, dot, inner - i);
    a.dot[r] = dot.sum();
  }
}

template <class F, Activation activation>
UNIF2ACE_INLINE void gradient_in(const ActivationGradient& a) {
  if (a.dtype == ScalarType::Float)
    gradient_rows<F, activation, float, float>(a);
  else if (a.dtype == ScalarType::BFloat16)
    gradient_rows<F, activation, BFloat16, BFloat16>(a);
  else
    gradient_rows<F, activation, Half, float>(a);
}

template <class F>
UNIF2ACE_INLINE void activation_gradient_body(const ActivationGradient& a) {
  switch (a.activation) {
    case Activation::gelu_tanh:
      return gradient_in<F, Activation::gelu_tanh>(a);
    case Activation::gelu:
      return gradient_in<F, Activation::gelu>(a);
    case Activation::silu:
      return gradient_in<F, Activation::silu>(a);
    case Activation::relu2:
      return gradient_in<F, Activation::relu2>(a);
    case Activation::swiglu:
      return gradient_in<F, Activation::swiglu>(a);
    case Activation::geglu:
      return gradient_in<F, Activation::geglu>(a);
  }
}

// ----------------------------------------------------------------------------------------------------------- sums

// Eight rows are summed before they join the total: fewer roundings at full size, fewer passes over the total.
template <class F, class C>
UNIF2ACE_INLINE void weighted_step(const C* from, int64_t rows, int64_t width, const float* weight, float* sums,
                                   int64_t left) {
  F sum = splat<F>(0.0f);
  for (int64_t r = 0; r < rows; ++r)
    sum += load_part<F>(from + r * width, left) * (weight == nullptr ? 1.0f : weight[r]);
  store_part(sums, load_part<F>(sums, left) + sum, left);
}

template <class F, class C>
UNIF2ACE_INLINE void weighted_rows(const C* from, int64_t rows, int64_t width, const float* weight, float* sums) {
  std::fill_n(sums, width, 0.0f);
  for (int64_t r = 0; r < rows; r += 8) {
    const int64_t high = std::min<int64_t>(rows - r, 8);
    const C* row = from + r * width;
    const float* factor = weight == nullptr ? nullptr : weight + r;
    int64_t i = 0;
    for (; i + kWidth<F> <= width; i += kWidth<F>) weighted_step<F>(row + i, high, width, factor, sums + i, kWidth<F>);
    if (i < width) weighted_step<F>(row + i, high, width, factor, sums + i, width - i);
  }
}

template <class F>
UNIF2ACE_INLINE void weighted_sum_body(ScalarType compute, const void* from, int64_t rows, int64_t width,
                                       const float* weight, float* sums) {
  if (compute == ScalarType::BFloat16)
    weighted_rows<F>(static_cast<const BFloat16*>(from), rows, width, weight, sums);
  else
    weighted_rows<F>(static_cast<const float*>(from), rows, width, weight, sums);
}

template <class F, class C>
UNIF2ACE_INLINE void dot_step(const C* from, const float* vector, Lanes16<F>& sum, int64_t left) {
  for (int part = 0; part < kParts<F>; ++part) {
    const int at = part * kWidth<F>;
    if (left <= at) break;
    sum.part[part] += load_part<F>(from + at, left - at) * load_part<F>(vector + at, left - at);
  }
}

template <class F, class C>
UNIF2ACE_INLINE void dots_of_rows(const C* from, int64_t rows, int64_t width, const float* vector, float* dot) {
  for (int64_t r = 0; r < rows; ++r, from += width) {
    Lanes16<F> sum;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) dot_step<F>(from + i, vector + i, sum, 16);
    if (i < width) dot_step<F>(from + i, vector + i, sum, width - i);
    dot[r] += sum.sum();
  }
}

template <class F>
UNIF2ACE_INLINE void add_dots_body(ScalarType compute, const void* from, int64_t rows, int64_t width,
                                   const float* vector, float* dot) {
  if (compute == ScalarType::BFloat16)
    dots_of_rows<F>(static_cast<const BFloat16*>(from), rows, width, vector, dot);
  else
    dots_of_rows<F>(static_cast<const float*>(from), rows, width, vector, dot);
}

// V vectors at once: their sums are independent, which hides the latency of the additions.
template <class F, int V, class From, class To>
UNIF2ACE_INLINE void combine_step(const void* const* row, const float* weight, int64_t count, int64_t i, To* out,
                                  int64_t left) {
  F sum[V] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int v = 0; v < V; ++v) {
      const F x = load_part<F>(static_cast<const From*>(row[k]) + i + v * kWidth<F>, left);
      sum[v] += weight == nullptr ? x : x * weight[k];
    }
  for (int v = 0; v < V; ++v) store_part(out + i + v * kWidth<F>, sum[v], left);
}

template <class F, class From, class To>
UNIF2ACE_INLINE void combine_rows(const void* const* row, const float* weight, int64_t count, int64_t width, To* out) {
  int64_t i = 0;
  for (; i + 4 * kWidth<F> <= width; i += 4 * kWidth<F>)
    combine_step<F, 4, From>(row, weight, count, i, out, kWidth<F>);
  for (; i + kWidth<F> <= width; i += kWidth<F>) combine_step<F, 1, From>(row, weight, count, i, out, kWidth<F>);
  if (i < width) combine_step<F, 1, From>(row, weight, count, i, out, width - i);
}

template <class F>
UNIF2ACE_INLINE void combine_body(ScalarType from, ScalarType dtype, const void* const* row, const float* weight,
                                  int64_t count, int64_t width, void* out) {
  if (from == ScalarType::BFloat16)
    combine_rows<F, BFloat16>(row, weight, count, width, static_cast<BFloat16*>(out));
  else if (dtype == ScalarType::Float)
    combine_rows<F, float>(row, weight, count, width, static_cast<float*>(out));
  else if (dtype == ScalarType::BFloat16)
    combine_rows<F, float>(row, weight, count, width, static_cast<BFloat16*>(out));
  else
    combine_rows<F, float>(row, weight, count, width, static_cast<Half*>(out));
}

}  // namespace

// ------------------------------------------------------------------------------------------------------ interface

UNIF2ACE_MULTIVERSION(to_float, to_float_body, (ScalarType dtype, const void* from, int64_t n, float* to),
                      (dtype, from, n, to))
UNIF2ACE_MULTIVERSION(from_float, from_float_body, (ScalarType dtype, const float* from, int64_t n, void* to),
                      (dtype, from, n, to))
UNIF2ACE_MULTIVERSION(activate, activate_body,
                      (Activation activation, ScalarType compute, const void* pre, int64_t rows, int64_t inner,
                       void* act),
                      (activation, compute, pre, rows, inner, act))
UNIF2ACE_MULTIVERSION(activation_gradient, activation_gradient_body, (const ActivationGradient& a), (a))
UNIF2ACE_MULTIVERSION(weighted_sum, weighted_sum_body,
                      (ScalarType compute, const void* from, int64_t rows, int64_t width, const float* weight,
                       float* sums),
                      (compute, from, rows, width, weight, sums))
UNIF2ACE_MULTIVERSION(add_dots, add_dots_body,
                      (ScalarType compute, const void* from, int64_t rows, int64_t width, const float* vector,
                       float* dot),
                      (compute, from, rows, width, vector, dot))
UNIF2ACE_MULTIVERSION(combine, combine_body,
                      (ScalarType from, ScalarType dtype, const void* const* row, const float* weight, int64_t count,
                       int64_t width, void* out),
                      (from, dtype, row, weight, count, width, out))

void widen(ScalarType dtype, const void* from, int64_t n, void* to) {
  if (dtype == ScalarType::Half)
    to_float(dtype, from, n, static_cast<float*>(to));
  else
    std::memcpy(to, from, n * size_of(dtype));
}

void narrow(ScalarType dtype, const void* from, int64_t n, void* to) {
  if (dtype == ScalarType::Half)
    from_float(dtype, static_cast<const float*>(from), n, to);
  else
    std::memcpy(to, from, n * size_of(dtype));
}

void gather_transposed(const Rows& source, int64_t begin, int64_t rows, int64_t padded, int64_t first, int64_t columns,
                       void* to) {
  const ScalarType compute = compute_dtype(source.dtype);
  std::vector<float> strip(source.dtype == compute ? 0 : 16 * columns);
  for (int64_t r = 0; r < padded; r += 16) {
    const void* row[16];
    const int64_t live = std::max<int64_t>(std::min<int64_t>(rows - r, 16), 0);
    const int64_t high = std::min<int64_t>(padded - r, 16);
    for (int64_t i = 0; i < live; ++i) {
      row[i] = source.row(begin + r + i) + first * size_of(source.dtype);
      if (source.dtype == compute) continue;
      widen(source.dtype, row[i], columns, strip.data() + i * columns);
      row[i] = strip.data() + i * columns;
    }
    if (size_of(compute) == 4)
      transpose_strip<uint32_t>(row, live, high, columns, static_cast<uint32_t*>(to) + r, padded);
    else
      transpose_strip<uint16_t>(row, live, high, columns, static_cast<uint16_t*>(to) + r, padded);
  }
}

void store_transposed(ScalarType dtype, const void* from, int64_t rows, int64_t columns, void* to, int64_t row_stride) {
  const bool half = dtype == ScalarType::Half;
  std::vector<uint16_t> narrowed(half ? 16 * columns : 0);
  for (int64_t r = 0; r < rows; r += 16) {
    const void* row[16];
    const int64_t live = std::min<int64_t>(rows - r, 16);
    for (int64_t i = 0; i < live; ++i) {
      row[i] = static_cast<const char*>(from) + (r + i) * columns * size_of(compute_dtype(dtype));
      if (!half) continue;
      narrow(dtype, row[i], columns, narrowed.data() + i * columns);
      row[i] = narrowed.data() + i * columns;
    }
    if (size_of(dtype) == 4)
      transpose_strip<uint32_t>(row, live, live, columns, static_cast<uint32_t*>(to) + r, row_stride);
    else
      transpose_strip<uint16_t>(row, live, live, columns, static_cast<uint16_t*>(to) + r, row_stride);
  }
}

void sum_vectors(ScalarType dtype, const float* from, int64_t count, int64_t n, void* to) {
  std::vector<float> sum(n);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < n; ++j) sum[j] += from[i * n + j];
  from_float(dtype, sum.data(), n, to);
}

void gather(const Rows& source, int64_t begin, int64_t rows, int64_t padded, void* to) {
  const int64_t row_bytes = source.width * size_of(compute_dtype(source.dtype));
  char* out = static_cast<char*>(to);
  for (int64_t r = 0; r < rows; ++r) widen(source.dtype, source.row(begin + r), source.width, out + r * row_bytes);
  std::memset(out + rows * row_bytes, 0, (padded - rows) * row_bytes);
}

}  // namespace unif2ace::experts
