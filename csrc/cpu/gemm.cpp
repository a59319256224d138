// See gemm.h.
#include "cpu/gemm.h"

#include "cpu/isa.h"

// torch's header of this C function wants a build tied to one torch; its signature is part of the C interface that
// compiled AOTInductor models rely on. A weak reference: null in a torch that was built without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* post_op, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* result);

namespace unif2ace {
namespace {

template <size_t N>
Tensor view(const void* data, std::array<int64_t, N> sizes, std::array<int64_t, N> strides, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), N}, {strides.data(), N},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// oneDNN's bfloat16 products begin with AVX-512, its float16 ones with processors that torch itself knows best.
bool onednn_takes(const Tensor& x, const Tensor& w) {
  const ScalarType dtype = x.scalar_type();
  return aoti_torch_cpu__linear_pointwise != nullptr && x.size(0) > 0 && x.size(1) > 0 && w.size(0) > 0 &&
         (dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && isa() == Isa::avx512));
}

}  // namespace

Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype) {
  return view<2>(data, {rows, columns}, {row_stride, 1}, dtype);
}

Tensor matrix_t(const void* data, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype) {
  return view<2>(data, {columns, rows}, {1, row_stride}, dtype);
}

Tensor vector_of(const void* data, int64_t size, ScalarType dtype) {
  return view<1>(data, {size}, {1}, dtype);
}

Tensor linear_of_torch(const Tensor& x, const Tensor& w, const Tensor* bias) {
  std::optional<Tensor> optional_bias;
  if (bias != nullptr) optional_bias = *bias;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(optional_bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& w, const Tensor* bias) {
  if (!onednn_takes(x, w)) return linear_of_torch(x, w, bias);
  AtenTensorHandle bias_handle = bias == nullptr ? nullptr : bias->get();
  const char* algorithm = "";
  AtenTensorHandle y = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), w.get(), bias == nullptr ? nullptr : &bias_handle,
                                                          "none", nullptr, 0, &algorithm, &y));
  return Tensor(y);
}

}  // namespace unif2ace
