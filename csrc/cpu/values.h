// Small tensors of any float dtype (factors, weights per row) to and from std::vector<float>.
//
// What is a few numbers per row or per sequence may come strided and in a dtype of its own, float64 included.
#pragma once

#include <vector>

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

}  // namespace unif2ace
