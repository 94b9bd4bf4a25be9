// Philox4x32-10 for several consecutive columns at once; the same bits as law/philox.h.
#pragma once

#include "../law/philox.h"
#include "simd.h"

namespace trak_ext::cpu {
namespace {

// What every block of a call shares: round keys, as scalars.
struct KeySchedule {
  uint64_t key0[kPhiloxRounds];
  uint64_t key1[kPhiloxRounds];
  uint32_t model_id;
};

TRAK_EXT_INLINE KeySchedule make_key_schedule(uint32_t seed_low, uint32_t seed_high,
                                              uint32_t model_id) {
  KeySchedule keys;
  keys.model_id = model_id;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.key0[round] = static_cast<uint32_t>(seed_low + round * kPhiloxWeyl0);
    keys.key1[round] = static_cast<uint32_t>(seed_high + round * kPhiloxWeyl1);
  }
  return keys;
}

// What all columns of a block share. They differ in one counter word only, so half of the state in
// the first three rounds is the same for all of them:
//   round 1: x0 = column ^ round1_x0;  x1, x2, x3 shared
//   round 2: x2 = high(M0 x0) ^ round2_x2, x3 = low(M0 x0);  x0, x1 shared
//   round 3: x0 = high(M1 x2) ^ round3_x0, x1 = low(M1 x2), x2 = x3 ^ round3_x2;  x3 = round3_x3
struct SharedRounds {
  uint32_t round1_x0, round2_x2, round3_x0, round3_x2, round3_x3;
};

TRAK_EXT_INLINE SharedRounds make_shared_rounds(const KeySchedule& keys, uint64_t block) {
  const auto low = [](uint64_t product) { return static_cast<uint32_t>(product); };
  const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
  const uint64_t first0 = uint64_t{kPhiloxMultiplier0} * low(block);
  const uint64_t first1 = uint64_t{kPhiloxMultiplier1} * high(block);
  const uint64_t second1 =
      uint64_t{kPhiloxMultiplier1} * (high(first0) ^ keys.model_id ^ low(keys.key1[0]));
  const uint64_t third0 =
      uint64_t{kPhiloxMultiplier0} * (high(second1) ^ low(first1) ^ low(keys.key0[1]));
  return {high(first1) ^ low(keys.key0[0]), low(first0) ^ low(keys.key1[1]),
          low(second1) ^ low(keys.key0[2]), high(third0) ^ low(keys.key1[2]), low(third0)};
}

// words[i][v] holds word i of columns first_column + v * lanes .. + lanes - 1. Two vectors of
// columns at a time hide the multiplies' latency.
template <int kVectors>
TRAK_EXT_INLINE void philox_columns(const KeySchedule& keys, const SharedRounds& shared,
                                    uint32_t first_column, VecU words[4][kVectors]) {
  // A 64-bit lane a column. Only its low half means anything: the multiply ignores the high half,
  // so products are carried whole and never masked.
  constexpr int kChains = 2 * kVectors;
  VecQ x0[kChains], x1[kChains], x2[kChains], x3[kChains];
  const VecQ multiplier0 = VecQ{} + kPhiloxMultiplier0;
  const VecQ multiplier1 = VecQ{} + kPhiloxMultiplier1;
  const VecQ round3_x3 = VecQ{} + shared.round3_x3;
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) {
    const VecQ columns = packed_order(c % 2) + (first_column + c / 2 * kLanes<uint32_t>);
    x3[c] = multiply_low_halves(columns ^ shared.round1_x0, multiplier0);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) {
    x1[c] = multiply_low_halves((x3[c] >> 32) ^ shared.round2_x2, multiplier1);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) {
    x0[c] = (x1[c] >> 32) ^ shared.round3_x0;
    x2[c] = x3[c] ^ shared.round3_x2;
    x3[c] = round3_x3;
  }
#pragma GCC unroll 7
  for (int round = 3; round < kPhiloxRounds; ++round) {
    const VecQ key0 = VecQ{} + keys.key0[round];
    const VecQ key1 = VecQ{} + keys.key1[round];
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      const VecQ product0 = multiply_low_halves(x0[c], multiplier0);
      const VecQ product1 = multiply_low_halves(x2[c], multiplier1);
      x0[c] = (product1 >> 32) ^ x1[c] ^ key0;
      x2[c] = (product0 >> 32) ^ x3[c] ^ key1;
      x1[c] = product1;
      x3[c] = product0;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    words[0][v] = pack_low_halves(x0[2 * v], x0[2 * v + 1]);
    words[1][v] = pack_low_halves(x1[2 * v], x1[2 * v + 1]);
    words[2][v] = pack_low_halves(x2[2 * v], x2[2 * v + 1]);
    words[3][v] = pack_low_halves(x3[2 * v], x3[2 * v + 1]);
  }
}

}  // namespace
}  // namespace trak_ext::cpu
