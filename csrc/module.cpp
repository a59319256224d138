// The Python module `unif2ace._C`: facts about the build and the processor.
//
// The ops themselves are not bound here. Loading the module runs the STABLE_TORCH_LIBRARY_IMPL blocks of the other
// sources, which register them with torch's dispatcher under schemas that Python has defined
// (unif2ace/ops/_registry.py).
//
// pybind11 calls nothing of libtorch, but torch 2.10 to 2.12 guard every header they ship against a stable build.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include "common/stable.h"
#include "cpu/isa.h"

#define UNIF2ACE_TO_STRING_(x) #x
#define UNIF2ACE_TO_STRING(x) UNIF2ACE_TO_STRING_(x)

namespace py = pybind11;

namespace unif2ace {

static py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  info["torch_built_with"] = UNIF2ACE_BUILD_TORCH;
  info["torch_target"] = UNIF2ACE_TO_STRING(TORCH_TARGET_VERSION);
#if defined(UNIF2ACE_WITH_CUDA)
  info["cuda"] = UNIF2ACE_BUILD_CUDA;
#else
  info["cuda"] = py::none();
#endif
  info["flags"] = UNIF2ACE_BUILD_FLAGS;
  return info;
}

static py::dict cpu_features() {
  py::dict features;
  features["isa"] = isa_name(isa());
#if defined(__x86_64__)
  features["architecture"] = "x86_64";
  features["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  features["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  features["avx512bf16"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
#elif defined(__aarch64__)
  features["architecture"] = "aarch64";
#else
  features["architecture"] = "other";
#endif
  features["threads"] = static_cast<int64_t>(torch::stable::get_num_threads());
  return features;
}

}  // namespace unif2ace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of unif2ace; importing it registers them in the torch namespace unif2ace_native.";
  m.def("build_info", &unif2ace::build_info, "Compiler, torch and CUDA versions and flags this module was built with.");
  m.def("cpu_features", &unif2ace::cpu_features, "Instruction set in use, what the processor has, torch's threads.");
}
