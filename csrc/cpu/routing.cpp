// Native CPU kernels of the op `routing`: logits -> top-k experts, weights, stable grouping plan, balance statistics.
//
// Semantics: unif2ace/ops/routing.py. Two passes over the tokens, in parallel by chunks of fixed size:
//   1. scores, choice, weights, logsumexp (routing_tile.h), and per chunk: slots per expert, sums of scores;
//   2. counting sort: an exclusive prefix over (expert, chunk) tells every chunk where its slots of each expert go, so
//      chunks write `order` and `position` independently and the sort is stable.
// All sums run in an order fixed by the shape: the same bits for any number of threads and any instruction set.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/routing_tile.h"
#include "cpu/tensors.h"

namespace unif2ace::routing {
namespace {

// A range of chunks, compiled per instruction set.
template <class F>
UNIF2ACE_INLINE void forward_body(Scoring scoring, const Forward& a, int64_t begin, int64_t end, Scratch& scratch) {
  for (int64_t chunk = begin; chunk < end; ++chunk)
    if (scoring == Scoring::softmax)
      forward_chunk<F, Scoring::softmax>(a, chunk, scratch);
    else
      forward_chunk<F, Scoring::sigmoid>(a, chunk, scratch);
}

template <class F>
UNIF2ACE_INLINE void backward_body(Scoring scoring, const Backward& a, int64_t begin, int64_t end, Scratch& scratch) {
  for (int64_t chunk = begin; chunk < end; ++chunk)
    if (scoring == Scoring::softmax)
      backward_chunk<F, Scoring::softmax>(a, chunk, scratch);
    else
      backward_chunk<F, Scoring::sigmoid>(a, chunk, scratch);
}

UNIF2ACE_MULTIVERSION(run_forward, forward_body,
                      (Scoring scoring, const Forward& a, int64_t begin, int64_t end, Scratch& scratch),
                      (scoring, a, begin, end, scratch))
UNIF2ACE_MULTIVERSION(run_backward, backward_body,
                      (Scoring scoring, const Backward& a, int64_t begin, int64_t end, Scratch& scratch),
                      (scoring, a, begin, end, scratch))

// Checks everything that memory safety hangs on; `widest` receives the columns of the largest group.
Problem make_problem(const Tensor& logits, int64_t top_k, const Tensor* token_group, const std::vector<int64_t>& bounds,
                     bool renormalize, double scale, int* widest) {
  *widest = check_shapes(logits, top_k, token_group != nullptr, bounds, 65536);
  const int groups = static_cast<int>(bounds.size()) - 1;
  const int32_t* group = nullptr;
  if (token_group != nullptr) {
    group = static_cast<const int32_t*>(token_group->const_data_ptr());
    int32_t low = 0, high = 0;
    for (int64_t t = 0; t < logits.size(0); ++t) {
      low = std::min(low, group[t]);
      high = std::max(high, group[t]);
    }
    check(low >= 0 && high < groups, "route: token_group must be 0..", groups - 1, ", got ", low < 0 ? low : high);
  }
  return {logits.scalar_type(),
          logits.const_data_ptr(),
          logits.stride(0),
          logits.stride(1),
          logits.size(0),
          static_cast<int>(logits.size(1)),
          static_cast<int>(top_k),
          groups,
          group,
          bounds.data(),
          renormalize,
          static_cast<float>(scale)};
}

// For every expert 1 / (tokens of its group), or 0 where the group is empty.
std::vector<float> inverse_group_sizes(const Problem& problem) {
  std::vector<float> inverse(problem.experts);
  for (int g = 0; g < problem.groups; ++g) {
    int64_t size = problem.tokens;
    if (problem.token_group != nullptr) size = std::count(problem.token_group, problem.token_group + problem.tokens, g);
    for (int64_t e = problem.group_bounds[g]; e < problem.group_bounds[g + 1]; ++e)
      inverse[e] = size == 0 ? 0.0f : 1.0f / static_cast<float>(size);
  }
  return inverse;
}

// Names the first logit that is NaN or infinite.
[[noreturn]] void refuse_first_bad(const Problem& problem) {
  std::vector<float> row(problem.experts * kLanes);
  for (int64_t t = 0; t < problem.tokens; ++t) {
    int64_t token[kLanes];
    std::fill_n(token, kLanes, t);
    load_tile(problem, token, 0, problem.experts, row.data());
    for (int e = 0; e < problem.experts; ++e)
      check(std::isfinite(row[e * kLanes]), "route: logits must be finite, got ", row[e * kLanes], " at token ", t,
            ", expert ", e);
  }
  refuse("route: logits must be finite");
}

// Sums chunk statistics in chunk order, and turns chunk_load[chunk][e] into the first place of those slots in `order`.
void combine_chunks(const Problem& problem, int64_t chunks, int32_t* chunk_load, const float* chunk_importance,
                    int32_t* load, float* importance, int32_t* offsets) {
  const std::vector<float> inverse = inverse_group_sizes(problem);
  int32_t place = 0;
  for (int e = 0; e < problem.experts; ++e) {
    double sum = 0.0;
    offsets[e] = place;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += chunk_importance[chunk * problem.experts + e];
      const int32_t count = chunk_load[chunk * problem.experts + e];
      chunk_load[chunk * problem.experts + e] = place;
      place += count;
    }
    load[e] = place - offsets[e];
    importance[e] = static_cast<float>(sum) * inverse[e];
  }
  offsets[problem.experts] = place;
}

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan route(const Tensor& logits, int64_t top_k, std::optional<Tensor> token_group, std::vector<int64_t> group_bounds,
           Text scoring, std::optional<Tensor> selection_bias, bool renormalize, double scale, bool check_finite) {
  if (token_group) token_group = argument("route", "token_group", *token_group, ScalarType::Int, logits.size(0));
  if (selection_bias)
    selection_bias = argument("route", "selection_bias", *selection_bias, ScalarType::Float, logits.size(1));
  int widest = 0;
  const Problem problem =
      make_problem(logits, top_k, token_group ? &*token_group : nullptr, group_bounds, renormalize, scale, &widest);
  const int64_t tokens = problem.tokens, experts = problem.experts, slots = tokens * top_k;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;

  const int32_t f32 = aoti_torch_dtype_float32(), i32 = aoti_torch_dtype_int32();
  Tensor weights = empty_cpu<2>({tokens, top_k}, f32), chosen = empty_cpu<2>({tokens, top_k}, i32);
  Tensor offsets = empty_cpu<1>({experts + 1}, i32), order = empty_cpu<1>({slots}, i32);
  Tensor position = empty_cpu<1>({slots}, i32), load = empty_cpu<1>({experts}, i32);
  Tensor importance = empty_cpu<1>({experts}, f32), logsumexp = empty_cpu<1>({tokens}, f32);
  std::vector<int32_t> chunk_load(chunks * experts);
  std::vector<float> chunk_importance(chunks * experts);
  std::vector<uint8_t> chunk_bad(chunks);

  const int32_t* experts_of_slot = static_cast<const int32_t*>(chosen.const_data_ptr());
  const Forward a{problem,
                  selection_bias ? static_cast<const float*>(selection_bias->const_data_ptr()) : nullptr,
                  static_cast<float*>(weights.mutable_data_ptr()),
                  static_cast<int32_t*>(chosen.mutable_data_ptr()),
                  static_cast<float*>(logsumexp.mutable_data_ptr()),
                  chunk_load.data(),
                  chunk_importance.data(),
                  chunk_bad.data()};
  const Scoring how = parse_scoring(scoring.value);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(problem, widest);
    run_forward(how, a, begin, end, scratch);
  });
  if (check_finite && std::find(chunk_bad.begin(), chunk_bad.end(), 1) != chunk_bad.end()) refuse_first_bad(problem);

  combine_chunks(problem, chunks, chunk_load.data(), chunk_importance.data(),
                 static_cast<int32_t*>(load.mutable_data_ptr()), static_cast<float*>(importance.mutable_data_ptr()),
                 static_cast<int32_t*>(offsets.mutable_data_ptr()));
  int32_t* order_data = static_cast<int32_t*>(order.mutable_data_ptr());
  int32_t* position_data = static_cast<int32_t*>(position.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* next = chunk_load.data() + chunk * experts;
      const int64_t last = std::min((chunk + 1) * kChunk * top_k, slots);
      for (int64_t slot = chunk * kChunk * top_k; slot < last; ++slot) {
        const int32_t place = next[experts_of_slot[slot]]++;
        order_data[place] = static_cast<int32_t>(slot);
        position_data[slot] = place;
      }
    }
  });
  return {weights, chosen, offsets, order, position, load, importance, logsumexp};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& grad_importance, const Tensor& grad_logsumexp,
                      const Tensor& logits, const Tensor& experts, std::optional<Tensor> token_group,
                      std::vector<int64_t> group_bounds, Text scoring, bool renormalize, double scale) {
  check(experts.dim() == 2, "route: experts must be [T, K], got ", experts.dim(), " dimensions");
  const int64_t tokens = logits.size(0), top_k = experts.size(1);
  if (token_group) token_group = argument("route", "token_group", *token_group, ScalarType::Int, tokens);
  int widest = 0;
  const Problem problem =
      make_problem(logits, top_k, token_group ? &*token_group : nullptr, group_bounds, renormalize, scale, &widest);
  const Tensor weights_c = argument("route", "grad_weights", grad_weights, ScalarType::Float, tokens * top_k);
  const Tensor importance_c = argument("route", "grad_importance", grad_importance, ScalarType::Float, problem.experts);
  const Tensor logsumexp_c = argument("route", "grad_logsumexp", grad_logsumexp, ScalarType::Float, tokens);
  const Tensor experts_c = argument("route", "experts", experts, ScalarType::Int, tokens * top_k);
  Tensor grad_logits = empty_cpu<2>({tokens, problem.experts}, aoti_dtype(logits));

  std::vector<float> grad_mean = inverse_group_sizes(problem);
  const float* grad = static_cast<const float*>(importance_c.const_data_ptr());
  for (int e = 0; e < problem.experts; ++e) grad_mean[e] *= grad[e];
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<uint8_t> chunk_bad(chunks);
  const Backward a{problem,
                   static_cast<const float*>(weights_c.const_data_ptr()),
                   grad_mean.data(),
                   static_cast<const float*>(logsumexp_c.const_data_ptr()),
                   static_cast<const int32_t*>(experts_c.const_data_ptr()),
                   grad_logits.mutable_data_ptr(),
                   chunk_bad.data()};
  const Scoring how = parse_scoring(scoring.value);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(problem, widest);
    run_backward(how, a, begin, end, scratch);
  });
  check(std::find(chunk_bad.begin(), chunk_bad.end(), 1) == chunk_bad.end(),
        "route: experts must be those that their token can see");
  return grad_logits;
}

}  // namespace
}  // namespace unif2ace::routing

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("route", TORCH_BOX(&unif2ace::routing::route));
  m.impl("route_backward", TORCH_BOX(&unif2ace::routing::route_backward));
}
