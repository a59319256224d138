// Arguments of expert_mlp and its backward, checked for everything that memory safety hangs on.
#pragma once

#include <string>
#include <vector>

#include "cpu/experts_rows.h"
#include "cpu/experts_tiles.h"

namespace unif2ace::experts {

struct Mlp {
  Activation activation;
  ScalarType dtype, compute;
  int64_t tokens, hidden, inner, up_rows, experts, top_k, slots;
  Tensor x, weights, offsets_tensor, order_tensor, position_tensor, w_up, w_down;
  std::optional<Tensor> b_up, b_down;
  const int32_t *offsets, *order, *position;

  Mlp(const Tensor& x, const Tensor& weights, const Tensor& offsets, const Tensor& order, const Tensor& position,
      const Tensor& w_up, const Tensor& w_down, const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down,
      const std::string& activation);

  // Row m of the sorted rows belongs to the token of its slot.
  Rows rows_of(const Tensor& tokens_hidden) const {
    return {dtype, tokens_hidden.const_data_ptr(), hidden, order, static_cast<int32_t>(top_k)};
  }
};

// out[t] = sum over k of weight[t, k] row[position[t, k]], in the order of k; rows that are null are left out.
// `weight` null: 1. Rows have dtype `from`, `columns` of them are summed into out[t * stride].
void combine_tokens(const Mlp& p, ScalarType from, const void* const* row, const float* weight, int64_t columns,
                    char* out, int64_t stride, int64_t begin, int64_t end);

// The forward pass for few rows per expert (experts_few.cpp). `pre` null: not wanted.
void forward_few(const Mlp& p, void* y, void* pre);

// Are there so few rows per expert that streaming the weights through dot products beats the library?
bool is_few(ScalarType dtype, int64_t rows, int64_t experts);

}  // namespace unif2ace::experts
