// What the CUDA kernels of `routing` have in common: the problem, as blocks see it, and how they divide shared memory.
#pragma once

#include "cuda/device.h"
#include "cuda/routing_row.h"

namespace unif2ace::routing::gpu {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostExperts = 32 * kPart, kMostChoices = 16;  // a team is at most a warp

// What forward and backward have in common; strides count elements. By value: the bounds need no copy to the device.
struct Problem {
  const void* logits;
  int64_t stride_token, stride_expert, tokens;
  const int32_t* token_group;  // [tokens] or null: everything in group 0
  int experts, groups, lanes;
  Rule rule;
  int16_t bounds[kMostExperts + 1];

  __host__ __device__ int block_tokens() const { return kThreads / lanes; }
  __host__ __device__ int words() const { return (block_tokens() + 31) / 32; }  // of a row of the table of bits
  __host__ __device__ int64_t passes() const { return (tokens + block_tokens() - 1) / block_tokens(); }

  // A group out of range counts as the nearest: nothing is read or written outside whatever stands in token_group.
  __device__ int group_of(int64_t token) const {
    if (token_group == nullptr) return 0;
    const int group = token_group[token];
    return group < 0 ? 0 : group < groups ? group : groups - 1;
  }
};

// The smallest power of two >= n.
__host__ __device__ constexpr int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Parts of dynamic shared memory, one after the other: at most 48 KiB, since P * E <= 16 * 256 and K <= E.
struct Carver {
  unsigned char* at;
  template <class T>
  __host__ __device__ T* take(int count) {
    T* part = reinterpret_cast<T*>(at);
    at += (count * sizeof(T) + 7) / 8 * 8;
    return part;
  }
};

}  // namespace unif2ace::routing::gpu
