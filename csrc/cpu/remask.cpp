// Native CPU kernel of `remask`: which freshly sampled tokens of every image go back to unknown.
//
// Semantics: unif2ace/ops/sampling.py. An image keeps the k smallest of its keys confidence + tau * Gumbel unknown.
// That takes an order statistic, not a sort: nth_element finds the k-th smallest key in O(n), everything below it stays
// unknown, and of the rows that tie with it, nearly always one, the lowest positions fill up. Images are independent
// and shared out among the threads. Cost: n Gumbel numbers and about 4 n comparisons for an image of n rows.
#include <algorithm>
#include <vector>

#include "common/gumbel.h"
#include "common/philox.h"
#include "cpu/convert.h"
#include "cpu/tensors.h"

namespace unif2ace::sampling {
namespace {

constexpr uint32_t kConfidenceStream = 1;

// Rows of one task: 40 us of work (8192 rows on two threads take 160 us), well above the price of waking a thread.
constexpr int64_t kTaskRows = 1024;

// [n] of any float dtype as float32.
std::vector<float> read_floats(const char* name, const Tensor& tensor, int64_t n) {
  check(tensor.dim() == 1 && tensor.size(0) == n, "remask: ", name, " must have ", n, " elements");
  const void* data = tensor.const_data_ptr();
  const int64_t stride = tensor.stride(0);
  std::vector<float> values(n);
  const auto convert = [&](auto* from) {
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(from[i * stride]);
  };
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      convert(static_cast<const float*>(data));
      break;
    case ScalarType::Double:
      convert(static_cast<const double*>(data));
      break;
    case ScalarType::BFloat16:
      convert(static_cast<const BFloat16*>(data));
      break;
    case ScalarType::Half:
      convert(static_cast<const Half*>(data));
      break;
    default:
      refuse("remask: ", name, " must be float32, float64, bfloat16 or float16");
  }
  return values;
}

float noise_of(uint64_t seed, int64_t position, int64_t step) {
  const PhiloxWords<uint64_t> words =
      philox({0, static_cast<uint32_t>(position), static_cast<uint32_t>(step), kConfidenceStream}, seed);
  return gumbel<float>(static_cast<int32_t>(words.c0));
}

// Marks the `keep` rows of one image that come first in the order (key, position, row). `keys` hold its n keys.
template <class Position>
void mark_smallest(const std::vector<int32_t>& keys, int64_t keep, Position position, bool* mask) {
  const int64_t n = static_cast<int64_t>(keys.size());
  if (keep == 0) return;
  std::vector<int32_t> order(keys);
  std::nth_element(order.begin(), order.begin() + (keep - 1), order.end());
  const int32_t threshold = order[keep - 1];
  std::vector<int64_t> ties;
  for (int64_t i = 0; i < n; ++i) {
    mask[i] = keys[i] < threshold;
    keep -= mask[i];
    if (keys[i] == threshold) ties.push_back(i);
  }
  std::stable_sort(ties.begin(), ties.end(), [&](int64_t a, int64_t b) { return position(a) < position(b); });
  for (int64_t i = 0; i < keep; ++i) mask[ties[i]] = true;
}

Tensor remask(const Tensor& log_confidence, const Tensor& row_offsets, const Tensor& keep_unknown, const Tensor& seeds,
              const Tensor& positions, const Tensor& steps, const Tensor& tau) {
  const char* op = "remask";
  check(log_confidence.dim() == 1 && seeds.dim() == 1, "remask: log_confidence must be [R] and seeds [B]");
  const int64_t rows = log_confidence.size(0), images = seeds.size(0);
  const std::vector<float> confidence = read_floats("log_confidence", log_confidence, rows);
  const std::vector<float> weight = read_floats("tau", tau, images);
  const IntegerColumn offsets(op, "row_offsets", row_offsets, images + 1);
  const IntegerColumn keep(op, "keep_unknown", keep_unknown, images), seed(op, "seeds", seeds, images);
  const IntegerColumn step(op, "steps", steps, images), position(op, "positions", positions, rows);
  check(offsets[0] == 0 && offsets[images] == rows, "remask: row_offsets must rise from 0 to ", rows);
  for (int64_t b = 0; b < images; ++b) {
    check(offsets[b] <= offsets[b + 1], "remask: row_offsets must rise from 0 to ", rows);
    check(keep[b] >= 0 && keep[b] <= offsets[b + 1] - offsets[b],
          "remask: keep_unknown must lie between 0 and the rows of each image, got ", keep[b], " for image ", b);
  }
  Tensor mask = empty_cpu<1>({rows}, aoti_torch_dtype_bool());
  bool* out = mutable_pointer<bool>(mask);
  std::fill_n(out, rows, false);

  const int64_t grain = std::max<int64_t>(1, kTaskRows * images / std::max<int64_t>(rows, 1));
  torch::stable::parallel_for(0, images, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = offsets[b];
      keys.resize(offsets[b + 1] - first);
      for (size_t i = 0; i < keys.size(); ++i) {
        const int64_t row = first + i;
        const float noise = noise_of(static_cast<uint64_t>(seed[b]), position[row], step[b]);
        const float key = confidence[row] + weight[b] * noise;
        keys[i] = ordered_key(key);
      }
      mark_smallest(keys, keep[b], [&](int64_t i) { return position[first + i]; }, out + first);
    }
  });
  return mask;
}

}  // namespace
}  // namespace unif2ace::sampling

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("remask", TORCH_BOX(&unif2ace::sampling::remask));
}
