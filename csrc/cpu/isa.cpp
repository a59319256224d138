// Which instruction set the multiversioned loops use; see isa.h.
#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace unif2ace {

static Isa detect() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string cap = variable == nullptr ? "" : variable;
  if (cap == "default") return Isa::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && cap != "avx2") return Isa::avx512;
  if (__builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa found = detect();
  return found;
}

const char* isa_name(Isa which) {
  switch (which) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

}  // namespace unif2ace
