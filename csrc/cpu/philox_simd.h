// Philox4x32-10 for several consecutive columns at once; the same bits as law/philox.h.
#pragma once

#include "../law/philox.h"
#include "simd.h"

namespace trak_ext {
namespace {

constexpr int kColumnVectors = 2;                               // VecF a column tile
constexpr int kTileColumns = kColumnVectors * kLanes<float>;    // columns a tile
constexpr int kPhiloxChains = kTileColumns * 8 / kVectorBytes;  // VecQ a tile

// Round keys are the same for every block, so they are made once a call.
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

// words[i][v] holds word i of columns first_column + v * lanes .. (v + 1) * lanes - 1.
TRAK_EXT_INLINE void philox_tile(const KeySchedule& keys, uint64_t block, uint32_t first_column,
                                 VecU words[4][kColumnVectors]) {
  // Columns differ in one counter word only, so in the first three rounds half of the state is the
  // same for all of them: that half is made once, in scalars.
  const auto low = [](uint64_t product) { return static_cast<uint32_t>(product); };
  const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
  const uint64_t first0 = uint64_t{kPhiloxMultiplier0} * low(block);
  const uint64_t first1 = uint64_t{kPhiloxMultiplier1} * high(block);
  const uint64_t second1 =
      uint64_t{kPhiloxMultiplier1} * (high(first0) ^ keys.model_id ^ low(keys.key1[0]));
  const uint64_t third0 =
      uint64_t{kPhiloxMultiplier0} * (high(second1) ^ low(first1) ^ low(keys.key0[1]));
  const VecQ round1_x0 = VecQ{} + (high(first1) ^ low(keys.key0[0]));
  const VecQ round2_x2 = VecQ{} + (low(first0) ^ low(keys.key1[1]));
  const VecQ round3_x0 = VecQ{} + (low(second1) ^ low(keys.key0[2]));
  const VecQ round3_x2 = VecQ{} + (high(third0) ^ low(keys.key1[2]));
  const VecQ multiplier0 = VecQ{} + kPhiloxMultiplier0;
  const VecQ multiplier1 = VecQ{} + kPhiloxMultiplier1;

  // A 64-bit lane a column. Only its low half means anything: the multiply ignores the high half,
  // so products are carried whole and never masked.
  VecQ x0[kPhiloxChains], x1[kPhiloxChains], x2[kPhiloxChains], x3[kPhiloxChains];
  constexpr int kLanesQ = kVectorBytes / 8;
  VecQ columns;
  for (int lane = 0; lane < kLanesQ; ++lane) {
    columns[lane] = first_column + static_cast<uint32_t>(lane);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kPhiloxChains; ++c) {
    const VecQ after_round1 = (columns + static_cast<uint64_t>(c * kLanesQ)) ^ round1_x0;
    const VecQ second0 = multiply_low_halves(after_round1, multiplier0);
    const VecQ third1 = multiply_low_halves((second0 >> 32) ^ round2_x2, multiplier1);
    x0[c] = (third1 >> 32) ^ round3_x0;
    x1[c] = third1;
    x2[c] = second0 ^ round3_x2;
    x3[c] = VecQ{} + low(third0);
  }
#pragma GCC unroll 7
  for (int round = 3; round < kPhiloxRounds; ++round) {
    const VecQ key0 = VecQ{} + keys.key0[round];
    const VecQ key1 = VecQ{} + keys.key1[round];
#pragma GCC unroll 8
    for (int c = 0; c < kPhiloxChains; ++c) {
      const VecQ product0 = multiply_low_halves(x0[c], multiplier0);
      const VecQ product1 = multiply_low_halves(x2[c], multiplier1);
      x0[c] = (product1 >> 32) ^ x1[c] ^ key0;
      x2[c] = (product0 >> 32) ^ x3[c] ^ key1;
      x1[c] = product1;
      x3[c] = product0;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kColumnVectors; ++v) {
    words[0][v] = pack_low_halves(x0[2 * v], x0[2 * v + 1]);
    words[1][v] = pack_low_halves(x1[2 * v], x1[2 * v + 1]);
    words[2][v] = pack_low_halves(x2[2 * v], x2[2 * v + 1]);
    words[3][v] = pack_low_halves(x3[2 * v], x3[2 * v + 1]);
  }
}

}  // namespace
}  // namespace trak_ext
