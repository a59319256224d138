// The activations of the op `experts`, with their derivatives, on vectors of float32.
//
//   gelu_tanh   x s(2 sqrt(2/pi) (x + 0.044715 x^3))     since (1 + tanh u) / 2 = s(2u), s the logistic function
//   gelu        x Phi(x), Phi the normal distribution function
//   silu        x s(x)
//   relu2       max(x, 0)^2
//   swiglu      silu(gate) * up                           gated: two numbers of the pre-activation make one
//   geglu       gelu(gate) * up
//
// One exponential and one division each, about 30 vector instructions for 16 numbers. The derivative costs a few more;
// where it is not used the compiler drops it.
#pragma once

#include "common/numerics.h"

namespace unif2ace::experts {

enum class Activation { gelu_tanh, gelu, silu, relu2, swiglu, geglu };

constexpr bool is_gated(Activation a) {
  return a == Activation::swiglu || a == Activation::geglu;
}

template <class F>
struct Curve {
  F value, slope;
};

// The logistic function and its derivative s (1 - s) = e / (1 + e)^2, e = exp(-|x|): no cancellation on either side.
template <class F>
UNIF2ACE_INLINE Curve<F> logistic(F x) {
  const F e = exp_nonpositive(x < 0.0f ? x : -x);
  const F r = 1.0f / (1.0f + e);
  return {x < 0.0f ? e * r : r, e * r * r};
}

// Phi(x) and its derivative, the normal density. For x >= 0, 1 - Phi(x) = exp(-x^2/2) q(t) with t = 1 / (1 + 0.3 x);
// the polynomial q is a minimax fit of the scaled complementary error function, relative error 1.2e-7 for x in
// [0, 13.2], beyond which exp(-x^2/2) is 0 in float32.
template <class F>
UNIF2ACE_INLINE Curve<F> normal(F x) {
  const F magnitude = x < 0.0f ? -x : x;
  const F e = exp_nonpositive(x * x * -0.5f);
  const F t = 1.0f / (1.0f + 0.3f * magnitude);
  F q = t * 0.03608989884664407f - 0.15893803510909357f;
  q = q * t + 0.20935364760373903f;
  q = q * t - 0.05645665947588134f;
  q = q * t + 0.13003604632105065f;
  q = q * t + 0.09946403325550462f;
  q = q * t + 0.12082647927128659f;
  q = q * t + 0.11962453017739458f;
  const F tail = e * (q * t);
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.3989422804014327f};  // 1 / sqrt(2 pi)
}

// f(x) and f'(x); for a gated activation f is what acts on the gate.
template <Activation activation, class F>
UNIF2ACE_INLINE Curve<F> curve(F x) {
  if constexpr (activation == Activation::relu2) {
    const F positive = x < 0.0f ? splat<F>(0.0f) : x;  // NaN stays NaN
    return {positive * positive, positive + positive};
  } else if constexpr (activation == Activation::gelu || activation == Activation::geglu) {
    const Curve<F> phi = normal(x);
    return {x * phi.value, phi.value + x * phi.slope};
  } else if constexpr (activation == Activation::gelu_tanh) {
    const float c = 1.5957691216057308f;  // 2 sqrt(2 / pi)
    const F square = x * x;
    const Curve<F> s = logistic(x * (c + c * 0.044715f * square));
    return {x * s.value, s.value + x * s.slope * (c + c * 3.0f * 0.044715f * square)};
  } else {
    const Curve<F> s = logistic(x);
    return {x * s.value, s.value + x * s.slope};
  }
}

}  // namespace unif2ace::experts
