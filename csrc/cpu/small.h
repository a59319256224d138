// Small tensors of any float dtype (factors, weights per row) to and from std::vector<float>; large fresh outputs.
#pragma once

#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/tensors.h"

namespace unif2ace {

// The elements of a tensor of up to two dimensions, any strides, in row-major order.
template <class T>
inline void read_as(const Tensor& tensor, std::vector<float>& out) {
  const int64_t dims = tensor.dim();
  const int64_t rows = dims == 2 ? tensor.size(0) : 1, columns = dims == 0 ? 1 : tensor.size(dims - 1);
  const int64_t row_stride = dims == 2 ? tensor.stride(0) : 0, stride = dims == 0 ? 0 : tensor.stride(dims - 1);
  const T* from = pointer<T>(tensor);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out.push_back(static_cast<float>(from[r * row_stride + c * stride]));
}

inline std::vector<float> read_floats(const char* op, const char* name, const Tensor& tensor) {
  const Tensor flat = tensor.dim() <= 2 ? tensor : torch::stable::flatten(tensor);
  std::vector<float> values;
  values.reserve(flat.numel());
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      read_as<float>(flat, values);
      break;
    case ScalarType::Double:
      read_as<double>(flat, values);
      break;
    case ScalarType::BFloat16:
      read_as<torch::headeronly::BFloat16>(flat, values);
      break;
    case ScalarType::Half:
      read_as<torch::headeronly::Half>(flat, values);
      break;
    default:
      refuse(op, ": ", name, " must be floating point");
  }
  return values;
}

template <class T>
inline void write_as(const std::vector<float>& values, const Tensor& tensor) {
  T* to = mutable_pointer<T>(tensor);
  for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<T>(values[i]);
}

// A new tensor with these values, of the shape and dtype of `like` (one that read_floats accepts).
inline Tensor write_floats(const std::vector<float>& values, const Tensor& like) {
  Tensor tensor = torch::stable::new_empty(like, like.sizes());
  switch (like.scalar_type()) {
    case ScalarType::Float:
      write_as<float>(values, tensor);
      break;
    case ScalarType::Double:
      write_as<double>(values, tensor);
      break;
    case ScalarType::BFloat16:
      write_as<torch::headeronly::BFloat16>(values, tensor);
      break;
    default:
      write_as<torch::headeronly::Half>(values, tensor);
  }
  return tensor;
}

// An uninitialised contiguous tensor that may be large.
template <size_t N>
inline Tensor empty_large(const std::array<int64_t, N>& sizes, int32_t aoti_dtype) {
  Tensor tensor = empty_cpu<N>(sizes, aoti_dtype);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last && end - begin >= 4 * kPage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace unif2ace
