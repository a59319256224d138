// Native CPU kernels of the op `experts`: the grouped GEMM and its backward.
//
// Semantics: unif2ace/ops/experts.py. The same tiles and products as the expert MLP. Rows that need neither gathering
// nor conversion are read where they are.
#include <cstring>
#include <tuple>

#include "cpu/experts_few.h"
#include "cpu/experts_gradient.h"
#include "cpu/experts_mlp.h"

namespace unif2ace::experts {
namespace {

struct Grouped {
  ScalarType dtype, compute;
  int64_t experts, width, length, source_rows, rows;  // N, K, rows of a, M
  Tensor a, b, offsets_tensor;
  std::optional<Tensor> bias, gather;
  const int32_t* offsets;

  Grouped(const Tensor& a_, const Tensor& b_, const Tensor& offsets_, const std::optional<Tensor>& bias_,
          const std::optional<Tensor>& gather_)
      : dtype(a_.scalar_type()), compute(compute_dtype(dtype)), a(dense(a_)), b(b_), offsets_tensor(offsets_) {
    const char* op = "grouped_gemm";
    check_float(op, "a", a);
    check(a.dim() == 2 && b.dim() == 3, "grouped_gemm: a must be [M, K] and b [E, N, K]");
    experts = b.size(0);
    width = b.size(1);
    length = a.size(1);
    source_rows = a.size(0);
    rows = gather_ ? gather_->numel() : source_rows;
    check(rows <= INT32_MAX, "grouped_gemm: the number of rows must fit into int32, got ", rows);
    b = argument(op, "b", b, dtype, experts * width * length);
    offsets_tensor = argument(op, "offsets", offsets_tensor, ScalarType::Int, experts + 1);
    if (bias_) bias = argument(op, "bias", *bias_, dtype, experts * width);
    if (gather_) gather = argument(op, "gather", *gather_, ScalarType::Int, rows);
    offsets = checked_offsets("grouped_gemm: offsets", offsets_tensor, experts, rows);
    for (int64_t m = 0; gather && m < rows; ++m)
      check(index()[m] >= 0 && index()[m] < source_rows, "grouped_gemm: gather must be 0..", source_rows - 1, ", got ",
            index()[m], " at row ", m);
  }

  const int32_t* index() const { return gather ? pointer<int32_t>(*gather) : nullptr; }
  Rows rows_of_a() const { return {dtype, a.const_data_ptr(), length, index(), 1}; }
  Rows rows_of(const Tensor& sorted) const { return {dtype, sorted.const_data_ptr(), width, nullptr, 1}; }
};

// The rows of a tile in the compute dtype: in place where they can be read there, else copied into `memory`. In place,
// the padding is whatever rows follow.
const void* tile_rows(const Rows& source, const Tile& tile, int64_t all_rows, Buffer& memory) {
  if (source.index == nullptr && source.dtype == compute_dtype(source.dtype) && tile.begin + tile.padded <= all_rows)
    return source.row(tile.begin);
  void* rows = memory.fit(tile.padded * source.width * size_of(compute_dtype(source.dtype)));
  gather(source, tile.begin, tile.rows, tile.padded, rows);
  return rows;
}

void zero_rows(char* out, int64_t begin, int64_t end, int64_t row_bytes) {
  // An empty tensor has no address, which memset may not get even with nothing to do.
  if (begin < end && row_bytes > 0) std::memset(out + begin * row_bytes, 0, (end - begin) * row_bytes);
}

struct Scratch {
  Buffer rows;
  Matrices::Cache b, bias;
};

void multiply_tiles(const Grouped& p, char* out) {
  const Tiles cut(p.offsets, p.experts, forward_tile_count());
  const Matrices b(p.b, p.width, p.length);
  const Biases bias(p.bias, p.width);
  run_tasks<Scratch>(cut.tiles.size(), [&](int64_t i, Scratch& scratch) {
    const int64_t task = cut.by_size[i];
    const Tile& tile = cut.tiles[task];
    const void* a = tile_rows(p.rows_of_a(), tile, p.rows, scratch.rows);
    const Tensor result = product(matrix(a, tile.padded, p.length, p.length, p.compute), b.of(tile.expert, scratch.b),
                                  bias.of(tile.expert, scratch.bias));
    narrow(p.dtype, result.const_data_ptr(), tile.rows * p.width, out + tile.begin * p.width * size_of(p.dtype));
  });
}

// Columns first .. first + width - 1 of the result; see experts_few.cpp.
void multiply_few(const Grouped& p, int64_t first, int64_t width, char* out) {
  const int64_t size = size_of(p.dtype), padded = padded_length(p.length);
  const Rows source = p.rows_of_a();
  std::vector<float> a, result;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t begin = p.offsets[e], rows = p.offsets[e + 1] - begin, at = e * p.width + first;
    if (rows == 0) continue;
    a.assign(rows * padded, 0.0f);
    result.resize(rows * width);
    for (int64_t r = 0; r < rows; ++r) to_float(p.dtype, source.row(begin + r), p.length, a.data() + r * padded);
    dots(p.dtype, pointer<char>(p.b) + at * p.length * size, p.bias ? pointer<char>(*p.bias) + at * size : nullptr,
         width, p.length, a.data(), rows, result.data(), width);
    for (int64_t r = 0; r < rows; ++r)
      from_float(p.dtype, result.data() + r * width, width, out + ((begin + r) * p.width + first) * size);
  }
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offsets, std::optional<Tensor> bias,
                    std::optional<Tensor> gather) {
  const Grouped p(a, b, offsets, bias, gather);
  Tensor result = empty_cpu<2>({p.rows, p.width}, aoti_dtype(a));
  char* out = mutable_pointer<char>(result);
  if (is_few(p.dtype, p.rows, p.experts))
    torch::stable::parallel_for(0, (p.width + 15) / 16, 1, [&](int64_t begin, int64_t end) {
      multiply_few(p, begin * 16, std::min(end * 16, p.width) - begin * 16, out);
    });
  else
    multiply_tiles(p, out);
  zero_rows(out, p.offsets[p.experts], p.rows, p.width * size_of(p.dtype));
  return result;
}

// For each row of a the rows m that read it, ascending: readers[first[i]] .. readers[first[i + 1] - 1].
struct Readers {
  std::vector<int32_t> first, readers;

  explicit Readers(const Grouped& p) : first(p.source_rows + 1), readers(p.rows) {
    const int32_t* index = p.index();
    for (int64_t m = 0; m < p.rows; ++m) ++first[index[m] + 1];
    for (int64_t i = 0; i < p.source_rows; ++i) first[i + 1] += first[i];
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    for (int64_t m = 0; m < p.rows; ++m) readers[next[index[m]]++] = static_cast<int32_t>(m);
  }
};

// grad_a: row by row in place, or with `gather` the sum of the rows that read it; and the column sums of each tile.
void gradient_of_rows(const Grouped& p, const Tiles& cut, const Tensor& grad, char* grad_a, float* sums) {
  const int64_t count = cut.tiles.size(), size = size_of(p.compute);
  const Matrices b(p.b, p.width, p.length);
  std::vector<std::optional<Tensor>> results(p.gather ? count : 0);
  std::vector<const void*> row(p.gather ? p.rows : 0, nullptr);
  run_tasks<Scratch>(count, [&](int64_t i, Scratch& scratch) {
    const int64_t task = cut.by_size[i];
    const Tile& tile = cut.tiles[task];
    const void* g = tile_rows(p.rows_of(grad), tile, p.rows, scratch.rows);
    if (p.bias) weighted_sum(p.compute, g, tile.rows, p.width, nullptr, sums + task * p.width);
    const Tensor result =
        linear(matrix(g, tile.padded, p.width, p.width, p.compute), b.transposed(tile.expert, scratch.b));
    const char* rows = static_cast<const char*>(result.const_data_ptr());
    if (!p.gather) {
      narrow(p.dtype, rows, tile.rows * p.length, grad_a + tile.begin * p.length * size_of(p.dtype));
      return;
    }
    results[task] = result;
    for (int64_t r = 0; r < tile.rows; ++r) row[tile.begin + r] = rows + r * p.length * size;
  });
  if (!p.gather) return zero_rows(grad_a, p.offsets[p.experts], p.rows, p.length * size_of(p.dtype));
  const Readers readers(p);
  torch::stable::parallel_for(0, p.source_rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<const void*> chosen;
    for (int64_t i = begin; i < end; ++i) {
      chosen.clear();
      for (int32_t at = readers.first[i]; at < readers.first[i + 1]; ++at)
        if (row[readers.readers[at]] != nullptr) chosen.push_back(row[readers.readers[at]]);
      combine(p.compute, p.dtype, chosen.data(), nullptr, chosen.size(), p.length,
              grad_a + i * p.length * size_of(p.dtype));
    }
  });
}

struct StripScratch {
  Buffer transposed, rows;
};

void gradient_strip(const Grouped& p, const Strip& strip, const Rows& grad, char* grad_b, StripScratch& scratch) {
  const int64_t begin = p.offsets[strip.expert], rows = p.offsets[strip.expert + 1] - begin;
  char* out = grad_b + (strip.expert * p.width + strip.first) * p.length * size_of(p.dtype);
  if (rows == 0) return zero_rows(out, 0, strip.columns, p.length * size_of(p.dtype));
  const int64_t padded = padded_rows(rows);
  void* right = scratch.rows.fit(padded * p.length * size_of(p.compute));
  gather(p.rows_of_a(), begin, rows, padded, right);
  const Tensor result = strip_product(grad, begin, rows, strip, right, p.length, scratch.transposed);
  narrow(p.dtype, result.const_data_ptr(), strip.columns * p.length, out);
}

std::tuple<Tensor, Tensor, Tensor> grouped_gemm_backward(const Tensor& grad_y, const Tensor& a, const Tensor& b,
                                                         const Tensor& offsets, std::optional<Tensor> bias,
                                                         std::optional<Tensor> gather) {
  const Grouped p(a, b, offsets, bias, gather);
  const Tensor grad = argument("grouped_gemm", "the gradient", grad_y, p.dtype, p.rows * p.width);
  const int32_t dtype = aoti_dtype(a);
  Tensor grad_a = empty_cpu<2>({p.source_rows, p.length}, dtype);
  Tensor grad_b = empty_cpu<3>({p.experts, p.width, p.length}, dtype);
  Tensor grad_bias = p.bias ? empty_cpu<2>({p.experts, p.width}, dtype) : empty_cpu<1>({0}, dtype);
  const Tiles cut(p.offsets, p.experts, kBackwardTiles);
  std::vector<float> sums(p.bias ? cut.tiles.size() * p.width : 0);
  gradient_of_rows(p, cut, grad, mutable_pointer<char>(grad_a), sums.data());
  const std::vector<Strip> strips = make_strips(p.offsets, p.experts, p.width, p.compute);
  run_tasks<StripScratch>(strips.size(), [&](int64_t task, StripScratch& scratch) {
    gradient_strip(p, strips[task], p.rows_of(grad), mutable_pointer<char>(grad_b), scratch);
  });
  for (int64_t e = 0; p.bias && e < p.experts; ++e)
    sum_tiles(cut, e, p.dtype, sums, p.width, mutable_pointer<char>(grad_bias));
  return {grad_a, grad_b, grad_bias};
}

}  // namespace
}  // namespace unif2ace::experts

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&unif2ace::experts::grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&unif2ace::experts::grouped_gemm_backward));
}
