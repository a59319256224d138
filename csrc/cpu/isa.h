// One loop, compiled for several instruction sets, chosen at run time.
//
// A hot loop is written once, as an always_inline function template `body<F>` over the vector type F (lanes.h);
// UNIF2ACE_MULTIVERSION makes one function per instruction set out of it. Since the code contains no fused multiply-add
// (-ffp-contract=off) and sums in an order that does not depend on the width, all versions return the same bits.
#pragma once

#include "cpu/lanes.h"

namespace unif2ace {

enum class Isa { baseline, avx2, avx512 };

// The widest set this processor has. ATEN_CPU_CAPABILITY (default | avx2 | avx512), torch's own variable, lowers it.
Isa isa();
const char* isa_name(Isa);

}  // namespace unif2ace

#if defined(__x86_64__)
#define UNIF2ACE_TARGET_AVX2 __attribute__((target("avx2,f16c")))
#define UNIF2ACE_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")))

// Defines `name(arguments)`: calls `body` compiled for the current instruction set.
#define UNIF2ACE_MULTIVERSION(name, body, parameters, arguments) \
  UNIF2ACE_TARGET_AVX512 void name##_avx512 parameters {         \
    body<Floats16> arguments;                                    \
  }                                                              \
  UNIF2ACE_TARGET_AVX2 void name##_avx2 parameters {             \
    body<Floats8> arguments;                                     \
  }                                                              \
  void name parameters {                                         \
    switch (isa()) {                                             \
      case Isa::avx512:                                          \
        return name##_avx512 arguments;                          \
      case Isa::avx2:                                            \
        return name##_avx2 arguments;                            \
      case Isa::baseline:                                        \
        break;                                                   \
    }                                                            \
    body<Floats4> arguments;                                     \
  }
#else
#define UNIF2ACE_MULTIVERSION(name, body, parameters, arguments) \
  void name parameters {                                         \
    body<Floats4> arguments;                                     \
  }
#endif
