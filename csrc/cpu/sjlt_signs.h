// Random bits of the sparse kind for one instruction set: rotations of a node's chunks, and signs
// laid out by column, as the sums of a panel want them.
#pragma once

#include "simd.h"
#include "sjlt.h"

namespace trak_ext::cpu {
namespace {

constexpr int kSignBlock = 1 << kSjltSignLog2;  // parameters a Philox block
constexpr int kBlockLanes = kLanes<double>;     // Philox blocks a vector

// The words of `count` consecutive blocks, four each; up to kBlockLanes - 1 more are written.
TRAK_EXT_INLINE void fill_blocks(const SjltLaw& law, uint32_t repetition, uint64_t block,
                                 int64_t count, uint32_t* words) {
  const VecQ multiplier0 = VecQ{} + kPhiloxMultiplier0;
  const VecQ multiplier1 = VecQ{} + kPhiloxMultiplier1;
  const VecQ low = VecQ{} + 0xFFFFFFFFu;
  VecQ lane;
  for (int i = 0; i < kBlockLanes; ++i) lane[i] = static_cast<uint64_t>(i);
  for (int64_t first = 0; first < count; first += kBlockLanes) {
    const VecQ blocks = lane + (block + static_cast<uint64_t>(first));
    VecQ x0 = blocks & low, x1 = VecQ{} + repetition, x2 = blocks >> 32;
    VecQ x3 = VecQ{} + law.model_id;
    uint32_t key0 = law.seed_low, key1 = law.seed_high;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const VecQ product0 = multiply_low_halves(x0, multiplier0);
      const VecQ product1 = multiply_low_halves(x2, multiplier1);
      x0 = (product1 >> 32) ^ x1 ^ key0;
      x2 = (product0 >> 32) ^ x3 ^ key1;
      x1 = product1 & low;
      x3 = product0 & low;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    for (int i = 0; i < kBlockLanes; ++i) {
      uint32_t* own = words + (first + i) * 4;
      own[0] = static_cast<uint32_t>(x0[i]);
      own[1] = static_cast<uint32_t>(x1[i]);
      own[2] = static_cast<uint32_t>(x2[i]);
      own[3] = static_cast<uint32_t>(x3[i]);
    }
  }
}

// The signs of `count` consecutive parameters: bit i of the result, from its first word on, is
// that of parameter first + i. `words` has room for room_for_signs(count).
constexpr int64_t room_for_signs(int64_t count) {
  return (count / kSignBlock + 3 + kBlockLanes) * 4 + 2;
}
TRAK_EXT_INLINE void read_signs(const SjltLaw& law, uint32_t repetition, uint64_t first,
                                int64_t count, uint32_t* words) {
  const auto skip = static_cast<int>(first % kSignBlock);
  const int64_t blocks = ceil_div(skip + count, kSignBlock);
  fill_blocks(law, repetition, (first >> kSjltSignLog2) | kSjltSigns, blocks, words);
  words[blocks * 4] = 0;
  const uint32_t* source = words + skip / 32;
  const int shift = skip % 32;
  for (int64_t i = 0; 32 * i < count; ++i) {
    const uint64_t pair = source[i] | uint64_t{source[i + 1]} << 32;
    words[i] = static_cast<uint32_t>(pair >> shift);
  }
}

// Where the parameters of a chunk that meet a panel's columns lie: a run from `first` on, of `left`
// columns, then, where the rotation wraps around, the chunk's own first ones.
struct ChunkRuns {
  uint64_t first;
  int64_t left;
  uint64_t chunk_first;
};

TRAK_EXT_INLINE void locate_chunks(const SjltLaw& law, uint64_t node, const SjltPanel& panel,
                                   ChunkRuns* chunks) {
  constexpr int64_t kBlocks = kSjltRadix >> kSjltRotationLog2;
  uint32_t words[(kBlocks + kBlockLanes) * 4];
  fill_blocks(law, panel.repetition,
              (node << (kSjltRadixLog2 - kSjltRotationLog2)) | kSjltRotations, kBlocks, words);
  const int64_t columns = panel.column_end - panel.column_begin;
  for (int c = 0; c < kSjltRadix; ++c) {
    const uint64_t chunk_first = ((node << kSjltRadixLog2) + static_cast<uint64_t>(c)) * law.width;
    const uint64_t rotation = sjlt_rotation(words[c], law.width);
    uint64_t place = static_cast<uint64_t>(panel.column_begin) + law.width - rotation;
    if (place >= law.width) place -= law.width;
    const auto before = static_cast<int64_t>(law.width - place);
    chunks[c] = {chunk_first + place, before < columns ? before : columns, chunk_first};
  }
}

// flips[i] bit b: whether column 16 i + b of the panel gets a minus. `words` as for read_signs(),
// twice. Writes whole 32 bits; flips of columns past the last mean nothing.
TRAK_EXT_INLINE void lay_out_signs(const SjltLaw& law, uint32_t repetition, const ChunkRuns& runs,
                                   int64_t columns, int64_t flips_stride, uint32_t* words,
                                   uint16_t* flips) {
  read_signs(law, repetition, runs.first, runs.left, words);
  const int64_t wrapped = columns - runs.left;
  uint32_t* const rest = words + room_for_signs(columns) + 1;
  if (wrapped > 0) read_signs(law, repetition, runs.chunk_first, wrapped, rest);
  rest[-1] = 0;
  const int64_t whole = runs.left / 32;
  const int shift = static_cast<int>(runs.left % 32);
  for (int64_t i = 0; 32 * i < columns; ++i) {
    uint32_t plus = 0;
    if (i < whole) {
      plus = words[i];
    } else {
      const int64_t at = i - whole;
      const uint64_t pair = uint64_t{rest[at]} << 32 | rest[at - 1];
      plus = static_cast<uint32_t>(pair >> (32 - shift));
      if (at == 0 && shift > 0) {
        const uint32_t own = (1u << shift) - 1u;
        plus = (words[i] & own) | (plus & ~own);
      }
    }
    flips[2 * i * flips_stride] = static_cast<uint16_t>(~plus);
    flips[(2 * i + 1) * flips_stride] = static_cast<uint16_t>(~plus >> 16);
  }
}

}  // namespace
}  // namespace trak_ext::cpu
