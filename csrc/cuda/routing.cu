// Native CUDA kernels of the op `routing`: logits -> the complete plan in one launch, the gradient in another.
//
// Semantics: unif2ace/ops/routing.py; a row: cuda/routing_row.h. A block of 256 threads takes P = 256 / lanes tokens at
// a time, where a team of `lanes` = E / 16 lanes (a power of two, at most 32) works on one token. Blocks own contiguous
// ranges of tokens, and all blocks are resident at once (a cooperative launch), so one launch serves every size; its
// steps stand in routing_forward.h.
//
// Cost: T * E logits and T * K * 20 bytes of plan and ranks; per block 8 E bytes, which every block reads again from
// the second-level cache. For 8192 tokens, 64 experts, k = 8 in bfloat16: 2.4 MB, 0.6 us at 4 TB/s; 128 blocks read 4
// MB of counts. So the floor is latency: one launch, one wait of all blocks for each other, K passes of the selection.
#include <tuple>

#include "cuda/routing_backward.h"
#include "cuda/routing_forward.h"

namespace unif2ace::routing::gpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

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
}  // namespace unif2ace::routing::gpu

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CUDA, m) {
  m.impl("route", TORCH_BOX(&unif2ace::routing::gpu::route));
  m.impl("route_backward", TORCH_BOX(&unif2ace::routing::gpu::route_backward));
}
