// Native CPU kernel of the op `diffusion_loss`: linear head + loss, values and gradients, logits never whole in memory.
//
// Semantics: unif2ace/ops/diffusion_loss.py. The rows that count are gathered into chunks of 512 or so. The logits of
// a chunk live as blocks of columns, z_b [rows, width], each a matrix of its own; with W_b the rows of the head for b:
//   1. blocks in parallel:  z_b = h W_b^T + bias_b, and its row statistics       (diffusion_loss_block.h)
//   2. rows in parallel:    statistics of all blocks -> softmax, nll, mass
//   3. blocks in parallel:  z_b -> gradients in place, bias gradient; dW_b += z_b^T h while z_b is still in cache
//   4. rows in parallel:    dh = sum_b z_b W_b, blocks in order
// Every product runs on one thread over a slice that the shape alone decides: the same bits for any number of threads.
//
// Cost: 6 R H V FLOPs, R counting the rows that are not ignored. Extra memory: 512 V logits (or 16 MiB), and V H
// float32 for the weight gradient of a 16-bit head. Adding to dW moves 8 V H bytes a chunk: at 20 GB/s against 450
// GFLOP/s that is 6 % of the products' time with 512 rows, whatever V and H are. (Blocks first, all rows of each, would
// finish dW at once, but needs the logits twice: a third more FLOPs.) float16, for which the library has no fast
// product, is computed in float32.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/diffusion_loss_arguments.h"
#include "cpu/diffusion_loss_block.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace unif2ace::diffusion_loss {
namespace {

// Rows of a chunk: at least 512 (see above), more while the logits stay below 16 MiB: fewer, larger products.
constexpr int64_t kMinChunkRows = 512, kChunkLogits = 1 << 22;
// Columns of a block: wide enough for the product, narrow enough for 16 tasks. One thread of a Zen 5, 256 rows, H =
// 512, float32: 217 GFLOP/s at a width of 256, 234 at 512, 237 at 1024. A block is a matrix of its own, since oneDNN
// falls back to a reference loop where the rows of w are not adjacent.
constexpr int64_t kMinWidth = 256, kMaxWidth = 512;
// Rows of a task of step 4, at least 8 tasks where rows suffice: 203 GFLOP/s at 64 rows, 235 at 256 (width 512).
constexpr int64_t kMinSlice = 64, kMaxSlice = 128;

template <class F>
UNIF2ACE_INLINE void statistics_body(ScalarType dtype, const Block& block, const Rows& rows) {
  if (dtype == ScalarType::Float)
    statistics<F, float>(block, rows);
  else
    statistics<F, BFloat16>(block, rows);
}

template <class F>
UNIF2ACE_INLINE void gradients_body(ScalarType dtype, const Block& block, const Rows& rows, float* group) {
  if (dtype == ScalarType::Float)
    gradients<F, float>(block, rows, group);
  else
    gradients<F, BFloat16>(block, rows, group);
}

template <class F>
UNIF2ACE_INLINE void combine_body(const Block* blocks, int64_t count, const Rows& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r += kWidth<F>) combine<F>(blocks, count, rows, r);
}

// to = (add ? to : 0) + from.
template <class F, class To, class From>
UNIF2ACE_INLINE void add_or_copy(To* to, const From* from, int64_t n, bool add) {
  int64_t i = 0;
  for (; i + kWidth<F> <= n; i += kWidth<F>) {
    const F x = load_floats<F>(from + i);
    store_floats(to + i, add ? load_floats<F>(to + i) + x : x);
  }
  for (; i < n; ++i) to[i] = static_cast<To>((add ? static_cast<float>(to[i]) : 0.0f) + static_cast<float>(from[i]));
}

template <class F, class To>
UNIF2ACE_INLINE void add_or_copy_from(ScalarType dtype, To* to, const void* from, int64_t n, bool add) {
  if (dtype == ScalarType::Float)
    add_or_copy<F>(to, static_cast<const float*>(from), n, add);
  else if (dtype == ScalarType::BFloat16)
    add_or_copy<F>(to, static_cast<const BFloat16*>(from), n, add);
  else
    add_or_copy<F>(to, static_cast<const Half*>(from), n, add);
}

template <class F>
UNIF2ACE_INLINE void convert_body(ScalarType to_dtype, void* to, ScalarType dtype, const void* from, int64_t n,
                                  bool add) {
  if (to_dtype == ScalarType::Float)
    add_or_copy_from<F>(dtype, static_cast<float*>(to), from, n, add);
  else if (to_dtype == ScalarType::BFloat16)
    add_or_copy_from<F>(dtype, static_cast<BFloat16*>(to), from, n, add);
  else
    add_or_copy_from<F>(dtype, static_cast<Half*>(to), from, n, add);
}

UNIF2ACE_MULTIVERSION(run_statistics, statistics_body, (ScalarType dtype, const Block& block, const Rows& rows),
                      (dtype, block, rows))
UNIF2ACE_MULTIVERSION(run_gradients, gradients_body,
                      (ScalarType dtype, const Block& block, const Rows& rows, float* group),
                      (dtype, block, rows, group))
UNIF2ACE_MULTIVERSION(run_combine, combine_body,
                      (const Block* blocks, int64_t count, const Rows& rows, int64_t begin, int64_t end),
                      (blocks, count, rows, begin, end))
UNIF2ACE_MULTIVERSION(convert, convert_body,
                      (ScalarType to_dtype, void* to, ScalarType dtype, const void* from, int64_t n, bool add),
                      (to_dtype, to, dtype, from, n, add))

// Runs f(0) .. f(count - 1), always within a parallel region: there, and only there, a product keeps to its thread.
template <class Function>
void tasks(int64_t count, const Function& f) {
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(end, count); ++i) f(i);
  });
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Some rows of a dense tensor for products: a view, or a copy in float32 where those have another dtype.
Tensor for_products(const Problem& a, const Tensor& tensor, int64_t rows, int64_t columns, int64_t first_row) {
  const char* from = pointer<char>(tensor) + first_row * columns * a.item();
  if (a.dtype == a.gemm) return matrix(from, rows, columns, columns, a.gemm);
  Tensor copy = empty_cpu<2>({rows, columns}, aoti_torch_dtype_float32());
  const int64_t block = 1 << 14, count = rows * columns;
  torch::stable::parallel_for(0, ceil_div(count, block), 4, [&](int64_t begin, int64_t end) {
    const int64_t i = begin * block;
    convert(ScalarType::Float, mutable_pointer<float>(copy) + i, a.dtype, from + i * a.item(),
            std::min(end * block, count) - i, false);
  });
  return copy;
}

// The rows of the head within the softmax, in the dtype of the products: [columns, H] and [columns, 1].
struct Head {
  Tensor weight;
  std::optional<Tensor> bias;
};

// Where results go: [R] and [R, H] by row, [columns, ..] by column of the softmax.
struct Results {
  double loss = 0.0;
  float *nll, *mass;
  bool with_grads;
  char *grad_hidden = nullptr, *grad_weight = nullptr;  // in the dtype of hidden
  float* weight_sum = nullptr;  // float32 [columns, H] between chunks: grad_weight itself, or memory of its own
  float* grad_bias;             // float32 [columns]
};

// The state of one chunk. `position` is its first row in the list of rows that count.
class Chunk {
 public:
  Chunk(const Problem& a, const Head& head, Results& out, int64_t position, int64_t rows)
      : a_(a), head_(head), position_(position), out_(out), h_(gather(rows)) {
    rows_.rows = rows;
    rows_.padded = ceil_div(rows, kLanes) * kLanes;
    row_floats_.resize(8 * rows_.padded);
    float* next = row_floats_.data();
    for (float** field : {&rows_.target_logit, &rows_.weight, &rows_.pull, &rows_.max, &rows_.outside, &rows_.inside,
                          &rows_.sum, &rows_.mass}) {
      *field = next;
      next += rows_.padded;
    }
    rows_.target = a.target.data() + position;
    for (int64_t r = 0; r < rows; ++r) {
      rows_.weight[r] = a.row_weight[a.rows[position + r]];
      rows_.pull[r] = a.mass_weight.empty() ? 0.0f : a.mass_weight[a.rows[position + r]];
    }
    make_blocks();
  }

  void run(bool first, bool last) {
    tasks(count(), [&](int64_t b) {
      Block& block = blocks_[b];
      std::optional<Tensor> bias;
      if (head_.bias) bias = vector_of(from(*head_.bias, block.first), block.width, a_.gemm);
      Tensor z =
          linear(h_, matrix(from(head_.weight, block.first * a_.hidden), block.width, a_.hidden, a_.hidden, a_.gemm),
                 bias ? &*bias : nullptr);
      block.logits = z.mutable_data_ptr();
      run_statistics(a_.gemm, block, rows_);
      if (out_.with_grads) logits_[b] = z;
    });
    torch::stable::parallel_for(0, rows_.padded / kLanes, 4, [&](int64_t begin, int64_t end) {
      run_combine(blocks_.data(), count(), rows_, begin * kLanes, end * kLanes);
    });
    for (int64_t r = 0; r < rows_.rows; ++r) {
      const int64_t row = a_.rows[position_ + r];
      // In double: a float logarithm alone would cost as much accuracy as all the rest. Target minus maximum first:
      // exact where logits are huge. A row of nothing but -inf has no softmax: NaN.
      const double sum = rows_.sum[r], below = static_cast<double>(rows_.target_logit[r]) - rows_.max[r];
      const double nll = sum == 0.0 ? std::nan("") : std::log(sum) - below;
      const double mass = a_.mass_weight.empty() ? 0.0 : rows_.mass[r];
      out_.nll[row] = static_cast<float>(nll);
      out_.mass[row] = static_cast<float>(mass);
      out_.loss += rows_.weight[r] * nll + rows_.pull[r] * mass;
    }
    if (!out_.with_grads) return;
    tasks(count(), [&](int64_t b) { weight_gradient(blocks_[b], first, last); });
    const int64_t slice = std::min(std::max(ceil_div(rows_.rows, 8), kMinSlice), kMaxSlice);
    tasks(ceil_div(rows_.rows, slice),
          [&](int64_t i) { hidden_gradient(i * slice, std::min((i + 1) * slice, rows_.rows)); });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }

  const char* from(const Tensor& tensor, int64_t element) const {
    return pointer<char>(tensor) + element * a_.gemm_item();
  }

  Tensor gather(int64_t rows) const {
    if (static_cast<int64_t>(a_.rows.size()) == a_.h.size(0)) return for_products(a_, a_.h, rows, a_.hidden, position_);
    Tensor h = empty_cpu<2>({rows, a_.hidden}, a_.gemm_aoti_dtype());
    for (int64_t r = 0; r < rows; ++r)
      convert(a_.gemm, mutable_pointer<char>(h) + r * a_.hidden * a_.gemm_item(), a_.dtype,
              pointer<char>(a_.h) + a_.rows[position_ + r] * a_.hidden * a_.item(), a_.hidden, false);
    return h;
  }

  // Blocks of equal width (the last may be narrower), 4 of them or a multiple: an even load on 2 and on 4 threads.
  void make_blocks() {
    const int64_t limit = std::min(std::max(a_.columns / 16, kMinWidth), kMaxWidth);
    const int64_t fours = (ceil_div(a_.columns, limit) + 2) / 4;
    const int64_t wanted = a_.columns <= limit ? 1 : 4 * std::max<int64_t>(fours, 1);
    const int64_t width = ceil_div(ceil_div(a_.columns, wanted), kLanes) * kLanes;
    blocks_.resize(ceil_div(a_.columns, width));
    logits_.resize(blocks_.size());
    block_floats_.resize(3 * count() * rows_.padded);
    for (int64_t b = 0; b < count(); ++b) {
      const int64_t first = b * width, own = std::min(width, a_.columns - first);
      const auto within = [&](int64_t column) { return std::min(std::max<int64_t>(column - first, 0), own); };
      float* statistics = block_floats_.data() + 3 * b * rows_.padded;
      blocks_[b] = {nullptr,
                    first,
                    own,
                    within(a_.mass_begin),
                    within(a_.mass_end),
                    statistics,
                    statistics + rows_.padded,
                    statistics + 2 * rows_.padded,
                    out_.grad_bias + first};
    }
  }

  void weight_gradient(Block& block, bool first, bool last) {
    std::vector<float> group(block.width);
    run_gradients(a_.gemm, block, rows_, group.data());
    const Tensor product = linear(matrix_t(block.logits, rows_.rows, block.width, block.width, a_.gemm),
                                  matrix_t(h_.const_data_ptr(), rows_.rows, a_.hidden, a_.hidden, a_.gemm));
    const int64_t n = block.width * a_.hidden, offset = block.first * a_.hidden;
    char* result = out_.grad_weight + offset * a_.item();
    if (first && last) return convert(a_.dtype, result, a_.gemm, product.const_data_ptr(), n, false);
    float* sum = out_.weight_sum + offset;
    convert(ScalarType::Float, sum, a_.gemm, product.const_data_ptr(), n, !first);
    if (last && a_.dtype != ScalarType::Float) convert(a_.dtype, result, ScalarType::Float, sum, n, false);
  }

  void hidden_gradient(int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    std::vector<float> sum(rows * a_.hidden);
    for (int64_t b = 0; b < count(); ++b) {
      const Block& block = blocks_[b];
      const Tensor product =
          linear(matrix(from(logits_[b], begin * block.width), rows, block.width, block.width, a_.gemm),
                 matrix_t(from(head_.weight, block.first * a_.hidden), block.width, a_.hidden, a_.hidden, a_.gemm));
      convert(ScalarType::Float, sum.data(), a_.gemm, product.const_data_ptr(), rows * a_.hidden, b > 0);
    }
    for (int64_t r = 0; r < rows; ++r)
      convert(a_.dtype, out_.grad_hidden + a_.rows[position_ + begin + r] * a_.hidden * a_.item(), ScalarType::Float,
              sum.data() + r * a_.hidden, a_.hidden, false);
  }

  const Problem& a_;
  const Head& head_;
  const int64_t position_;
  Results& out_;
  Rows rows_;
  Tensor h_;  // [rows, H] in the dtype of the products
  std::vector<float> row_floats_, block_floats_;
  std::vector<Block> blocks_;
  std::vector<Tensor> logits_;  // owners of the blocks' logits
};

struct Gradients {
  Tensor hidden, weight, bias;
};

// Zeros wherever no chunk will write (ignored rows, columns outside of the softmax); empty tensors without gradients.
Gradients make_gradients(const Problem& a, const Tensor& hidden, const Tensor& weight, bool with_grads) {
  const int32_t dtype = aoti_dtype(hidden);
  if (!with_grads) return {empty_cpu<1>({0}, dtype), empty_cpu<1>({0}, dtype), empty_cpu<1>({0}, dtype)};
  const int64_t rows = hidden.size(0), all = weight.size(0), counted = static_cast<int64_t>(a.rows.size());
  Gradients grads{empty_large<2>({rows, a.hidden}, dtype), empty_large<2>({all, a.hidden}, dtype),
                  empty_cpu<1>({all}, dtype)};
  const auto clear = [](const Tensor& tensor, int64_t first, int64_t last) {
    const int64_t bytes = static_cast<int64_t>(tensor.element_size());
    memset(mutable_pointer<char>(tensor) + first * bytes, 0, (last - first) * bytes);
  };
  if (counted < rows) clear(grads.hidden, 0, rows * a.hidden);
  const int64_t end = a.start + a.columns;
  clear(grads.weight, 0, (counted > 0 ? a.start : all) * a.hidden);
  clear(grads.weight, (counted > 0 ? end : all) * a.hidden, all * a.hidden);
  clear(grads.bias, 0, all);
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_loss(
    const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& targets,
    const Tensor& row_weight, std::optional<Tensor> mass_weight, std::vector<int64_t> columns,
    std::vector<int64_t> mass_columns, bool with_grads) {
  Problem a = make_problem(hidden, weight, bias, targets, row_weight, mass_weight, columns, mass_columns);
  const int64_t rows = hidden.size(0), counted = static_cast<int64_t>(a.rows.size());
  const Gradients grads = make_gradients(a, hidden, weight, with_grads);
  Head head{for_products(a, a.weight, a.columns, a.hidden, a.start), std::nullopt};
  if (a.bias) head.bias = for_products(a, *a.bias, a.columns, 1, a.start);

  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor loss = empty_cpu<0>({}, f32), nll = empty_cpu<1>({rows}, f32), mass = empty_cpu<1>({rows}, f32);
  Results out;
  out.nll = mutable_pointer<float>(nll);
  out.mass = mutable_pointer<float>(mass);
  out.with_grads = with_grads;
  std::fill_n(out.nll, rows, 0.0f);
  std::fill_n(out.mass, rows, 0.0f);
  std::vector<float> grad_bias(a.columns);
  out.grad_bias = grad_bias.data();
  const int64_t chunks = ceil_div(counted, std::max(kMinChunkRows, kChunkLogits / a.columns));
  const int64_t size = chunks == 0 ? 0 : ceil_div(counted, chunks);
  std::optional<Tensor> weight_sum;
  if (with_grads) {
    out.grad_hidden = mutable_pointer<char>(grads.hidden);
    out.grad_weight = mutable_pointer<char>(grads.weight) + a.start * a.hidden * a.item();
    if (a.dtype == ScalarType::Float) {
      out.weight_sum = reinterpret_cast<float*>(out.grad_weight);
    } else if (chunks > 1) {
      weight_sum = empty_large<2>({a.columns, a.hidden}, f32);
      out.weight_sum = mutable_pointer<float>(*weight_sum);
    }
  }
  for (int64_t begin = 0; begin < counted; begin += size)
    Chunk(a, head, out, begin, std::min(size, counted - begin)).run(begin == 0, begin + size >= counted);
  if (with_grads)
    convert(a.dtype, mutable_pointer<char>(grads.bias) + a.start * a.item(), ScalarType::Float, grad_bias.data(),
            a.columns, false);
  *mutable_pointer<float>(loss) = static_cast<float>(out.loss);
  return {loss, nll, mass, grads.hidden, grads.weight, grads.bias};
}

}  // namespace
}  // namespace unif2ace::diffusion_loss

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("linear_loss", TORCH_BOX(&unif2ace::diffusion_loss::linear_loss));
}
