// Native CUDA kernels of the op `routing`: logits -> the complete plan in one launch, the gradient in another.
//
// Semantics: unif2ace/ops/routing.py; a row: cuda/routing_row.h. A block of 256 threads takes P = 256 / lanes tokens at
// a time, where a team of `lanes` = E / 16 lanes (a power of two, at most 32) works on one token. Blocks own contiguous
// ranges of tokens, and all blocks are resident at once (a cooperative launch), so one launch serves every size:
//
//   1. rows. P tokens at a time: scores, choice, weights. Bit (e, i) of a table in shared memory says that token i
//   chose
//      expert e, so the rank of a slot among its block's slots of the same expert is a count of bits: earlier tokens.
//      Per block: slots and probabilities per expert, tokens per group.
//   2. all blocks wait for each other.
//   3. plan. Each block adds the slots of all blocks (those before it apart): offsets[e] and where its own slots of e
//      start; place = start + rank. Warps add the importance of one expert each, in order of the blocks.
//
// Stable by construction, no atomics in any result: the only ones (bits and counts in shared memory) commute exactly.
// The importance sums depend on how many blocks there are, hence on the chip, not on chance.
//
// Cost: T * E logits and T * K * 20 bytes of plan and ranks; per block 8 E bytes, which every block reads again from
// the second-level cache. For 8192 tokens, 64 experts, k = 8 in bfloat16: 2.4 MB, 0.6 us at 4 TB/s; 128 blocks read 4
// MB of counts. So the floor is latency: one launch, one wait of all blocks for each other, K passes of the selection.
#include <tuple>

#include <cooperative_groups.h>

#include "cuda/device.h"
#include "cuda/routing_row.h"

namespace unif2ace::routing {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

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

struct Backward {
  Problem problem;
  const float *grad_weights, *grad_importance, *grad_logsumexp;
  const int32_t* experts;
  void* grad_logits;  // [tokens, experts], contiguous
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

// ---------------------------------------------------------------------------------------------------------------- host

Problem make_problem(const Tensor& logits, int64_t top_k, const Tensor* token_group, const std::vector<int64_t>& bounds,
                     const std::string& scoring, bool renormalize, double scale) {
  check_shapes(logits, top_k, token_group != nullptr, bounds, kMostExperts);
  check(top_k <= kMostChoices, "route: the CUDA kernels take top_k up to ", kMostChoices, ", got ", top_k);
  Problem problem = {
      logits.const_data_ptr(),
      logits.stride(0),
      logits.stride(1),
      logits.size(0),
      token_group == nullptr ? nullptr : pointer<int32_t>(*token_group),
      static_cast<int>(logits.size(1)),
      static_cast<int>(bounds.size()) - 1,
      power_of_two((static_cast<int>(logits.size(1)) + kPart - 1) / kPart),
      {parse_scoring(scoring) == Scoring::sigmoid, renormalize, static_cast<int>(top_k), static_cast<float>(scale)},
      {}};
  std::copy(bounds.begin(), bounds.end(), problem.bounds);
  return problem;
}

// Blocks that can be on the device at the same time, at most as many as there is work for, at least one.
template <class Kernel>
int64_t resident_blocks(const DeviceScope& device, Kernel kernel, size_t shared_bytes, int64_t wanted) {
  int per_multiprocessor = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, shared_bytes),
             "route");
  const int64_t most = int64_t(per_multiprocessor) * device.attribute(cudaDevAttrMultiProcessorCount);
  return std::max<int64_t>(1, std::min(most, wanted));
}

template <class Call>
void for_dtype(ScalarType dtype, Call call) {
  if (dtype == ScalarType::Float)
    call(float{});
  else if (dtype == ScalarType::BFloat16)
    call(BFloat16{});
  else
    call(Half{});
}

// check_finite: waits for the device and names the first token with a bad logit or group.
void refuse_bad(const DeviceScope& device, const int32_t* block_bad, int64_t blocks, int groups) {
  std::vector<int32_t> bad(blocks);
  check_cuda(cudaMemcpyAsync(bad.data(), block_bad, blocks * sizeof(int32_t), cudaMemcpyDeviceToHost, device.stream()),
             "route");
  check_cuda(cudaStreamSynchronize(device.stream()), "route");
  const int32_t token = *std::min_element(bad.begin(), bad.end());
  check(token == INT32_MAX, "route: logits must be finite and token_group 0..", groups - 1, ", which token ", token,
        " violates");
}

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan route(const Tensor& logits, int64_t top_k, std::optional<Tensor> token_group, std::vector<int64_t> group_bounds,
           Text scoring, std::optional<Tensor> selection_bias, bool renormalize, double scale, bool check_finite) {
  const DeviceScope device("route", logits);
  if (token_group) token_group = argument("route", "token_group", *token_group, ScalarType::Int, logits.size(0));
  if (selection_bias)
    selection_bias = argument("route", "selection_bias", *selection_bias, ScalarType::Float, logits.size(1));
  const Problem problem = make_problem(logits, top_k, token_group ? &*token_group : nullptr, group_bounds,
                                       scoring.value, renormalize, scale);
  const int64_t tokens = problem.tokens, experts = problem.experts, slots = tokens * top_k;
  const int32_t f32 = aoti_torch_dtype_float32(), i32 = aoti_torch_dtype_int32();
  Tensor weights = device.empty<2>({tokens, top_k}, f32), chosen = device.empty<2>({tokens, top_k}, i32);
  Tensor offsets = device.empty<1>({experts + 1}, i32), order = device.empty<1>({slots}, i32);
  Tensor position = device.empty<1>({slots}, i32), load = device.empty<1>({experts}, i32);
  Tensor importance = device.empty<1>({experts}, f32), logsumexp = device.empty<1>({tokens}, f32);

  for_dtype(logits.scalar_type(), [&](auto logit) {
    const auto kernel = route_kernel<decltype(logit)>;
    const size_t shared_bytes = ForwardMemory(problem, nullptr).end - static_cast<unsigned char*>(nullptr);
    const int64_t blocks = resident_blocks(device, kernel, shared_bytes, problem.passes());
    const Tensor scratch = device.empty<1>({blocks * (2 * experts + problem.groups + 1)}, i32);  // one allocation
    int32_t* block_slots = mutable_pointer<int32_t>(scratch);
    int32_t* block_tokens = block_slots + 2 * blocks * experts;
    int32_t* block_bad = block_tokens + blocks * problem.groups;
    const Forward a{problem,
                    selection_bias ? pointer<float>(*selection_bias) : nullptr,
                    mutable_pointer<float>(weights),
                    mutable_pointer<int32_t>(chosen),
                    mutable_pointer<int32_t>(offsets),
                    mutable_pointer<int32_t>(order),
                    mutable_pointer<int32_t>(position),
                    mutable_pointer<int32_t>(load),
                    mutable_pointer<float>(importance),
                    mutable_pointer<float>(logsumexp),
                    block_slots,
                    reinterpret_cast<float*>(block_slots + blocks * experts),
                    block_tokens,
                    check_finite ? block_bad : nullptr};
    device.launch(kernel, blocks, kThreads, shared_bytes, true, a);
    if (check_finite) refuse_bad(device, block_bad, blocks, problem.groups);
  });
  return {weights, chosen, offsets, order, position, load, importance, logsumexp};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& grad_importance, const Tensor& grad_logsumexp,
                      const Tensor& logits, const Tensor& experts, std::optional<Tensor> token_group,
                      std::vector<int64_t> group_bounds, Text scoring, bool renormalize, double scale) {
  check(experts.dim() == 2, "route: experts must be [T, K], got ", experts.dim(), " dimensions");
  const DeviceScope device("route", logits);
  const int64_t tokens = logits.size(0), top_k = experts.size(1);
  if (token_group) token_group = argument("route", "token_group", *token_group, ScalarType::Int, tokens);
  const Problem problem = make_problem(logits, top_k, token_group ? &*token_group : nullptr, group_bounds,
                                       scoring.value, renormalize, scale);
  const Tensor weights_c = argument("route", "grad_weights", grad_weights, ScalarType::Float, tokens * top_k);
  const Tensor importance_c = argument("route", "grad_importance", grad_importance, ScalarType::Float, problem.experts);
  const Tensor logsumexp_c = argument("route", "grad_logsumexp", grad_logsumexp, ScalarType::Float, tokens);
  const Tensor experts_c = argument("route", "experts", experts, ScalarType::Int, tokens * top_k);
  Tensor grad_logits = device.empty<2>({tokens, problem.experts}, aoti_dtype(logits));
  if (tokens == 0) return grad_logits;
  const Backward a{problem,
                   pointer<float>(weights_c),
                   pointer<float>(importance_c),
                   pointer<float>(logsumexp_c),
                   pointer<int32_t>(experts_c),
                   grad_logits.mutable_data_ptr()};
  for_dtype(logits.scalar_type(), [&](auto logit) {
    const auto kernel = route_backward_kernel<decltype(logit)>;
    const size_t shared_bytes = BackwardMemory(problem, nullptr).end - static_cast<unsigned char*>(nullptr);
    // No more blocks than run at once: each counts the groups' tokens anew.
    const int64_t blocks = resident_blocks(device, kernel, shared_bytes, problem.passes());
    device.launch(kernel, blocks, kThreads, shared_bytes, false, a);
  });
  return grad_logits;
}

}  // namespace
}  // namespace unif2ace::routing

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CUDA, m) {
  m.impl("route", TORCH_BOX(&unif2ace::routing::route));
  m.impl("route_backward", TORCH_BOX(&unif2ace::routing::route_backward));
}
