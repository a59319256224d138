// The rows of one image that stay unknown, chosen by one block of threads. Semantics: unif2ace/ops/sampling.py.
//
// The keep-th smallest key is found bit by bit, from the top: the largest limit with fewer than `keep` keys below it.
// A round is one comparison per row and one barrier that counts (__syncthreads_count), so 32 rounds take the place of a
// sort, and any number of rows is a loop. Rows that tie with that key, nearly always one, compete by position in the
// same way, and rows of equal position by their number.
#pragma once

#include "common/gumbel.h"
#include "common/philox.h"

namespace unif2ace::sampling::gpu {

constexpr uint32_t kConfidenceStream = 1;

// How many rows of [first, last) fulfil `holds(row)`. To be called by the whole block.
template <class Predicate>
__device__ __forceinline__ int64_t count_rows(int64_t first, int64_t last, Predicate holds) {
  int64_t count = 0;
  for (int64_t start = first; start < last; start += blockDim.x) {
    const int64_t row = start + threadIdx.x;
    count += __syncthreads_count(row < last && holds(row));
  }
  return count;
}

// The n-th smallest `number(row)`, an unsigned one of `bits` bits, among the rows with `competes(row)`.
template <class Predicate, class Number>
__device__ __forceinline__ uint64_t nth_smallest(int64_t first, int64_t last, int64_t n, int bits, Predicate competes,
                                                 Number number) {
  uint64_t limit = 0;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint64_t higher = limit | (uint64_t{1} << bit);
    if (count_rows(first, last, [&](int64_t row) { return competes(row) && number(row) < higher; }) < n) limit = higher;
  }
  return limit;
}

// Sets mask[row] for the rows [first, last): true for the `keep` ones that come first in the order (key, position,
// row). `keys` is scratch, of which a thread reads what it wrote.
template <class Confidence, class Position>
__device__ __forceinline__ void mark_smallest(int64_t first, int64_t last, int64_t keep, uint64_t seed, uint32_t step,
                                              float tau, Confidence confidence, Position position, int32_t* keys,
                                              bool* mask) {
  for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) {
    const PhiloxWords<uint64_t> words =
        philox({0, static_cast<uint32_t>(position(row)), step, kConfidenceStream}, seed);
    keys[row] = ordered_key(confidence(row) + tau * gumbel<float>(static_cast<int32_t>(words.c0)));
  }
  // Unsigned numbers of the same order.
  const auto key = [&](int64_t row) -> uint64_t { return static_cast<uint32_t>(keys[row]) ^ 0x80000000u; };
  const auto place = [&](int64_t row) { return static_cast<uint64_t>(position(row)) ^ (uint64_t{1} << 63); };
  const auto number = [&](int64_t row) { return static_cast<uint64_t>(row - first); };

  const uint64_t key_limit = nth_smallest(first, last, keep, 32, [](int64_t) { return true; }, key);
  int64_t left = keep - count_rows(first, last, [&](int64_t row) { return key(row) < key_limit; });
  const auto tied = [&](int64_t row) { return key(row) == key_limit; };

  uint64_t place_limit = ~uint64_t{0}, number_limit = ~uint64_t{0};
  if (count_rows(first, last, tied) > left) {
    place_limit = nth_smallest(first, last, left, 64, tied, place);
    left -= count_rows(first, last, [&](int64_t row) { return tied(row) && place(row) < place_limit; });
    const auto twin = [&](int64_t row) { return tied(row) && place(row) == place_limit; };
    if (count_rows(first, last, twin) > left) number_limit = nth_smallest(first, last, left, 63, twin, number);
  }
  for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x)
    mask[row] = key(row) < key_limit ||
                (tied(row) && (place(row) < place_limit || (place(row) == place_limit && number(row) <= number_limit)));
}

}  // namespace unif2ace::sampling::gpu
