// Tensor arguments of kernels: checked, contiguous, and as typed pointers.
#pragma once

#include "common/checks.h"
#include "common/numerics.h"
#include "common/stable.h"

namespace unif2ace {

inline int32_t aoti_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// A contiguous argument of this dtype and number of elements; anything else is refused in the name of `op`.
inline Tensor argument(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel) {
  check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
        dtype_name(tensor.scalar_type()));
  check(tensor.numel() == numel, op, ": ", name, " must have ", numel, " elements, got ", tensor.numel());
  return dense(tensor);
}

// One integer per row, int32 or int64, with any stride, read in place: column[row]. Valid as long as the tensor.
class IntegerColumn {
 public:
  IntegerColumn(const char* op, const char* name, const Tensor& tensor, int64_t rows) {
    const ScalarType dtype = tensor.scalar_type();
    check(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": ", name, " must be int32 or int64, got ",
          dtype_name(dtype));
    check(tensor.dim() == 1 && tensor.size(0) == rows, op, ": ", name, " must have ", rows, " elements");
    data_ = tensor.const_data_ptr();
    stride_ = tensor.stride(0);
    wide_ = dtype == ScalarType::Long;
  }
  UNIF2ACE_INLINE int64_t operator[](int64_t row) const {
    return wide_ ? static_cast<const int64_t*>(data_)[row * stride_]
                 : static_cast<const int32_t*>(data_)[row * stride_];
  }

 private:
  const void* data_;
  int64_t stride_;
  bool wide_;
};

// The float dtypes that kernels read; float64 is for the reference.
inline void check_float(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": native ", name,
        " must be float32, bfloat16 or float16");
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(const_cast<Tensor&>(tensor).mutable_data_ptr());
}

}  // namespace unif2ace
