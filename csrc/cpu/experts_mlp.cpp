// Native CPU kernels of the op `experts`: the whole expert MLP, forward.
//
// Semantics: unif2ace/ops/experts.py. For every tile (experts_tiles.h) one thread gathers the token rows, multiplies
// them with W_up of their expert, activates, and multiplies with W_down; then every token adds its K rows up in the
// order of k. The products are the library's (gemm.h), biases included; the results of the down products stay where the
// library wrote them until they are added up. Memory beside the results: slots * hidden elements, and one tile per
// thread.
//
// Few rows per expert go another way: experts_few.cpp. The backward pass: experts_mlp_backward.cpp.
//
// Which bits: those of a token depend on its row, its experts and the library, not on the number of threads nor on the
// other tokens, as long as the batch stays on one side of is_few() or the caller says on which: dot products sum in
// another order than the library.
#include <cstring>
#include <tuple>

#include "cpu/experts_mlp.h"

namespace unif2ace::experts {
namespace {

Activation parse_activation(const std::string& name) {
  static const char* const names[] = {"gelu_tanh", "gelu", "silu", "relu2", "swiglu", "geglu"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  refuse("expert_mlp: activation must be one of gelu_tanh, gelu, silu, relu2, swiglu, geglu, got '", name, "'");
}

struct Scratch {
  Buffer rows, act;
  Matrices::Cache w_up, w_down, b_up, b_down;
};

void forward_tiles(const Mlp& p, void* y, char* pre_out) {
  const Tiles cut(p.offsets, p.experts, forward_tile_count());
  const Rows source = p.rows_of(p.x);
  const Matrices w_up(p.w_up, p.up_rows, p.hidden), w_down(p.w_down, p.hidden, p.inner);
  const Biases b_up(p.b_up, p.up_rows), b_down(p.b_down, p.hidden);
  const int64_t size = size_of(p.compute);
  std::vector<std::optional<Tensor>> down(cut.tiles.size());
  std::vector<const void*> row(p.slots, nullptr);
  run_tasks<Scratch>(cut.tiles.size(), [&](int64_t i, Scratch& scratch) {
    const int64_t task = cut.by_size[i];
    const Tile& tile = cut.tiles[task];
    void* x = scratch.rows.fit(tile.padded * p.hidden * size);
    void* act = scratch.act.fit(tile.padded * p.inner * size);
    gather(source, tile.begin, tile.rows, tile.padded, x);
    const Tensor pre = product(matrix(x, tile.padded, p.hidden, p.hidden, p.compute),
                               w_up.of(tile.expert, scratch.w_up), b_up.of(tile.expert, scratch.b_up));
    activate(p.activation, p.compute, pre.const_data_ptr(), tile.padded, p.inner, act);
    if (pre_out != nullptr)
      narrow(p.dtype, pre.const_data_ptr(), tile.rows * p.up_rows, pre_out + tile.begin * p.up_rows * size_of(p.dtype));
    down[task] = product(matrix(act, tile.padded, p.inner, p.inner, p.compute), w_down.of(tile.expert, scratch.w_down),
                         b_down.of(tile.expert, scratch.b_down));
    const char* result = static_cast<const char*>(down[task]->const_data_ptr());
    for (int64_t r = 0; r < tile.rows; ++r) row[tile.begin + r] = result + r * p.hidden * size;
  });
  torch::stable::parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
    combine_tokens(p, p.compute, row.data(), pointer<float>(p.weights), p.hidden, static_cast<char*>(y), p.hidden,
                   begin, end);
  });
}

std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& weights, const Tensor& offsets,
                                      const Tensor& order, const Tensor& position, const Tensor& w_up,
                                      const Tensor& w_down, std::optional<Tensor> b_up, std::optional<Tensor> b_down,
                                      Text activation, bool save, std::optional<bool> few) {
  const Mlp p(x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation.value);
  Tensor y = empty_cpu<2>({p.tokens, p.hidden}, aoti_dtype(x));
  Tensor pre = empty_cpu<2>({save ? p.slots : 0, p.up_rows}, aoti_dtype(x));
  char* pre_data = save ? mutable_pointer<char>(pre) : nullptr;
  if (few.value_or(is_few(p.dtype, p.slots, p.experts)))
    forward_few(p, y.mutable_data_ptr(), pre_data);
  else
    forward_tiles(p, y.mutable_data_ptr(), pre_data);
  const int64_t used = p.offsets[p.experts], row_bytes = p.up_rows * size_of(p.dtype);
  if (save && used < p.slots && row_bytes > 0)
    std::memset(pre_data + used * row_bytes, 0, (p.slots - used) * row_bytes);
  return {y, pre};
}

}  // namespace

Mlp::Mlp(const Tensor& x_, const Tensor& weights_, const Tensor& offsets_, const Tensor& order_,
         const Tensor& position_, const Tensor& w_up_, const Tensor& w_down_, const std::optional<Tensor>& b_up_,
         const std::optional<Tensor>& b_down_, const std::string& activation_)
    : activation(parse_activation(activation_)),
      dtype(x_.scalar_type()),
      compute(compute_dtype(dtype)),
      x(dense(x_)),
      weights(weights_),
      offsets_tensor(offsets_),
      order_tensor(order_),
      position_tensor(position_),
      w_up(w_up_),
      w_down(w_down_) {
  const char* op = "expert_mlp";
  check_float(op, "x", x);
  check(x.dim() == 2 && weights.dim() == 2 && weights.size(0) == x.size(0),
        "expert_mlp: x must be [T, H] and plan.weights [T, K]");
  check(w_down.dim() == 3, "expert_mlp: w_down must be [E, H, I], got ", w_down.dim(), " dimensions");
  tokens = x.size(0);
  hidden = x.size(1);
  experts = w_down.size(0);
  inner = w_down.size(2);
  up_rows = (is_gated(activation) ? 2 : 1) * inner;
  top_k = weights.size(1);
  slots = tokens * top_k;
  check(slots <= INT32_MAX, "expert_mlp: T * K must fit into int32, got ", slots);
  weights = argument(op, "plan.weights", weights, ScalarType::Float, slots);
  offsets_tensor = argument(op, "plan.offsets", offsets_tensor, ScalarType::Int, experts + 1);
  order_tensor = argument(op, "plan.order", order_tensor, ScalarType::Int, slots);
  position_tensor = argument(op, "plan.position", position_tensor, ScalarType::Int, slots);
  w_up = argument(op, "w_up", w_up, dtype, experts * up_rows * hidden);
  w_down = argument(op, "w_down", w_down, dtype, experts * hidden * inner);
  if (b_up_) b_up = argument(op, "b_up", *b_up_, dtype, experts * up_rows);
  if (b_down_) b_down = argument(op, "b_down", *b_down_, dtype, experts * hidden);
  offsets = checked_offsets("expert_mlp: plan.offsets", offsets_tensor, experts, slots);
  order = pointer<int32_t>(order_tensor);
  position = pointer<int32_t>(position_tensor);
  for (int64_t m = 0; m < slots; ++m)  // one being the inverse of the other, both are permutations
    check(order[m] >= 0 && order[m] < slots && position[order[m]] == m,
          "expert_mlp: plan.order and plan.position must be permutations of 0..", slots - 1,
          ", each the inverse of the other, got order[", m, "] = ", order[m]);
}

void combine_tokens(const Mlp& p, ScalarType from, const void* const* row, const float* weight, int64_t columns,
                    char* out, int64_t stride, int64_t begin, int64_t end) {
  std::vector<const void*> chosen(p.top_k);
  std::vector<float> weights(p.top_k);
  for (int64_t t = begin; t < end; ++t) {
    int64_t count = 0;
    for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
      if (row[p.position[slot]] == nullptr) continue;
      chosen[count] = row[p.position[slot]];
      weights[count++] = weight == nullptr ? 1.0f : weight[slot];
    }
    combine(from, p.dtype, chosen.data(), weights.data(), count, columns, out + t * stride * size_of(p.dtype));
  }
}

}  // namespace unif2ace::experts

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&unif2ace::experts::expert_mlp));
}
