// One CUDA source, -DUNIF2ACE_SOURCE='"cuda/<op>.cu"', as CPU kernels of the namespace unif2ace_emulated.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>

#include "cooperative_groups.h"
#include "cuda/device.h"

extern "C" {
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  return *guard = nullptr, 0;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) {
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, 0;
}

// The library's products.
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
  return aoti_torch_cpu_mm_out(out, a, b);
}
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle bias, AtenTensorHandle a,
                                         AtenTensorHandle b, double beta, double alpha) {
  return aoti_torch_cpu_addmm_out(out, bias, a, b, beta, alpha);
}

// How many blocks run at once (of cooperative launches), and in which order the threads of a block.
void emulator_setup(int multiprocessors, int reversed) {
  emulator::multiprocessors = multiprocessors;
  emulator::reversed = reversed != 0;
}

// How many kernels were launched so far.
int emulator_launches() {
  return emulator::launches;
}
}

#define unif2ace_native unif2ace_emulated
#define CUDA CPU
#include UNIF2ACE_SOURCE
