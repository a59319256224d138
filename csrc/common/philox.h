// Philox 4x32-10, the counter-based generator behind all noise (specification: unif2ace/ops/_noise.py).
//
// Four output words are a pure function of a counter (code >> 2, position, step, stream) and a key, the seed: no state,
// so any thread may compute any part. Written once for W = uint64_t (scalar code, CUDA) and for vectors of uint64_t
// (CPU lanes). A 32-bit word sits in the low half of a 64-bit lane and the high half is junk: the product reads low
// halves only, so the junk never has to be cleared between rounds.
//
// Cost: 10 rounds of two 32 x 32 -> 64 bit products, two shifts and four xors give four words.
#pragma once

#include <cstdint>

#include "common/numerics.h"

namespace unif2ace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // multipliers of c0 and c2
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // what the key words grow by each round

// The 64-bit product of the low halves. Vector types bring their own overload (cpu/lanes.h).
constexpr UNIF2ACE_INLINE uint64_t multiply_low_halves(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b);
}

// Counters and, afterwards, output words, in the low halves.
template <class W>
struct PhiloxWords {
  W c0, c1, c2, c3;
};

// The key words of all rounds, for a seed: made once for many counters.
template <class W>
struct PhiloxKeys {
  W k0[10], k1[10];

  constexpr UNIF2ACE_INLINE explicit PhiloxKeys(uint64_t seed) : k0{}, k1{} {
    for (int round = 0; round < 10; ++round) {
      k0[round] = W{} + static_cast<uint32_t>(static_cast<uint32_t>(seed) + round * kPhiloxW0);
      k1[round] = W{} + static_cast<uint32_t>(static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1);
    }
  }
};

// Turns `count` independent counters into their words, side by side: one's latency hides behind the others' work.
template <int count, class W>
constexpr UNIF2ACE_INLINE void philox(PhiloxWords<W> (&c)[count], const PhiloxKeys<W>& keys) {
  UNIF2ACE_UNROLL(10)
  for (int round = 0; round < 10; ++round)
    for (int i = 0; i < count; ++i) {
      const W p0 = multiply_low_halves(c[i].c0, W{} + kPhiloxM0), p1 = multiply_low_halves(c[i].c2, W{} + kPhiloxM1);
      c[i] = {(p1 >> 32) ^ c[i].c1 ^ keys.k0[round], p1, (p0 >> 32) ^ c[i].c3 ^ keys.k1[round], p0};
    }
}

// One counter under one seed.
constexpr UNIF2ACE_INLINE PhiloxWords<uint64_t> philox(PhiloxWords<uint64_t> counter, uint64_t seed) {
  PhiloxWords<uint64_t> c[1] = {counter};
  philox(c, PhiloxKeys<uint64_t>(seed));
  return c[0];
}

// Known answers published with the generator (Random123, kat_vectors), checked by every compiler that reads this file.
constexpr bool philox_gives(PhiloxWords<uint64_t> counter, uint64_t seed, PhiloxWords<uint64_t> words) {
  const PhiloxWords<uint64_t> found = philox(counter, seed);
  return static_cast<uint32_t>(found.c0) == words.c0 && static_cast<uint32_t>(found.c1) == words.c1 &&
         static_cast<uint32_t>(found.c2) == words.c2 && static_cast<uint32_t>(found.c3) == words.c3;
}
static_assert(philox_gives({0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}), "");
static_assert(philox_gives({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff,
                           {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}),
              "");
static_assert(philox_gives({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822,
                           {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}),
              "");

}  // namespace unif2ace
