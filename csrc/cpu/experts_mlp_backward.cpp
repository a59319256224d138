// Native CPU kernels of the op `experts`: the expert MLP, backward.
//
// With G = gradient of y in the rows of an expert (the row of token t for each of its slots), w the routing weights of
// those rows, P the saved pre-activation, a = act(P), D = G W_down (the gradient of a before weighting):
//
//   dw = <D, a> + <G, b_down>        the same as <G, W_down a + b_down>, without computing the down projection again
//   dP = w D a'(P)                   db_up   = column sums of dP
//   dx = sum over k of dP W_up       db_down = column sums of w G
//   dW_up = dP^T X                   dW_down = G^T (w a)
//
// Four products of the forward size, in two sweeps. Tiles first: D, dw, dP, w a, dP W_up, column sums. Then, with dP
// and w a of all rows in memory (slots * (I_up + I) elements), strips of columns of dW: the gathered G and X are
// transposed on the way into the product over all rows of the expert. Sums run in an order fixed by the shape and the
// load.
#include <cstring>
#include <tuple>

#include "cpu/experts_gradient.h"
#include "cpu/experts_mlp.h"

namespace unif2ace::experts {
namespace {

struct TileScratch {
  Buffer grad, weight, dot;
  Matrices::Cache w_up, w_down;
};

// What the first sweep leaves behind.
struct Rowwise {
  Tensor act, grad_pre;                       // [padded rows, I and I_up]: w a and dP, zeros in the padding
  std::vector<std::optional<Tensor>> grad_x;  // [tiles]: dP W_up
  std::vector<const void*> grad_x_row;        // [slots], null beyond the last offset
  std::vector<float> up_sums, down_sums;      // [tiles, I_up] and, with b_down, [tiles, H]
};

Rowwise sweep_tiles(const Mlp& p, const Tiles& cut, const Tensor& grad, const char* pre, float* grad_weights) {
  const int64_t count = cut.tiles.size(), padded = cut.place.back(), size = size_of(p.compute);
  const int32_t compute = p.compute == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  Rowwise out{empty_cpu<2>({padded, p.inner}, compute), empty_cpu<2>({padded, p.up_rows}, compute), {}, {}, {}, {}};
  out.grad_x.resize(count);
  out.grad_x_row.resize(p.slots, nullptr);
  out.up_sums.resize(count * p.up_rows);
  std::vector<float> b_down(p.b_down ? p.experts * p.hidden : 0);
  if (p.b_down) {
    out.down_sums.resize(count * p.hidden);
    to_float(p.dtype, p.b_down->const_data_ptr(), p.experts * p.hidden, b_down.data());
  }
  const Rows source = p.rows_of(grad);
  const Matrices w_up(p.w_up, p.up_rows, p.hidden), w_down(p.w_down, p.hidden, p.inner);
  const float* weights = pointer<float>(p.weights);

  run_tasks<TileScratch>(count, [&](int64_t i, TileScratch& scratch) {
    const int64_t task = cut.by_size[i];
    const Tile& tile = cut.tiles[task];
    void* g = scratch.grad.fit(tile.padded * p.hidden * size);
    float* weight = scratch.weight.fit<float>(tile.rows * sizeof(float));
    float* dot = scratch.dot.fit<float>(tile.rows * sizeof(float));
    gather(source, tile.begin, tile.rows, tile.padded, g);
    for (int64_t r = 0; r < tile.rows; ++r) weight[r] = weights[p.order[tile.begin + r]];
    const Tensor grad_act =
        linear(matrix(g, tile.padded, p.hidden, p.hidden, p.compute), w_down.transposed(tile.expert, scratch.w_down));
    char* act = mutable_pointer<char>(out.act) + tile.place * p.inner * size;
    char* grad_pre = mutable_pointer<char>(out.grad_pre) + tile.place * p.up_rows * size;
    activation_gradient({p.activation, p.dtype, tile.rows, p.inner, pre + tile.begin * p.up_rows * size_of(p.dtype),
                         grad_act.const_data_ptr(), weight, act, grad_pre, dot});
    weighted_sum(p.compute, grad_pre, tile.rows, p.up_rows, nullptr, out.up_sums.data() + task * p.up_rows);
    std::memset(act + tile.rows * p.inner * size, 0, (tile.padded - tile.rows) * p.inner * size);
    std::memset(grad_pre + tile.rows * p.up_rows * size, 0, (tile.padded - tile.rows) * p.up_rows * size);
    if (p.b_down) {
      add_dots(p.compute, g, tile.rows, p.hidden, b_down.data() + tile.expert * p.hidden, dot);
      weighted_sum(p.compute, g, tile.rows, p.hidden, weight, out.down_sums.data() + task * p.hidden);
    }
    for (int64_t r = 0; r < tile.rows; ++r) grad_weights[p.order[tile.begin + r]] = dot[r];
    out.grad_x[task] = linear(matrix(grad_pre, tile.padded, p.up_rows, p.up_rows, p.compute),
                              w_up.transposed(tile.expert, scratch.w_up));
    const char* rows = static_cast<const char*>(out.grad_x[task]->const_data_ptr());
    for (int64_t r = 0; r < tile.rows; ++r) out.grad_x_row[tile.begin + r] = rows + r * p.hidden * size;
  });
  return out;
}

struct StripScratch {
  Buffer transposed;
};

// One strip of dW_down: rows first .. first + columns - 1 of the matrix.
void down_strip(const Mlp& p, const Tiles& cut, const Strip& strip, const Rows& grad, const Tensor& act, char* out,
                Buffer& memory) {
  const int64_t begin = p.offsets[strip.expert], rows = p.offsets[strip.expert + 1] - begin;
  out += (strip.expert * p.hidden + strip.first) * p.inner * size_of(p.dtype);
  if (rows == 0) {
    std::memset(out, 0, strip.columns * p.inner * size_of(p.dtype));
    return;
  }
  const void* right = pointer<char>(act) + cut.place[strip.expert] * p.inner * size_of(p.compute);
  const Tensor result = strip_product(grad, begin, rows, strip, right, p.inner, memory);
  narrow(p.dtype, result.const_data_ptr(), strip.columns * p.inner, out);
}

// One strip of dW_up: columns of the matrix. The product gives them as rows; they are turned when stored, which moves
// I_up numbers for each column where turning dP would move as many as there are rows.
void up_strip(const Mlp& p, const Tiles& cut, const Strip& strip, const Rows& x, const Tensor& grad_pre, char* out,
              Buffer& memory) {
  const int64_t begin = p.offsets[strip.expert], rows = p.offsets[strip.expert + 1] - begin;
  const int64_t size = size_of(p.dtype);
  out += (strip.expert * p.up_rows * p.hidden + strip.first) * size;
  if (rows == 0) {
    for (int64_t i = 0; i < p.up_rows; ++i) std::memset(out + i * p.hidden * size, 0, strip.columns * size);
    return;
  }
  const void* right = pointer<char>(grad_pre) + cut.place[strip.expert] * p.up_rows * size_of(p.compute);
  const Tensor result = strip_product(x, begin, rows, strip, right, p.up_rows, memory);
  store_transposed(p.dtype, result.const_data_ptr(), strip.columns, p.up_rows, out, p.hidden);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& saved, const Tensor& weights, const Tensor& offsets,
    const Tensor& order, const Tensor& position, const Tensor& w_up, const Tensor& w_down, std::optional<Tensor> b_up,
    std::optional<Tensor> b_down, Text activation) {
  const Mlp p(x, weights, offsets, order, position, w_up, w_down, b_up, b_down, activation.value);
  const Tensor grad = argument("expert_mlp", "the gradient", grad_y, p.dtype, p.tokens * p.hidden);
  const Tensor pre = argument("expert_mlp", "the pre-activation", saved, p.dtype, p.slots * p.up_rows);
  const int32_t dtype = aoti_dtype(x);
  Tensor grad_x = empty_cpu<2>({p.tokens, p.hidden}, dtype);
  Tensor grad_weights = empty_cpu<2>({p.tokens, p.top_k}, aoti_torch_dtype_float32());
  Tensor grad_w_up = empty_cpu<3>({p.experts, p.up_rows, p.hidden}, dtype);
  Tensor grad_w_down = empty_cpu<3>({p.experts, p.hidden, p.inner}, dtype);
  Tensor grad_b_up = p.b_up ? empty_cpu<2>({p.experts, p.up_rows}, dtype) : empty_cpu<1>({0}, dtype);
  Tensor grad_b_down = p.b_down ? empty_cpu<2>({p.experts, p.hidden}, dtype) : empty_cpu<1>({0}, dtype);

  const Tiles cut(p.offsets, p.experts, kBackwardTiles);
  float* weight_gradients = mutable_pointer<float>(grad_weights);
  const Rowwise rowwise = sweep_tiles(p, cut, grad, pointer<char>(pre), weight_gradients);
  for (int64_t m = p.offsets[p.experts]; m < p.slots; ++m) weight_gradients[p.order[m]] = 0.0f;

  const std::vector<Strip> strips = make_strips(p.offsets, p.experts, p.hidden, p.compute);
  const int64_t count = strips.size();
  const Rows rows_of_grad = p.rows_of(grad), rows_of_x = p.rows_of(p.x);
  run_tasks<StripScratch>(2 * count, [&](int64_t task, StripScratch& scratch) {
    if (task < count)
      down_strip(p, cut, strips[task], rows_of_grad, rowwise.act, mutable_pointer<char>(grad_w_down),
                 scratch.transposed);
    else
      up_strip(p, cut, strips[task - count], rows_of_x, rowwise.grad_pre, mutable_pointer<char>(grad_w_up),
               scratch.transposed);
  });
  for (int64_t e = 0; e < p.experts; ++e) {
    if (p.b_up) sum_tiles(cut, e, p.dtype, rowwise.up_sums, p.up_rows, mutable_pointer<char>(grad_b_up));
    if (p.b_down) sum_tiles(cut, e, p.dtype, rowwise.down_sums, p.hidden, mutable_pointer<char>(grad_b_down));
  }
  torch::stable::parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
    combine_tokens(p, p.compute, rowwise.grad_x_row.data(), nullptr, p.hidden, mutable_pointer<char>(grad_x), p.hidden,
                   begin, end);
  });
  return {grad_x, grad_weights, grad_w_up, grad_w_down, grad_b_up, grad_b_down};
}

}  // namespace
}  // namespace unif2ace::experts

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("expert_mlp_backward", TORCH_BOX(&unif2ace::experts::expert_mlp_backward));
}
