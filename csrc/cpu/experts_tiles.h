// How the op `experts` cuts its work: tiles, threads, memory and the library's product on them.
//
// A tile is a range of rows of one expert: the unit that one thread multiplies on its own. An expert's tiles are
// equally high up to kUnit rows, all tiles about as high as each other, and threads take the next largest tile when
// they are done with one; so an even load and all tokens in one expert both keep every core busy.
//
// The library compiles a kernel for every new shape (0.2 to 0.4 ms here, as much as three tiles of 128 x 512 x 256
// take), and rows per expert differ from batch to batch. So tiles are padded to few distinct heights, `padded_rows`. A
// row's result does not depend on the rows beside it, thus neither padding nor cutting changes a bit of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/experts_rows.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"

namespace unif2ace::experts {

// The height to aim at (tiles reach 1.5 times that). Measured on a Zen 5 core, 512 x 256 weights, float32 / bfloat16
// GFLOP/s at 64, 128, 256, 512 rows: 183 / 318, 203 / 388, 224 / 441, 234 / 468: the library packs the weights anew for
// each tile. Small weights gain more: 2112 tokens, 2 of 4 experts of 192 x 128, float32, two threads: 1.43 ms in tiles
// of 256 rows, 1.34 in tiles of 512.
constexpr int64_t kTile = 512;
constexpr int64_t kUnit = 16;

// Multiples of kUnit below 512, above that 16 heights per octave: at most 1/16 in vain, few shapes to compile.
inline int64_t padded_rows(int64_t rows) {
  int64_t unit = kUnit;
  while (unit * 32 <= rows) unit *= 2;
  return (rows + unit - 1) / unit * unit;
}

// Tiles wanted in a forward pass, whose results do not depend on the cut: four per thread spread an uneven load.
inline int64_t forward_tile_count() {
  return 4 * static_cast<int64_t>(torch::stable::get_num_threads());
}

// Tiles wanted in a backward pass. Column sums are added up tile by tile, so the number of threads must not matter.
constexpr int64_t kBackwardTiles = 16;

struct Tile {
  int64_t expert;
  int64_t begin, rows;    // in the sorted rows
  int64_t place, padded;  // in buffers where each expert has padded_rows
};

struct Tiles {
  std::vector<Tile> tiles;
  std::vector<int64_t> place;    // [experts + 1]: first padded row of each expert
  std::vector<int64_t> first;    // [experts + 1]: first tile of each expert
  std::vector<int64_t> by_size;  // tiles, the largest first: what is left for the end is small

  // `wanted` tiles to share out, unless they would be lower than 64 rows.
  Tiles(const int32_t* offsets, int64_t experts, int64_t wanted) : place(experts + 1), first(experts + 1) {
    const int64_t height = std::clamp<int64_t>(offsets[experts] / wanted, 64, kTile);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t begin = offsets[e], rows = offsets[e + 1] - begin, padded = padded_rows(rows);
      place[e + 1] = place[e] + padded;
      const int64_t units = padded / kUnit;
      const int64_t count = rows == 0 ? 0 : std::max<int64_t>((padded + height / 2) / height, 1);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t low = units * i / count * kUnit, high = units * (i + 1) / count * kUnit;
        tiles.push_back({e, begin + low, std::min(high, rows) - low, place[e] + low, high - low});
      }
      first[e + 1] = tiles.size();
    }
    by_size.resize(tiles.size());
    std::iota(by_size.begin(), by_size.end(), 0);
    std::stable_sort(by_size.begin(), by_size.end(),
                     [&](int64_t a, int64_t b) { return tiles[a].padded > tiles[b].padded; });
  }
};

// Memory of one thread, kept from task to task; uninitialised, aligned to cache lines. (Aligned here: the aligned `new`
// of glibc costs 0.1 us more, which one token through small experts would feel.)
class Buffer {
 public:
  template <class T = void>
  T* fit(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(new char[bytes + kLine - 1]);
      size_ = bytes;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + kLine - 1) / kLine * kLine);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

// Calls body(task, scratch) for every task, each thread taking the next one when it is free; a Scratch per thread.
// Always one worker per thread of torch, so that the library sees the same situation for one task as for many.
template <class Scratch, class Body>
void run_tasks(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t task = next++; task < tasks; task = next++) body(task, scratch);
  });
}

// One matrix (or bias) per expert, in the compute dtype. float16 is converted when a thread comes to an expert.
class Matrices {
 public:
  Matrices(const Tensor& all, int64_t rows, int64_t columns)
      : dtype_(all.scalar_type()),
        data_(static_cast<const char*>(all.const_data_ptr())),
        rows_(rows),
        columns_(columns) {}

  struct Cache {
    Buffer buffer;
    int64_t expert = -1;
  };

  Tensor of(int64_t expert, Cache& cache) const {
    return matrix(elements(expert, cache), rows_, columns_, columns_, compute_dtype(dtype_));
  }
  Tensor transposed(int64_t expert, Cache& cache) const {
    return matrix_t(elements(expert, cache), rows_, columns_, columns_, compute_dtype(dtype_));
  }
  Tensor vector(int64_t expert, Cache& cache) const {
    return vector_of(elements(expert, cache), rows_ * columns_, compute_dtype(dtype_));
  }

 private:
  const void* elements(int64_t expert, Cache& cache) const {
    const int64_t n = rows_ * columns_;
    const char* matrix = data_ + expert * n * size_of(dtype_);
    if (dtype_ == compute_dtype(dtype_)) return matrix;
    void* converted = cache.buffer.fit(n * size_of(compute_dtype(dtype_)));
    if (cache.expert != expert) widen(dtype_, matrix, n, converted);
    cache.expert = expert;
    return converted;
  }

  ScalarType dtype_;
  const char* data_;
  int64_t rows_, columns_;
};

// One bias per expert, or none.
class Biases {
 public:
  Biases(const std::optional<Tensor>& all, int64_t width) {
    if (all) biases_.emplace(*all, 1, width);
  }
  std::optional<Tensor> of(int64_t expert, Matrices::Cache& cache) const {
    if (!biases_) return std::nullopt;
    return biases_->vector(expert, cache);
  }

 private:
  std::optional<Matrices> biases_;
};

// x w^T + b of the library; see gemm.h.
inline Tensor product(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b = std::nullopt) {
  return linear(x, w, b ? &*b : nullptr);
}

// Refuses offsets that do not cut 0 .. rows into ranges. `name` opens the message: "expert_mlp: plan.offsets".
inline const int32_t* checked_offsets(const char* name, const Tensor& offsets, int64_t experts, int64_t rows) {
  const int32_t* at = pointer<int32_t>(offsets);
  check(at[0] == 0, name, " must start at 0, got ", at[0]);
  for (int64_t e = 0; e < experts; ++e)
    check(at[e] <= at[e + 1], name, " must not decrease, got ", at[e + 1], " after ", at[e]);
  check(at[experts] <= rows, name, " must end at no more than the ", rows, " rows there are, got ", at[experts]);
  return at;
}

}  // namespace unif2ace::experts
