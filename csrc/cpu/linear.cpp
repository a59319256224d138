// Native CPU form of the op `linear`: dense y = x w^T + b by the product of gemm.h, its gradients, and gelu(y).
//
// Semantics: unif2ace/ops/linear.py. Nothing is ours here but the choice of the library, and the activation.
#include <algorithm>
#include <vector>

#include "cpu/experts_rows.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace unif2ace {
namespace {

// Where torch's own library is as good: 16-bit products are oneDNN's there too, without our copies (forward and
// backward at 2112 x 192 x 576, bfloat16: 2.1 against 2.6 ms).
bool torch_is_best(const Tensor& x) {
  return x.scalar_type() != ScalarType::Float;
}

void check_product(const Tensor& x, const Tensor& weight) {
  check_float("linear", "x", x);
  check(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "linear: x must be [M, K] and weight [N, K]");
  check(x.scalar_type() == weight.scalar_type(), "linear: x and weight must have one dtype, got ",
        dtype_name(x.scalar_type()), " and ", dtype_name(weight.scalar_type()));
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  check_product(x, weight);
  if (bias) bias = argument("linear", "bias", *bias, x.scalar_type(), weight.size(0));
  const Tensor* bias_pointer = bias ? &*bias : nullptr;
  if (torch_is_best(x)) return linear_of_torch(x, weight, bias_pointer);
  if (x.size(0) != 1) return linear(dense(x), dense(weight), bias_pointer);
  // A row alone would take the matrix-vector path, which sums in another order than all others, so it goes twice. That
  // path is faster (768 x 2304, weights from memory, two threads: 167 us, twice 213), MKL's slower (402).
  const Tensor row = dense(x), both = empty_cpu<2>({2, x.size(1)}, aoti_dtype(x));
  for (int64_t r = 0; r < 2; ++r)
    std::copy_n(pointer<float>(row), x.size(1), mutable_pointer<float>(both) + r * x.size(1));
  Tensor result = linear(both, dense(weight), bias_pointer);
  return torch::stable::narrow(result, 0, 0, 1);
}

// Numbers per task: a few microseconds of work.
constexpr int64_t kTaskNumbers = 1 << 13;

// gelu_tanh in place. torch's own computes the last numbers of each thread's share by another formula than the rest,
// so that its bits follow the number of rows and of threads.
void gelu_in_place(Tensor& y) {
  using namespace experts;
  const ScalarType dtype = y.scalar_type();
  const int64_t columns = y.size(1), grain = std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(columns, 1));
  char* const data = mutable_pointer<char>(y);
  torch::stable::parallel_for(0, y.size(0), grain, [&](int64_t begin, int64_t end) {
    char* const first = data + begin * columns * size_of(dtype);
    const int64_t n = (end - begin) * columns;
    if (dtype != ScalarType::Half) return activate(Activation::gelu_tanh, dtype, first, 1, n, first);
    std::vector<float> wide(n);
    to_float(dtype, first, n, wide.data());
    activate(Activation::gelu_tanh, ScalarType::Float, wide.data(), 1, n, wide.data());
    from_float(dtype, wide.data(), n, first);
  });
}

Tensor linear_gelu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  Tensor y = linear_forward(x, weight, bias);
  gelu_in_place(y);
  return y;
}

Tensor transposed(const Tensor& x) {
  return torch::stable::transpose(x, 0, 1);
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_product(x, weight);
  check(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == weight.size(0) &&
            grad.scalar_type() == x.scalar_type(),
        "linear: the gradient must be [M, N] in the dtype of x");
  if (torch_is_best(x))
    return {linear_of_torch(grad, transposed(weight), nullptr),
            linear_of_torch(transposed(grad), transposed(x), nullptr)};
  // Dense operands: on slices of wider rows oneDNN falls back to a loop hundreds of times slower.
  const Tensor grad_c = dense(grad);
  return {linear(grad_c, transposed(dense(weight))), linear(transposed(grad_c), transposed(dense(x)))};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&unif2ace::linear_forward));
  m.impl("linear_gelu", TORCH_BOX(&unif2ace::linear_gelu));
  m.impl("linear_backward", TORCH_BOX(&unif2ace::linear_backward));
}
