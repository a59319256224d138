// What this project adds to the LibTorch stable ABI: direct allocation and a string argument.
//
// Through the C functions of the stable ABI an allocation costs about 0.3 us; torch::stable::new_empty goes through the
// dispatcher, several times that, which an op with eight outputs and one token would feel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>

namespace unif2ace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised contiguous tensor on a device.
template <size_t N>
inline Tensor empty_on(int32_t device_type, int32_t device_index, const std::array<int64_t, N>& sizes,
                       int32_t aoti_dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes.data(), strides.data(), aoti_dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

template <size_t N>
inline Tensor empty_cpu(const std::array<int64_t, N>& sizes, int32_t aoti_dtype) {
  return empty_on<N>(aoti_torch_device_type_cpu(), 0, sizes, aoti_dtype);
}

// A `str` argument of a schema. (The library's own conversion to std::string never frees one copy.)
struct Text {
  std::string value;
};

}  // namespace unif2ace

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<unif2ace::Text> {
  static unif2ace::Text call(StableIValue value, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    unif2ace::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
