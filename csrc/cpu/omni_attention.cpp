// Native CPU kernel of the op `omni_attention`, forward: attention of packed sequences, block by block.
//
// Semantics: unif2ace/ops/omni_attention.py. The sequences of this model are short (66 or 258 image rows, a sentence of
// text), so a call is many small problems, and a library's matrix product for each costs more than the arithmetic:
// 16 faces, 6 heads of 32, 66 rows on 75 keys take PyTorch's flash kernel 0.66 ms on two cores of a Zen 5, this one
// 0.25.
//
// One task is one head of one block. Its keys (transposed) and values are copied once into float32 scratch, padded to
// whole vectors; then tiles of a few query rows take all their keys at once:
//
//   scores [rows, keys] = (scale q) k^T       lanes over keys, one accumulator per (row, vector)
//   p = 2^(scores - max), sum                 lanes over keys; log2(e) is part of the scale
//   out = (p v) / sum                         lanes over head dimensions
//
// A score is one running sum over the head's dimensions, an output one running sum over the keys (in parts of 128, as
// rounding errors of a long one would show), and a softmax sum runs over 16 lanes whatever the width of the vectors: a
// row's bits depend neither on the tile, the batch, the threads nor the instruction set.
// Memory: (keys * (2 dim + rows of a tile)) floats per thread.
#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/heads.h"
#include "cpu/isa.h"
#include "cpu/lanes16.h"
#include "cpu/transpose.h"

namespace unif2ace::omni_attention {
namespace {

constexpr int kPart = 128;      // keys per running sum of an output
constexpr int kTile = 6;        // query rows that are scored together; divides 66, 258 and 1026, the rows of images
constexpr int kBlockWidth = 7;  // q_start, q_end, k_start, k_end, causal, past_start, past_end

constexpr int32_t kLane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Problem {
  ScalarType dtype;
  Heads q, k, v, past_k, past_v;
  void* out;  // [T, heads, dim], contiguous
  int64_t heads;
  int dim;
  float scale;  // of scores in units of ln 2
  const int64_t* blocks;
};

// Working memory of one thread, for the longest block.
struct Scratch {
  struct alignas(64) Line {
    float lane[kLanes];
  };
  std::vector<Line> lines;  // a vector that crosses a line of the cache would be two accesses
  float *keys, *values, *query, *scores, *out;

  Scratch(const Problem& a, int64_t longest) {
    const int64_t keys_wide = padded(longest), wide = padded(a.dim);
    lines.resize((keys_wide * (2 * wide + kTile) + 2 * kTile * wide) / kLanes);
    keys = lines.data()->lane;           // [dim padded, keys]
    values = keys + wide * keys_wide;    // [keys, dim padded]
    scores = values + keys_wide * wide;  // [tile, keys]
    query = scores + kTile * keys_wide;  // [tile, dim padded], scaled
    out = query + kTile * wide;          // [tile, dim padded]
  }
};

// One head of one token, as float32.
template <class F>
UNIF2ACE_INLINE void load_head(const Problem& a, const Heads& heads, int64_t token, int64_t head, float* to) {
  load_row<F>(a.dtype, heads.data, heads.at(token, head), a.dim, to);
}

// acc[row][vector] += x[row][i] * y[i][vector] for i in [0, n): the inner product of both matrix multiplications.
template <class F, int rows, int vectors>
UNIF2ACE_INLINE void multiply(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t n, float* out,
                              int64_t out_stride, bool add) {
  F acc[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < vectors; ++c) acc[r][c] = F{};
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < vectors; ++c) {
      const F column = load<F>(y + i * y_stride + c * kWidth<F>);
      for (int r = 0; r < rows; ++r) acc[r][c] += x[r * x_stride + i] * column;
    }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < vectors; ++c) {
      float* at = out + r * out_stride + c * kWidth<F>;
      store(at, add ? load<F>(at) + acc[r][c] : acc[r][c]);
    }
}

// The same for any number of columns, `vectors` of them at a time, then half as many, down to one.
template <class F, int rows, int vectors>
UNIF2ACE_INLINE void multiply_rows(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t n,
                                   int64_t columns, float* out, int64_t out_stride, bool add) {
  constexpr int wide = vectors * kWidth<F>;
  int64_t c = 0;
  for (; c + wide <= columns; c += wide)
    multiply<F, rows, vectors>(x, x_stride, y + c, y_stride, n, out + c, out_stride, add);
  if constexpr (vectors > 1)
    multiply_rows<F, rows, vectors / 2>(x, x_stride, y + c, y_stride, n, columns - c, out + c, out_stride, add);
}

// The rows of a tile, or one alone (text being decoded). Accumulators fill the registers: 6 rows of 4 vectors the 32 of
// AVX-512; 3 of 4 and 3 of 2 were fastest with the 16 of AVX2 and SSE.
template <class F>
UNIF2ACE_INLINE void multiply_tile(bool alone, const float* x, int64_t x_stride, const float* y, int64_t y_stride,
                                   int64_t n, int64_t columns, float* out, int64_t out_stride, bool add) {
  constexpr int rows = kWidth<F> == 16 ? kTile : kTile / 2, vectors = kWidth<F> == 4 ? 2 : 4;
  if (alone) return multiply_rows<F, 1, vectors>(x, x_stride, y, y_stride, n, columns, out, out_stride, add);
  for (int r = 0; r < kTile; r += rows)
    multiply_rows<F, rows, vectors>(x + r * x_stride, x_stride, y, y_stride, n, columns, out + r * out_stride,
                                    out_stride, add);
}

// Scores of one row from `visible` to `wide` -> -infinity. By whole vectors: a load right behind stores of its parts
// would wait for the cache.
template <class F>
UNIF2ACE_INLINE void hide(float* score, int64_t visible, int64_t wide) {
  for (int64_t j = visible / kWidth<F> * kWidth<F>; j < wide; j += kWidth<F>) {
    const F shown = load<F>(score + j), hidden = splat<F>(-__builtin_inff());
    store(score + j, load<Integers<F>>(kLane) < static_cast<int32_t>(visible - j) ? shown : hidden);
  }
}

template <class F>
UNIF2ACE_INLINE float highest_of(const float* score, int64_t wide) {
  Lanes16<F> lanes;
  memcpy(lanes.part, score, sizeof lanes.part);
  for (int64_t j = kLanes; j < wide; j += kLanes)
    for (int p = 0; p < kParts<F>; ++p) lanes.part[p] = maximum(lanes.part[p], load<F>(score + j + p * kWidth<F>));
  return lanes.highest();
}

// Scores of one row -> 2^(score - highest) in place; returns their sum.
template <class F>
UNIF2ACE_INLINE float exponentials(float* score, int64_t wide, float highest) {
  Lanes16<F> sum;
  for (int64_t j = 0; j < wide; j += kLanes)
    for (int p = 0; p < kParts<F>; ++p) {
      float* at = score + j + p * kWidth<F>;
      const F e = exp2_nonpositive(load<F>(at) - highest);
      store(at, e);
      sum.part[p] += e;
    }
  return sum.sum();
}

// The keys that a block sees, counted from 0: `past` of the cache, then those of the batch.
struct Keys {
  int64_t past, past_start, k_start;

  explicit Keys(const int64_t* block) : past(block[6] - block[5]), past_start(block[5]), k_start(block[2]) {}
};

// Key or value j of a block, wherever it lies.
template <class F>
UNIF2ACE_INLINE void load_key(const Problem& a, const Keys& keys, const Heads& past, const Heads& own, int64_t j,
                              int64_t head, float* to) {
  if (j < keys.past)
    load_head<F>(a, past, keys.past_start + j, head, to);
  else
    load_head<F>(a, own, keys.k_start + j - keys.past, head, to);
}

// A head's keys as [dim, keys] and its values as [keys, dim], zeros where they are padded: nobody sees the padding, but
// it is multiplied. Returns where the values stand, and their row stride: float32 rows of whole vectors stay in place,
// if they follow each other.
template <class F>
UNIF2ACE_INLINE std::pair<const float*, int64_t> prepare(const Problem& a, const Keys& keys, int64_t k_len,
                                                         int64_t head, const Scratch& s) {
  const int64_t keys_wide = padded(k_len), wide = padded(a.dim);
  const bool in_place = a.dtype == ScalarType::Float && a.dim == wide;
  for (int64_t j = 0; j < keys_wide; j += 4) {
    const float* rows = s.out;  // not in use yet: room for kTile rows
    int64_t stride = wide;
    if (in_place && j >= keys.past && j + 4 <= k_len) {
      rows = static_cast<const float*>(a.k.data) + a.k.at(keys.k_start + j - keys.past, head);
      stride = a.k.stride_token;
    } else {
      for (int64_t r = 0; r < 4; ++r)
        if (j + r < k_len)
          load_key<F>(a, keys, a.past_k, a.k, j + r, head, s.out + r * wide);
        else
          for (int64_t d = 0; d < wide; ++d) s.out[r * wide + d] = 0.0f;
    }
    transpose_rows(rows, stride, wide, s.keys + j, keys_wide);
  }
  if (in_place && keys.past == 0)
    return {static_cast<const float*>(a.v.data) + a.v.at(keys.k_start, head), a.v.stride_token};
  for (int64_t j = 0; j < k_len; ++j) load_key<F>(a, keys, a.past_v, a.v, j, head, s.values + j * wide);
  return {s.values, wide};
}

template <class F>
UNIF2ACE_INLINE void attend(const Problem& a, const int64_t* block, int64_t head, const Scratch& s) {
  const Keys keys(block);
  const int64_t q_start = block[0], q_len = block[1] - block[0], k_len = keys.past + block[3] - block[2];
  const bool causal = block[4] != 0;
  const int64_t keys_wide = padded(k_len), wide = padded(a.dim);
  const auto [values, values_stride] = prepare<F>(a, keys, k_len, head, s);
  for (int64_t first = 0; first < q_len; first += kTile) {
    const int64_t live = std::min<int64_t>(kTile, q_len - first);
    for (int64_t r = 0; r < kTile; ++r) {  // a short last tile repeats its last row
      float* row = s.query + r * wide;
      load_head<F>(a, a.q, q_start + first + std::min(r, live - 1), head, row);
      for (int64_t d = 0; d < wide; d += kWidth<F>) store(row + d, load<F>(row + d) * a.scale);
    }
    const int64_t seen = causal ? k_len - q_len + first + live : k_len;  // by the last row of the tile
    const int64_t seen_wide = padded(seen);
    multiply_tile<F>(live == 1, s.query, wide, s.keys, keys_wide, a.dim, seen_wide, s.scores, keys_wide, false);
    // Two loops: a row's exponentials need not wait for its maximum, the longest chain of all, if others come between.
    float highest[kTile], sum[kTile];
    for (int64_t r = 0; r < live; ++r) {
      float* score = s.scores + r * keys_wide;
      hide<F>(score, causal ? k_len - q_len + first + r + 1 : k_len, seen_wide);
      highest[r] = highest_of<F>(score, seen_wide);
    }
    for (int64_t r = 0; r < live; ++r) sum[r] = exponentials<F>(s.scores + r * keys_wide, seen_wide, highest[r]);
    for (int64_t j = 0; j < seen; j += kPart)
      multiply_tile<F>(live == 1, s.scores + j, keys_wide, values + j * values_stride, values_stride,
                       std::min<int64_t>(kPart, seen - j), wide, s.out, wide, j > 0);
    for (int64_t r = 0; r < live; ++r) {
      float* row = s.out + r * wide;
      const float share = 1.0f / sum[r];
      for (int64_t d = 0; d < wide; d += kWidth<F>) store(row + d, load<F>(row + d) * share);
      store_row<F>(a.dtype, row, a.dim, a.out, ((q_start + first + r) * a.heads + head) * a.dim);
    }
  }
}

template <class F>
UNIF2ACE_INLINE void attend_body(const Problem& a, int64_t begin, int64_t end, const Scratch& scratch) {
  for (int64_t task = begin; task < end; ++task)
    attend<F>(a, a.blocks + task / a.heads * kBlockWidth, task % a.heads, scratch);
}

UNIF2ACE_MULTIVERSION(run_attend, attend_body, (const Problem& a, int64_t begin, int64_t end, const Scratch& scratch),
                      (a, begin, end, scratch))

void check_keys(const char* names, const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* x : {&k, &v})
    check(x->dim() == 3 && x->scalar_type() == q.scalar_type() && x->size(0) == k.size(0) && x->size(1) == q.size(1) &&
              x->size(2) == q.size(2),
          "omni_attention: ", names, " must have one shape, and the heads, dim and dtype of q");
}

bool is_range(int64_t start, int64_t end, int64_t size) {
  return 0 <= start && start <= end && end <= size;
}

// Blocks of seven numbers; `past_k` and `past_v` may be `k` and `v` where no block has a past.
Tensor attend_blocks(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& past_k, const Tensor& past_v,
                     const std::vector<int64_t>& blocks, double scale) {
  check_float("omni_attention", "q", q);
  check(q.dim() == 3, "omni_attention: q must be [rows, heads, dim]");
  check_keys("k and v", q, k, v);
  check_keys("the past's k and v", q, past_k, past_v);
  const int64_t count = static_cast<int64_t>(blocks.size()) / kBlockWidth, rows = q.size(0), heads = q.size(1);
  int64_t longest = 0, covered = 0;
  std::vector<std::pair<int64_t, int64_t>> queries;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t* block = blocks.data() + b * kBlockWidth;
    // Ranges first: their lengths are differences that then cannot overflow.
    const bool inside = is_range(block[0], block[1], rows) && is_range(block[2], block[3], k.size(0)) &&
                        is_range(block[5], block[6], past_k.size(0));
    const int64_t q_len = inside ? block[1] - block[0] : 0, past = inside ? block[6] - block[5] : 0;
    const int64_t k_len = inside ? block[3] - block[2] + past : 0;
    check(inside && (q_len == 0 || k_len >= (block[4] != 0 ? q_len : 1)), "omni_attention: block (", block[0], ", ",
          block[1], ", ", block[2], ", ", block[3], ") with the past (", block[5], ", ", block[6], ") does not fit ",
          rows, " queries, ", k.size(0), " keys and ", past_k.size(0), " of the past");
    longest = std::max(longest, k_len);
    if (q_len > 0) queries.emplace_back(block[0], block[1]);
  }
  // A row in no block would stay unwritten, one in two would be written by two threads.
  std::sort(queries.begin(), queries.end());
  queries.emplace_back(rows, rows);
  for (const auto& [first, last] : queries) {
    check(first == covered, "omni_attention: query row ", std::min(first, covered), " must lie in one block");
    covered = last;
  }

  const Tensor q_dense = dense_heads(q), k_dense = dense_heads(k), v_dense = dense_heads(v);
  const Tensor past_k_dense = dense_heads(past_k), past_v_dense = dense_heads(past_v);
  Tensor out = empty_cpu<3>({rows, heads, q.size(2)}, aoti_dtype(q));
  const Problem a{q.scalar_type(),
                  heads_of(q_dense),
                  heads_of(k_dense),
                  heads_of(v_dense),
                  heads_of(past_k_dense),
                  heads_of(past_v_dense),
                  out.mutable_data_ptr(),
                  heads,
                  static_cast<int>(q.size(2)),
                  static_cast<float>(scale * 1.4426950408889634),  // log2(e): see exponentials
                  blocks.data()};
  torch::stable::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(a, longest);
    run_attend(a, begin, end, scratch);
  });
  return out;
}

Tensor omni_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::vector<int64_t> blocks, double scale) {
  constexpr int64_t width = kBlockWidth - 2;
  check(blocks.size() % width == 0, "omni_attention: a block is five numbers, got ", blocks.size(), " in all");
  std::vector<int64_t> with_past;
  for (size_t at = 0; at < blocks.size(); at += width) {
    with_past.insert(with_past.end(), blocks.begin() + at, blocks.begin() + at + width);
    with_past.insert(with_past.end(), {0, 0});
  }
  return attend_blocks(q, k, v, k, v, with_past, scale);
}

Tensor omni_attention_past(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& past_k,
                           const Tensor& past_v, std::vector<int64_t> blocks, double scale) {
  check(blocks.size() % kBlockWidth == 0, "omni_attention: a block with a past is seven numbers, got ", blocks.size(),
        " in all");
  return attend_blocks(q, k, v, past_k, past_v, blocks, scale);
}

}  // namespace
}  // namespace unif2ace::omni_attention

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("omni_attention", TORCH_BOX(&unif2ace::omni_attention::omni_attention));
  m.impl("omni_attention_past", TORCH_BOX(&unif2ace::omni_attention::omni_attention_past));
}
