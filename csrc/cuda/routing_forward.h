// The forward kernel of `routing` on CUDA: rows, one wait of all blocks for each other, plan.
//
//   1. rows. P tokens at a time: scores, choice, weights. Bit (e, i) of a table in shared memory says that token i
//      chose expert e, so the rank of a slot among its block's slots of one expert is a count of bits: earlier tokens.
//      Per block: slots and probabilities per expert, tokens per group.
//   2. all blocks wait for each other.
//   3. plan. Each block adds the slots of all blocks (those before it apart): offsets[e] and where its own slots of e
//      start; place = start + rank. Warps add the importance of one expert each, in order of the blocks.
//
// Stable by construction, no atomics in any result: the only ones (bits and counts in shared memory) commute exactly.
// The importance sums depend on how many blocks there are, hence on the chip, not on chance.
#pragma once

#include <cooperative_groups.h>

#include "cuda/routing_problem.h"

namespace unif2ace::routing::gpu {

struct Forward {
  Problem problem;
  const float* selection_bias;  // [experts] or null
  float* weights;               // [tokens, top_k]
  int32_t *experts, *offsets, *order, *position, *load;
  float *importance, *logsumexp;
  // What blocks tell each other: per block slots [experts], sums of probabilities [experts], tokens [groups], and the
  // first token with a logit that is not finite or a group out of range.
  int32_t* block_slots;
  float* block_probability;
  int32_t* block_tokens;
  int32_t* block_bad;
};

struct ForwardMemory {
  double* sums;        // [experts] of probabilities
  float* probability;  // [P, stride]
  float* partial;      // [kMostExperts]
  float* chosen;       // [P, top_k] weights
  uint32_t* taken;     // [experts, words]: bit i of row e says that token i chose e
  int32_t* slots;      // [experts] slots of this block so far
  int32_t* start;      // [experts] where they go
  int32_t* tokens;     // [groups]
  int32_t* bad;        // [1]
  int16_t* index;      // [P, top_k] experts
  int stride;          // odd: a column's rows fall on different banks
  unsigned char* end;

  __host__ __device__ ForwardMemory(const Problem& a, unsigned char* memory) : stride(a.experts | 1) {
    Carver carver{memory};
    const int rows = a.block_tokens();
    sums = carver.take<double>(a.experts);
    probability = carver.take<float>(rows * stride);
    partial = carver.take<float>(kMostExperts);
    chosen = carver.take<float>(rows * a.rule.top_k);
    taken = carver.take<uint32_t>(a.experts * a.words());
    slots = carver.take<int32_t>(a.experts);
    start = carver.take<int32_t>(a.experts);
    tokens = carver.take<int32_t>(a.groups);
    bad = carver.take<int32_t>(1);
    index = carver.take<int16_t>(rows * a.rule.top_k);
    end = carver.at;
  }
};

// Step 1 for the tokens [begin, begin + live), live <= P.
template <class Logit>
__device__ void route_rows(const Forward& a, const ForwardMemory& shared, int64_t begin, int live, bool check) {
  const Problem& problem = a.problem;
  const int lanes = problem.lanes, k = problem.rule.top_k, words = problem.words();
  const int i = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t token = begin + (i < live ? i : live - 1);  // full warps: a team without a token repeats the last one
  const int group = problem.group_of(token), first = problem.bounds[group], n = problem.bounds[group + 1] - first;
  const Team team(lanes, lane, n);
  float x[kPart], p[kPart], logsumexp;
  bool bad;
  int16_t* index = shared.index + i * k;
  float* row = shared.probability + i * shared.stride;
  load_columns(static_cast<const Logit*>(problem.logits) + token * problem.stride_token +
                   (first + lane * kPart) * problem.stride_expert,
               problem.stride_expert, team.own, x);
  forward_row(team, problem.rule, a.selection_bias == nullptr ? nullptr : a.selection_bias + first, x, p, index,
              shared.chosen + i * k, logsumexp, bad);
  for (int e = lane; e < problem.experts; e += lanes) row[e] = 0.0f;
  __syncwarp();
  if (i < live) {
#pragma unroll
    for (int c = 0; c < kPart; ++c)
      if (c < team.own) row[first + lane * kPart + c] = p[c];
    for (int j = lane; j < k; j += lanes) {
      index[j] = static_cast<int16_t>(index[j] + first);
      atomicOr(&shared.taken[index[j] * words + i / 32], 1u << (i % 32));
    }
    if (lane == 0) {
      a.logsumexp[token] = logsumexp;
      atomicAdd(&shared.tokens[group], 1);
    }
    bad |= problem.token_group != nullptr && problem.token_group[token] != group;
    if (check && bad) atomicMin(shared.bad, static_cast<int32_t>(token));
  }
}

// The rest of step 1: slots get their ranks, columns their sums.
__device__ void count_slots(const Forward& a, const ForwardMemory& shared, int64_t begin, int live) {
  const Problem& problem = a.problem;
  const int k = problem.rule.top_k, words = problem.words(), experts = problem.experts;
  for (int s = threadIdx.x; s < live * k; s += kThreads) {
    const int i = s / k, e = shared.index[s];
    const uint32_t* bits = shared.taken + e * words;
    int rank = shared.slots[e] + __popc(bits[i / 32] & ((1u << (i % 32)) - 1));
    for (int w = 0; w < i / 32; ++w) rank += __popc(bits[w]);
    const int64_t slot = begin * k + s;
    a.weights[slot] = shared.chosen[s];
    a.experts[slot] = e;
    a.position[slot] = rank;
  }
  // All threads add: `parts` rows of sums, then one thread per column adds these in order.
  const int wide = power_of_two(experts), parts = wide < kThreads ? kThreads / wide : 1;
  for (int at = threadIdx.x; at < wide * parts; at += kThreads) {
    const int e = at % wide;
    float sum = 0.0f;
    if (e < experts)
      for (int i = at / wide; i < live; i += parts) sum += shared.probability[i * shared.stride + e];
    shared.partial[at] = sum;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    for (int part = 0; part < parts; ++part) shared.sums[e] += shared.partial[part * wide + e];
    for (int w = 0; w < words; ++w) {
      shared.slots[e] += __popc(shared.taken[e * words + w]);
      shared.taken[e * words + w] = 0;
    }
  }
  __syncthreads();
}

// Step 3, first half: start[e] of this block. Block 0 also writes offsets and load.
__device__ void find_starts(const Forward& a, const ForwardMemory& shared) {
  const int experts = a.problem.experts, blocks = gridDim.x, here = blockIdx.x;
  const int wide = power_of_two(experts), parts = wide < kThreads ? kThreads / wide : 1;
  int32_t* total =
      reinterpret_cast<int32_t*>(shared.probability);  // [parts, wide] each; P * stride >= 2 * parts * wide
  int32_t* before = total + parts * wide;
  for (int at = threadIdx.x; at < wide * parts; at += kThreads) {
    const int e = at % wide;
    int32_t all = 0, earlier = 0;
    if (e < experts)
#pragma unroll 4
      for (int block = at / wide; block < blocks; block += parts) {
        const int32_t slots = a.block_slots[static_cast<int64_t>(block) * experts + e];
        all += slots;
        earlier += block < here ? slots : 0;
      }
    total[at] = all;
    before[at] = earlier;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    int32_t all = 0, earlier = 0;
    for (int part = 0; part < parts; ++part) {
      all += total[part * wide + e];
      earlier += before[part * wide + e];
    }
    shared.slots[e] = all;
    shared.start[e] = earlier;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // one warp: an exclusive prefix sum over the experts, 32 at a time
    const int lane = threadIdx.x;
    int32_t carry = 0;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane;
      const int32_t slots = e < experts ? shared.slots[e] : 0;
      int32_t sum = slots;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t left = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += left;
      }
      const int32_t offset = carry + sum - slots;
      if (e < experts) {
        shared.start[e] += offset;
        if (here == 0) {
          a.offsets[e] = offset;
          a.load[e] = slots;
        }
      }
      carry += __shfl_sync(kAllLanes, sum, 31, 32);
    }
    if (here == 0 && lane == 0) a.offsets[experts] = carry;
  }
  __syncthreads();
}

// Step 3, second half, of the experts of this warp: probabilities in order of the blocks, divided by the group's
// tokens.
__device__ void write_importance(const Forward& a) {
  const Problem& problem = a.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x;
  for (int e = blockIdx.x * kWarps + warp; e < problem.experts; e += blocks * kWarps) {
    int group = 0;
    while (problem.bounds[group + 1] <= e) ++group;
    double sum = 0.0;
    int tokens = 0;
    for (int64_t block = lane; block < blocks; block += 32) {
      sum += a.block_probability[block * problem.experts + e];
      tokens += a.block_tokens[block * problem.groups + group];
    }
    for (int step = 16; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
      tokens += __shfl_xor_sync(kAllLanes, tokens, step);
    }
    if (lane == 0) a.importance[e] = tokens == 0 ? 0.0f : static_cast<float>(sum) * (1.0f / static_cast<float>(tokens));
  }
}

template <class Logit>
__global__ void __launch_bounds__(kThreads, 2) route_kernel(const __grid_constant__ Forward a) {
  UNIF2ACE_DYNAMIC_SHARED(memory);
  const Problem& problem = a.problem;
  const ForwardMemory shared(problem, memory);
  const int rows = problem.block_tokens(), experts = problem.experts, blocks = gridDim.x;
  const int64_t passes = (problem.passes() + blocks - 1) / blocks;  // of each block
  const int64_t begin = blockIdx.x * passes * rows;
  const int64_t end = begin + passes * rows < problem.tokens ? begin + passes * rows : problem.tokens;

  for (int e = threadIdx.x; e < experts; e += kThreads) {
    shared.sums[e] = 0.0;
    shared.slots[e] = 0;
    for (int w = 0; w < problem.words(); ++w) shared.taken[e * problem.words() + w] = 0;
  }
  for (int g = threadIdx.x; g < problem.groups; g += kThreads) shared.tokens[g] = 0;
  if (threadIdx.x == 0) *shared.bad = INT32_MAX;
  __syncthreads();
  for (int64_t at = begin; at < end; at += rows) {
    const int live = static_cast<int>(end - at < rows ? end - at : rows);
    route_rows<Logit>(a, shared, at, live, a.block_bad != nullptr);
    __syncthreads();
    count_slots(a, shared, at, live);
  }
  const int64_t block = blockIdx.x;
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    a.block_slots[block * experts + e] = shared.slots[e];
    a.block_probability[block * experts + e] = static_cast<float>(shared.sums[e]);
  }
  for (int g = threadIdx.x; g < problem.groups; g += kThreads)
    a.block_tokens[block * problem.groups + g] = shared.tokens[g];
  if (threadIdx.x == 0 && a.block_bad != nullptr) a.block_bad[block] = *shared.bad;

  cooperative_groups::this_grid().sync();

  find_starts(a, shared);
  const int k = problem.rule.top_k;
  for (int64_t slot = begin * k + threadIdx.x; slot < end * k; slot += kThreads) {
    const int32_t place = shared.start[a.experts[slot]] + a.position[slot];
    a.position[slot] = place;
    a.order[place] = static_cast<int32_t>(slot);
  }
  write_importance(a);
}

}  // namespace unif2ace::routing::gpu
