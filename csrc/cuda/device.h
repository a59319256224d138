// What the launchers of CUDA kernels share: the tensor's device and stream, errors, shared memory.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "common/arguments.h"

// Shared memory whose size the launch gives. (A macro, since the emulator of the tests has its own.)
#if !defined(UNIF2ACE_DYNAMIC_SHARED)
#define UNIF2ACE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace unif2ace {

inline void check_cuda(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgets it: else torch's next launch would report it again, as its own
  refuse(op, ": CUDA says: ", cudaGetErrorString(status));
}

// Makes the device of a tensor the current one for a scope, and knows torch's stream there. By torch's guard: to go
// back with cudaSetDevice would give a device that nobody uses a context, hundreds of megabytes.
class DeviceScope {
 public:
  DeviceScope(const char* op, const Tensor& tensor) : op_(op) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index_));
    CUDAGuardHandle guard = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index_, &guard));
    guard_.reset(guard);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index_), op_);
    return value;
  }

  template <size_t N>
  Tensor empty(const std::array<int64_t, N>& sizes, int32_t aoti_dtype) const {
    return empty_on<N>(type_, index_, sizes, aoti_dtype);
  }

  // Runs `kernel` on torch's stream; `cooperative`: all blocks at once, so that they may wait for each other.
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, bool cooperative,
              const Parameters&... arguments) const {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = cooperative;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op_);
  }

 private:
  struct Restore {
    void operator()(CUDAGuardHandle guard) const { aoti_torch_delete_cuda_guard(guard); }
  };

  const char* op_;
  int32_t type_ = 0, index_ = 0;
  std::unique_ptr<CUDAGuardOpaque, Restore> guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace unif2ace
