// One row of logits, sampled by one block of threads. Semantics: unif2ace/ops/sampling.py.
//
// A thread reads 16 codes per step, 16 bytes at a time, and keeps three numbers: the largest z it has seen, the sum of
// e^(z - largest), and an upper bound of all its keys z / T + Gumbel. The bound takes the four random words of a block
// of codes together (gumbel_bound of the smallest, and the largest z): no logarithm anywhere. After the pass the block
// computes exact keys of the thread with the largest bound, 128 codes at a time, then of the next one, until no bound
// reaches the best key. That is one thread, rarely two: its bound is too large by 0.06 at most where it matters.
// **Nothing is lost**: rounding is monotone, so bounds hold for rounded keys (cpu/sampling_row.h has the argument).
//
// Everything that decides on a token is exact or comes from common/, so tokens are those of the CPU. Sums run in an
// order that depends on V and the dtype only.
#pragma once

#include "common/gumbel.h"
#include "common/philox.h"
#include "common/stable.h"

namespace unif2ace::sampling::gpu {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kOwn = 16;  // codes of a thread per step: four Philox counters, which hide each other's latency
constexpr int kStep = kThreads * kOwn;
constexpr float kLog2E = 1.44269504f;
constexpr unsigned kAllLanes = 0xffffffff;

template <class Logit>
constexpr int kVector = 16 / sizeof(Logit);  // codes of a 16-byte load

// Scores of some rows, as they lie in memory. Strides count elements.
struct Scores {
  const void *cond, *uncond;  // uncond is read with guidance only
  int64_t cond_row, cond_code, uncond_row, uncond_code;
  float cond_factor, uncond_factor;  // 1 + w, w
};

// One row of one of the two.
template <class Logit>
struct Row {
  const Logit* data;
  int64_t stride;

  __device__ __forceinline__ Row(const void* scores, int64_t row, int64_t row_stride, int64_t code_stride)
      : data(static_cast<const Logit*>(scores) + row * row_stride), stride(code_stride) {}

  __device__ __forceinline__ bool takes_wide_loads() const {
    return stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  __device__ __forceinline__ Logit at(uint32_t code) const { return data[code * stride]; }

  // The codes from `code` on that fill 16 bytes; `beyond` behind the last column. Wide: all of them or none are there.
  template <bool wide>
  __device__ __forceinline__ uint4 load_vector(uint32_t code, uint32_t columns, float beyond) const {
    if (wide && code < columns) return *reinterpret_cast<const uint4*>(data + code);
    Logit found[kVector<Logit>];
#pragma unroll
    for (int i = 0; i < kVector<Logit>; ++i)
      found[i] = !wide && code + i < columns ? at(code + i) : static_cast<Logit>(beyond);
    uint4 bits;
    memcpy(&bits, found, sizeof bits);
    return bits;
  }
};

// The conditional and the unconditional half of a row.
template <class Logit, bool guided>
struct Halves {
  Row<Logit> cond, uncond;
  float cond_factor, uncond_factor;

  __device__ __forceinline__ Halves(const Scores& s, int64_t row)
      : cond(s.cond, row, s.cond_row, s.cond_code),
        uncond(guided ? s.uncond : s.cond, row, guided ? s.uncond_row : s.cond_row,
               guided ? s.uncond_code : s.cond_code),
        cond_factor(s.cond_factor),
        uncond_factor(s.uncond_factor) {}

  __device__ __forceinline__ bool takes_wide_loads(uint32_t columns) const {
    return columns % kVector<Logit> == 0 && cond.takes_wide_loads() && uncond.takes_wide_loads();
  }
  __device__ __forceinline__ float guide(Logit c, Logit u) const {
    const float z = static_cast<float>(c);
    return guided ? z * cond_factor - static_cast<float>(u) * uncond_factor : z;
  }
  __device__ __forceinline__ float z(uint32_t code) const {
    return guide(cond.at(code), guided ? uncond.at(code) : cond.at(code));
  }
};

// What a thread reads in one step, before conversion: on its way while the step before is worked on.
template <class Logit, bool guided>
struct Step {
  static constexpr int kLoads = kOwn / kVector<Logit>;
  uint4 cond[kLoads], uncond[guided ? kLoads : 1];

  // Of the code that stands at place i of the thread's codes.
  static __device__ __forceinline__ uint32_t code(uint32_t first, int i) {
    return first + (i / kVector<Logit> * kThreads + threadIdx.x) * kVector<Logit> + i % kVector<Logit>;
  }
  template <bool wide>
  __device__ __forceinline__ void load(const Halves<Logit, guided>& row, uint32_t first, uint32_t columns) {
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      const uint32_t start = code(first, v * kVector<Logit>);
      cond[v] = row.cond.template load_vector<wide>(start, columns, -INFINITY);
      if (guided) uncond[v] = row.uncond.template load_vector<wide>(start, columns, 0.0f);
    }
  }
  __device__ __forceinline__ void guide(const Halves<Logit, guided>& row, float (&z)[kOwn]) const {
    Logit c[kOwn], u[kOwn];
    memcpy(c, cond, sizeof cond);
    memcpy(u, guided ? uncond : cond, sizeof cond);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) z[i] = row.guide(c[i], u[i]);
  }
};

// The noise of a row: everything but the code.
struct RowNoise {
  PhiloxKeys<uint64_t> keys;
  uint32_t position, step, stream;

  __device__ __forceinline__ RowNoise(uint64_t seed, uint32_t position, uint32_t step, uint32_t stream)
      : keys(seed), position(position), step(step), stream(stream) {
#if defined(__CUDA_ARCH__)
    for (int round = 0; round < 10; ++round) {  // keep them: the compiler would add them up anew for every counter
      asm volatile("" : "+l"(keys.k0[round]));
      asm volatile("" : "+l"(keys.k1[round]));
    }
#endif
  }

  __device__ __forceinline__ PhiloxWords<uint64_t> counter(uint32_t code) const {
    return {code / 4, position, step, stream};
  }
  __device__ __forceinline__ float gumbel_of(uint32_t code) const {
    PhiloxWords<uint64_t> words[1] = {counter(code)};
    philox(words, keys);
    const uint64_t even = code & 2 ? words[0].c2 : words[0].c0, odd = code & 2 ? words[0].c3 : words[0].c1;
    return gumbel<float>(static_cast<int32_t>(code & 1 ? odd : even));
  }
};

__device__ __forceinline__ float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // exp2f would spend three more instructions on results below 2^-126
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// log of the noise's contract, for positive normal y; NaN stays NaN. It has no division, as log_positive has.
__device__ __forceinline__ float log_of(float y) {
  float f, n;
  split_exponent(y, f, n);
  const float log_y = log1p_core(f, n);
  return y == y ? log_y : y;
}

// What to subtract before exponentials: where nothing but -inf has come so far, -inf - -inf would be NaN.
__device__ __forceinline__ float finite(float high) {
  return high == -INFINITY ? 0.0f : high;
}

// One pass over the row; see the top of the file.
struct Pass {
  float high = -INFINITY, total = 0.0f, bound = -INFINITY;

  template <bool noisy, bool wide, class Logit, bool guided>
  __device__ __forceinline__ void run(const Halves<Logit, guided>& row, uint32_t columns, float inverse_temperature,
                                      const RowNoise& noise) {
    Step<Logit, guided> next;
    next.template load<wide>(row, 0, columns);
    for (uint32_t first = 0; first < columns; first += kStep) {
      float z[kOwn], top[kOwn / 4], largest = -INFINITY;
      next.guide(row, z);
      next.template load<wide>(row, first + kStep, columns);
#pragma unroll
      for (int b = 0; b < kOwn / 4; ++b) {
        top[b] = fmaxf(fmaxf(z[4 * b], z[4 * b + 1]), fmaxf(z[4 * b + 2], z[4 * b + 3]));
        largest = fmaxf(largest, top[b]);
      }
      add(z, largest);
      if (noisy) {
        PhiloxWords<uint64_t> words[kOwn / 4];
#pragma unroll
        for (int b = 0; b < kOwn / 4; ++b) words[b] = noise.counter(Step<Logit, guided>::code(first, 4 * b));
        philox(words, noise.keys);
#pragma unroll
        for (int b = 0; b < kOwn / 4; ++b)
          top[b] = top[b] * inverse_temperature + gumbel_bound<float>(smallest(words[b]));
      }
#pragma unroll
      for (int b = 0; b < kOwn / 4; ++b) bound = fmaxf(bound, top[b]);
    }
  }

 private:
  __device__ __forceinline__ void add(const float (&z)[kOwn], float largest) {
    const float before = high;
    high = fmaxf(high, largest);
    const float shift = finite(high);
    total *= exp2_of((before - shift) * kLog2E);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) total += exp2_of((z[i] - shift) * kLog2E);
  }

  static __device__ __forceinline__ int32_t smallest(const PhiloxWords<uint64_t>& w) {
    const uint32_t a = static_cast<uint32_t>(w.c0), b = static_cast<uint32_t>(w.c1);
    const uint32_t c = static_cast<uint32_t>(w.c2), d = static_cast<uint32_t>(w.c3);
    const uint32_t low = a < b ? a : b, other = c < d ? c : d;
    return static_cast<int32_t>(low < other ? low : other);
  }
};

// A float and an index below 2^31 as one integer: the larger float wins, of equal ones the smaller index. NaN loses.
__device__ __forceinline__ int64_t ranked(float value, uint32_t index) {
  const int64_t key = value == value ? ordered_key(value) : INT32_MIN;
  return key * (int64_t{1} << 32) + (INT32_MAX - index);
}
__device__ __forceinline__ uint32_t index_of(int64_t ranked) {
  return INT32_MAX - static_cast<uint32_t>(ranked);
}
__device__ __forceinline__ int32_t key_of(int64_t ranked) {
  return static_cast<int32_t>(ranked >> 32);
}
__device__ __forceinline__ float value_of(int64_t ranked) {
  const int32_t key = key_of(ranked);
  return bits_float<float>(key ^ ((key >> 31) & 0x7fffffff));
}

// The largest of the block, for every thread of it.
__device__ __forceinline__ int64_t block_max(int64_t value, int64_t (&shared)[kWarps]) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, static_cast<long long>(value), lanes);
    value = other > value ? other : value;
  }
  __syncthreads();  // the numbers of the call before have been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) value = shared[w] > value ? shared[w] : value;
  return value;
}

// The sum over the block in a fixed order, for every thread of it.
__device__ __forceinline__ float block_sum(float value, float (&shared)[kWarps]) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
  for (int w = 0; w < kWarps; ++w) value += shared[w];
  return value;
}

// The code with the largest key, given the bound of each thread's keys.
template <bool noisy, class Logit, bool guided>
__device__ __forceinline__ uint32_t find_winner(const Halves<Logit, guided>& row, uint32_t columns,
                                                float inverse_temperature, const RowNoise& noise, float bound,
                                                int64_t (&shared)[kWarps]) {
  int64_t best = ranked(-INFINITY, 0);  // code 0 where every key is -inf
  int64_t own = ranked(bound, threadIdx.x);
  for (;;) {
    const int64_t candidate = block_max(own, shared);
    const uint32_t thread = index_of(candidate);
    // A bound that equals the best key promises a tie at most, which only a lower code would win.
    const bool tie = key_of(candidate) == key_of(best) && thread * kVector<Logit> < index_of(best);
    if (!(key_of(candidate) > key_of(best) || tie)) return index_of(best);
    if (thread == threadIdx.x) own = ranked(NAN, threadIdx.x);  // settled
    for (uint32_t i = threadIdx.x;; i += kThreads) {
      const uint32_t code = (i / kVector<Logit> * kThreads + thread) * kVector<Logit> + i % kVector<Logit>;
      if (code >= columns) break;
      float key = row.z(code);
      if (noisy) key = key * inverse_temperature + noise.gumbel_of(code);
      const int64_t found = ranked(key, code);
      best = found > best ? found : best;
    }
    best = block_max(best, shared);
  }
}

}  // namespace unif2ace::sampling::gpu
