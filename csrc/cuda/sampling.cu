// CUDA kernels of the op `sampling`. Semantics: unif2ace/ops/sampling.py; how a row and an image are worked on:
// sampling_row.h and remask_image.h.
//
// Cost of sample_tokens: R*V logits are read once, twice that with guidance; 8192 guided bfloat16 rows of 8192 codes
// are 268 MB, 62 us at the 4.3 TB/s to which an H200 copies. Instructions, counted in the machine code for Hopper: 31
// per guided logit (26 without guidance), of which 5 are wide integer multiplications, plus about 600 per row and warp;
// that is 40 (35) per logit, 91 us (79 us) on 132 * 128 lanes at 1.75 GHz. So arithmetic is the limit; expected are
// 0.65 of the copy speed with guidance and 0.4 without.
//
// head_sample is the library's product of a chunk of rows, then the same kernel while the logits are in the L2 cache.
// The chunk depends on V and the device only; the last bits of the product may depend on its number of rows.
//
// Registers and spills without a device (`unif2ace doctor --kernels` shows them too), with T for torch's include
// folder:
//   nvcc -cubin -arch=sm_90a -std=c++17 -O3 --fmad=false -Xptxas -v -DUSE_CUDA
//     -DTORCH_TARGET_VERSION=0x020a000000000000 -Icsrc -I$T -I$T/torch/csrc/api/include csrc/cuda/sampling.cu
#include <algorithm>
#include <tuple>

#include "cuda/device.h"
#include "cuda/remask_image.h"
#include "cuda/sampling_row.h"
#include "torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h"

namespace unif2ace::sampling::gpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct Places {
  IntegerColumn seeds, positions, steps;
};

// How rows are sampled.
struct Noise {
  float inverse_temperature;
  uint32_t stream;
};

struct Problem {
  Scores scores;
  uint32_t columns;
  Noise noise;
  Places places;
  int64_t first_place;  // row 0 of the scores is this row of the places and the outputs
  int32_t* codes;
  float* confidence;
};

// Five blocks, 20 warps, on a multiprocessor: 102 registers for a thread, of which no version needs more than 96.
template <class Logit, bool guided, bool noisy>
__global__ void __launch_bounds__(kThreads, 5) sample_kernel(Problem p) {
  __shared__ int64_t shared[kWarps];
  __shared__ float shared_sum[kWarps];
  const int64_t place = p.first_place + blockIdx.x;
  const Halves<Logit, guided> row(p.scores, blockIdx.x);
  const RowNoise noise{static_cast<uint64_t>(p.places.seeds[place]), static_cast<uint32_t>(p.places.positions[place]),
                       static_cast<uint32_t>(p.places.steps[place]), p.noise.stream};
  Pass pass;
  if (row.takes_wide_loads(p.columns))
    pass.run<noisy, true>(row, p.columns, p.noise.inverse_temperature, noise);
  else
    pass.run<noisy, false>(row, p.columns, p.noise.inverse_temperature, noise);
  const uint32_t code = find_winner<noisy>(row, p.columns, p.noise.inverse_temperature, noise, pass.bound, shared);
  const float highest = value_of(block_max(ranked(pass.high, 0), shared));
  const float total = block_sum(pass.total * exp2_of((pass.high - finite(highest)) * kLog2E), shared_sum);
  if (threadIdx.x == 0) {
    p.codes[place] = static_cast<int32_t>(code);
    p.confidence[place] = (row.z(code) - highest) - log_of(total);
  }
}

template <class Logit>
void sample_as(const DeviceScope& device, const Problem& p, int64_t rows, bool guided, bool noisy) {
  const auto kernel = guided ? (noisy ? sample_kernel<Logit, true, true> : sample_kernel<Logit, true, false>)
                             : (noisy ? sample_kernel<Logit, false, true> : sample_kernel<Logit, false, false>);
  device.launch(kernel, rows, kThreads, 0, false, p);
}

void sample(const DeviceScope& device, ScalarType dtype, const Problem& p, int64_t rows, bool guided, bool noisy) {
  if (rows == 0) return;
  if (dtype == ScalarType::Float)
    sample_as<float>(device, p, rows, guided, noisy);
  else if (dtype == ScalarType::BFloat16)
    sample_as<BFloat16>(device, p, rows, guided, noisy);
  else
    sample_as<Half>(device, p, rows, guided, noisy);
}

Noise make_noise(double temperature, int64_t stream) {
  return {temperature > 0.0 ? static_cast<float>(1.0 / temperature) : 0.0f, static_cast<uint32_t>(stream)};
}

// Scores with guidance; `uncond` is null without. Checks shapes and dtypes.
Scores make_scores(const char* op, const char* name, const Tensor& cond, const Tensor* uncond, double w) {
  if (uncond == nullptr) return {cond.const_data_ptr(), nullptr, cond.stride(0), cond.stride(1), 0, 0, 1.0f, 0.0f};
  check(uncond->dim() == 2 && uncond->size(0) == cond.size(0) && uncond->size(1) == cond.size(1) &&
            uncond->scalar_type() == cond.scalar_type(),
        op, ": uncond_", name, " must have the shape and dtype of ", name);
  return {cond.const_data_ptr(), uncond->const_data_ptr(),    cond.stride(0),       cond.stride(1), uncond->stride(0),
          uncond->stride(1),     static_cast<float>(1.0 + w), static_cast<float>(w)};
}

Places make_places(const char* op, const Tensor& seeds, const Tensor& positions, const Tensor& steps, int64_t rows) {
  return {{op, "seeds", seeds, rows}, {op, "positions", positions, rows}, {op, "steps", steps, rows}};
}

using Result = std::tuple<Tensor, Tensor>;

Result sample_tokens(const Tensor& logits, const Tensor& seeds, const Tensor& positions, const Tensor& steps,
                     double temperature, std::optional<Tensor> uncond_logits, double w, int64_t stream) {
  const char* op = "sample_tokens";
  check_float(op, "logits", logits);
  check(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= INT32_MAX && logits.size(0) <= INT32_MAX, op,
        ": logits must be [R, V] with V from 1 to 2^31 - 1");
  const DeviceScope device(op, logits);
  const int64_t rows = logits.size(0);
  const bool guided = uncond_logits && w != 0.0;
  const Scores scores = make_scores(op, "logits", logits, guided ? &*uncond_logits : nullptr, w);
  const Places places = make_places(op, seeds, positions, steps, rows);
  Tensor codes = device.empty<1>({rows}, aoti_torch_dtype_int32());
  Tensor confidence = device.empty<1>({rows}, aoti_torch_dtype_float32());
  const Problem problem{scores, static_cast<uint32_t>(logits.size(1)), make_noise(temperature, stream),   places,
                        0,      mutable_pointer<int32_t>(codes),       mutable_pointer<float>(confidence)};
  sample(device, logits.scalar_type(), problem, rows, guided, temperature > 0.0);
  return {codes, confidence};
}

// ------------------------------------------------------------------------------------------------------- head_sample

// Guidance folded into hidden rows, rounded once; `out` is dense. A thread makes 16 bytes of it.
template <class Value, bool wide>
__device__ __forceinline__ void fold_row(const Halves<Value, true>& row, uint32_t columns, Value* out) {
  constexpr int n = kVector<Value>;
  for (uint32_t first = threadIdx.x * n; first < columns; first += kThreads * n) {
    const uint4 cond = row.cond.template load_vector<wide>(first, columns, 0.0f);
    const uint4 uncond = row.uncond.template load_vector<wide>(first, columns, 0.0f);
    Value c[n], u[n];
    memcpy(c, &cond, sizeof cond);
    memcpy(u, &uncond, sizeof uncond);
    for (int i = 0; i < n; ++i) c[i] = static_cast<Value>(row.guide(c[i], u[i]));
    if (wide) {
      uint4 bits;
      memcpy(&bits, c, sizeof bits);
      *reinterpret_cast<uint4*>(out + first) = bits;
    } else {
      for (int i = 0; i < n && first + i < columns; ++i) out[first + i] = c[i];
    }
  }
}

// Guidance folded into hidden rows, rounded once; `out` is dense, and its rows start at 16 bytes where theirs do.
template <class Value>
__global__ void __launch_bounds__(kThreads) fold_kernel(Scores s, uint32_t columns, Value* out) {
  const Halves<Value, true> row(s, blockIdx.x);
  out += static_cast<int64_t>(blockIdx.x) * columns;
  if (row.takes_wide_loads(columns))
    fold_row<Value, true>(row, columns, out);
  else
    fold_row<Value, false>(row, columns, out);
}

template <class Value>
void fold_as(const DeviceScope& device, const Scores& scores, int64_t rows, uint32_t columns, const Tensor& out) {
  device.launch(fold_kernel<Value>, rows, kThreads, 0, false, scores, columns, mutable_pointer<Value>(out));
}

Tensor fold(const DeviceScope& device, const Tensor& hidden, const Scores& scores) {
  const int64_t rows = hidden.size(0);
  const uint32_t columns = static_cast<uint32_t>(hidden.size(1));
  const Tensor out = device.empty<2>({rows, hidden.size(1)}, aoti_dtype(hidden));
  if (hidden.scalar_type() == ScalarType::Float)
    fold_as<float>(device, scores, rows, columns, out);
  else if (hidden.scalar_type() == ScalarType::BFloat16)
    fold_as<BFloat16>(device, scores, rows, columns, out);
  else
    fold_as<Half>(device, scores, rows, columns, out);
  return out;
}

// Rows per product: their logits fill a third of the L2 cache, the rest is for the weight, which every chunk reads
// again. A multiple of 128, the rows of a library's tile.
int64_t chunk_rows(const DeviceScope& device, int64_t columns, int64_t element) {
  const int64_t rows = device.attribute(cudaDevAttrL2CacheSize) / 3 / (columns * element);
  return std::max<int64_t>(128, rows / 128 * 128);
}

Result head_sample(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& seeds,
                   const Tensor& positions, const Tensor& steps, double temperature,
                   std::optional<Tensor> uncond_hidden, double w, int64_t stream) {
  const char* op = "head_sample";
  check_float(op, "hidden", hidden);
  const ScalarType dtype = hidden.scalar_type();
  check(hidden.dim() == 2 && weight.dim() == 2 && weight.size(1) == hidden.size(1) && hidden.size(1) >= 1 &&
            hidden.size(1) <= INT32_MAX && weight.size(0) >= 1 && weight.size(0) <= INT32_MAX &&
            hidden.size(0) <= INT32_MAX && weight.scalar_type() == dtype,
        op, ": hidden must be [R, H] and weight [V, H] of one dtype");
  const int64_t rows = hidden.size(0), columns = weight.size(0);
  check(!bias || (bias->dim() == 1 && bias->size(0) == columns && bias->scalar_type() == dtype), op,
        ": bias must be [V] of the dtype of weight");
  const DeviceScope device(op, hidden);
  const bool guided = uncond_hidden && w != 0.0;
  const Scores halves = make_scores(op, "hidden", hidden, guided ? &*uncond_hidden : nullptr, w);
  const Places places = make_places(op, seeds, positions, steps, rows);
  Tensor codes = device.empty<1>({rows}, aoti_torch_dtype_int32());
  Tensor confidence = device.empty<1>({rows}, aoti_torch_dtype_float32());
  if (rows == 0) return {codes, confidence};

  Tensor folded = guided ? fold(device, hidden, halves) : hidden;
  Tensor weight_t = weight;
  weight_t = torch::stable::transpose(weight_t, 0, 1);
  const int64_t chunk = std::min(rows, chunk_rows(device, columns, hidden.element_size()));
  Tensor buffer = device.empty<2>({chunk, columns}, aoti_dtype(hidden));
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t n = std::min(chunk, rows - first);
    const Tensor part = torch::stable::narrow(folded, 0, first, n), logits = torch::stable::narrow(buffer, 0, 0, n);
    TORCH_ERROR_CODE_CHECK(
        bias ? aoti_torch_cuda_addmm_out(logits.get(), bias->get(), part.get(), weight_t.get(), 1.0, 1.0)
             : aoti_torch_cuda_mm_out(logits.get(), part.get(), weight_t.get()));
    const Problem problem{make_scores(op, "logits", logits, nullptr, 0.0),
                          static_cast<uint32_t>(columns),
                          make_noise(temperature, stream),
                          places,
                          first,
                          mutable_pointer<int32_t>(codes),
                          mutable_pointer<float>(confidence)};
    sample(device, dtype, problem, n, false, temperature > 0.0);
  }
  return {codes, confidence};
}

// ------------------------------------------------------------------------------------------------------------ remask

// One number per row of any float dtype, with any stride.
struct Floats {
  const void* data;
  int64_t stride;
  ScalarType dtype;

  Floats(const char* name, const Tensor& tensor, int64_t rows)
      : data(tensor.const_data_ptr()), dtype(tensor.scalar_type()) {
    check(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
              dtype == ScalarType::Half,
          "remask: ", name, " must be float32, float64, bfloat16 or float16");
    check(tensor.dim() == 1 && tensor.size(0) == rows, "remask: ", name, " must have ", rows, " elements");
    stride = tensor.stride(0);
  }
  __device__ float operator[](int64_t row) const {
    switch (dtype) {
      case ScalarType::Float:
        return static_cast<const float*>(data)[row * stride];
      case ScalarType::Double:
        return static_cast<float>(static_cast<const double*>(data)[row * stride]);
      case ScalarType::BFloat16:
        return static_cast<float>(static_cast<const BFloat16*>(data)[row * stride]);
      default:
        return static_cast<float>(static_cast<const Half*>(data)[row * stride]);
    }
  }
};

constexpr int kRemaskThreads = 256;  // rows of a face of 256 pixels: one per thread

struct Images {
  Floats confidence, tau;
  IntegerColumn offsets, keep, seeds, positions, steps;
  int64_t rows;
  int32_t* keys;
  bool* mask;
};

__global__ void __launch_bounds__(kRemaskThreads, 4) remask_kernel(Images a) {
  const int64_t image = blockIdx.x;
  // Offsets nobody has checked must not lead out of the tensors.
  const int64_t begin = a.offsets[image], end = a.offsets[image + 1];
  mark_smallest(
      begin > 0 ? begin : 0, end < a.rows ? end : a.rows, a.keep[image], static_cast<uint64_t>(a.seeds[image]),
      static_cast<uint32_t>(a.steps[image]), a.tau[image], [&](int64_t row) { return a.confidence[row]; },
      [&](int64_t row) { return a.positions[row]; }, a.keys, a.mask);
}

Tensor remask(const Tensor& log_confidence, const Tensor& row_offsets, const Tensor& keep_unknown, const Tensor& seeds,
              const Tensor& positions, const Tensor& steps, const Tensor& tau) {
  const char* op = "remask";
  check(log_confidence.dim() == 1 && seeds.dim() == 1, "remask: log_confidence must be [R] and seeds [B]");
  const DeviceScope device(op, log_confidence);
  const int64_t rows = log_confidence.size(0), images = seeds.size(0);
  check(images <= INT32_MAX, "remask: there may be 2^31 - 1 images at most");
  Tensor mask = device.empty<1>({rows}, aoti_torch_dtype_bool());
  Tensor keys = device.empty<1>({rows}, aoti_torch_dtype_int32());
  const Images problem{{"log_confidence", log_confidence, rows},
                       {"tau", tau, images},
                       {op, "row_offsets", row_offsets, images + 1},
                       {op, "keep_unknown", keep_unknown, images},
                       {op, "seeds", seeds, images},
                       {op, "positions", positions, rows},
                       {op, "steps", steps, images},
                       rows,
                       mutable_pointer<int32_t>(keys),
                       mutable_pointer<bool>(mask)};
  if (rows == 0) return mask;
  // False for rows that belong to no image.
  check_cuda(cudaMemsetAsync(problem.mask, 0, rows * sizeof(bool), device.stream()), op);
  if (images > 0) device.launch(remask_kernel, images, kRemaskThreads, 0, false, problem);
  return mask;
}

}  // namespace
}  // namespace unif2ace::sampling::gpu

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&unif2ace::sampling::gpu::sample_tokens));
  m.impl("head_sample", TORCH_BOX(&unif2ace::sampling::gpu::head_sample));
  m.impl("remask", TORCH_BOX(&unif2ace::sampling::gpu::remask));
}
