// The backward kernel of `routing` on CUDA: one pass over the logits.
#pragma once

#include "cuda/routing_problem.h"

namespace unif2ace::routing::gpu {

struct Backward {
  Problem problem;
  const float *grad_weights, *grad_importance, *grad_logsumexp;
  const int32_t* experts;
  void* grad_logits;  // [tokens, experts], contiguous
};

struct BackwardMemory {
  float *mean, *grad, *chosen;  // [experts], [P, top_k] twice
  int32_t* tokens;              // [groups]
  int16_t* index;               // [P, top_k]
  unsigned char* end;

  __host__ __device__ BackwardMemory(const Problem& a, unsigned char* memory) {
    Carver carver{memory};
    const int slots = a.block_tokens() * a.rule.top_k;
    mean = carver.take<float>(a.experts);
    grad = carver.take<float>(slots);
    chosen = carver.take<float>(slots);
    tokens = carver.take<int32_t>(a.groups);
    index = carver.take<int16_t>(slots);
    end = carver.at;
  }
};

// mean[e] = grad_importance[e] / tokens of its group. Every block counts for itself, out of the second-level cache: 32
// groups at a time, a warp takes 32 tokens and lane g keeps the number of those of group g.
__device__ void find_means(const Backward& a, const BackwardMemory& shared) {
  const Problem& problem = a.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = threadIdx.x; g < problem.groups; g += kThreads)
    shared.tokens[g] = problem.groups == 1 ? static_cast<int32_t>(problem.tokens) : 0;
  __syncthreads();
  if (problem.groups > 1)
    for (int base = 0; base < problem.groups; base += 32) {
      const int here = problem.groups - base < 32 ? problem.groups - base : 32;
      int found = 0;
      for (int64_t at = warp * 32; at < problem.tokens; at += kThreads) {
        const int group = at + lane < problem.tokens ? problem.group_of(at + lane) - base : -1;
        for (int g = 0; g < here; ++g) {
          const int count = __popc(__ballot_sync(kAllLanes, group == g));
          if (lane == g) found += count;
        }
      }
      if (lane < here) atomicAdd(&shared.tokens[base + lane], found);
    }
  __syncthreads();
  for (int e = threadIdx.x; e < problem.experts; e += kThreads) {
    int group = 0;
    while (problem.bounds[group + 1] <= e) ++group;
    const int tokens = shared.tokens[group];
    shared.mean[e] = (tokens == 0 ? 0.0f : 1.0f / static_cast<float>(tokens)) * a.grad_importance[e];
  }
  __syncthreads();
}

template <class Logit>
__global__ void __launch_bounds__(kThreads, 2) route_backward_kernel(const __grid_constant__ Backward a) {
  UNIF2ACE_DYNAMIC_SHARED(memory);
  const Problem& problem = a.problem;
  const BackwardMemory shared(problem, memory);
  find_means(a, shared);
  const int lanes = problem.lanes, k = problem.rule.top_k, rows = problem.block_tokens(), experts = problem.experts;
  const int i = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  int16_t* index = shared.index + i * k;
  float *grad = shared.grad + i * k, *chosen = shared.chosen + i * k;
  for (int64_t pass = blockIdx.x; pass < problem.passes(); pass += gridDim.x) {
    const int64_t wanted = pass * rows + i, token = wanted < problem.tokens ? wanted : problem.tokens - 1;
    const int group = problem.group_of(token), first = problem.bounds[group], n = problem.bounds[group + 1] - first;
    const Team team(lanes, lane, n);
    __syncwarp();  // the lists of the pass before have been read
    for (int j = lane; j < k; j += lanes) {
      const int column = a.experts[token * k + j] - first;
      index[j] = static_cast<int16_t>(column < 0 ? 0 : column < n ? column : n - 1);  // only memory safety is promised
      grad[j] = problem.rule.scale * a.grad_weights[token * k + j];
    }
    __syncwarp();
    float x[kPart], dx[kPart];
    load_columns(static_cast<const Logit*>(problem.logits) + token * problem.stride_token +
                     (first + lane * kPart) * problem.stride_expert,
                 problem.stride_expert, team.own, x);
    backward_row(team, problem.rule, shared.mean + first, a.grad_logsumexp[token], x, index, grad, chosen, dx);
    if (wanted >= problem.tokens) continue;
    Logit* row = static_cast<Logit*>(a.grad_logits) + token * experts;
    store_columns(dx, team.own, row + first + lane * kPart);
    for (int e = lane; e < first; e += lanes) row[e] = static_cast<Logit>(0.0f);
    for (int e = first + n + lane; e < experts; e += lanes) row[e] = static_cast<Logit>(0.0f);
  }
}

}  // namespace unif2ace::routing::gpu
