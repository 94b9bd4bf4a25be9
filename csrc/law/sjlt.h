// Sparse entries, signed rotations: each repetition r sends parameter p = c k' + i, of chunk c, to
// the column (i + b) mod k' of its own k' columns, with a random sign.
//
// Counters are those of the dense kinds with the highest bits of the third word set, which no dense
// block reaches: bit 31 alone for signs, bits 31 and 30 for rotations.
#pragma once

#include "philox.h"

namespace trak_ext {

struct SjltLaw {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t model_id;
  uint64_t width;       // k', the columns and the rotation period of a repetition, 1 to 2^32
  int64_t repetitions;  // s, the entries of a parameter that are not 0
};

constexpr int kSjltSignLog2 = 7;      // parameters a Philox block, as a shift
constexpr int kSjltRotationLog2 = 2;  // chunks a Philox block, as a shift
constexpr uint64_t kSjltSigns = uint64_t{2} << 62;
constexpr uint64_t kSjltRotations = uint64_t{3} << 62;

// The sum over parameters is a tree of this radix over the numbers of the chunks (law.md).
constexpr int kSjltRadixLog2 = 6;
constexpr int kSjltRadix = 1 << kSjltRadixLog2;

// Signs of parameters 128 block .. 128 block + 127, bit 0 of the first word first: 1 is +.
TRAK_EXT_LAW PhiloxWords sjlt_sign_words(const SjltLaw& law, uint32_t repetition, uint64_t block) {
  return block_words({law.seed_low, law.seed_high, law.model_id, repetition}, block | kSjltSigns);
}

// Words of chunks 4 block .. 4 block + 3.
TRAK_EXT_LAW PhiloxWords sjlt_rotation_words(const SjltLaw& law, uint32_t repetition,
                                             uint64_t block) {
  return block_words({law.seed_low, law.seed_high, law.model_id, repetition},
                     block | kSjltRotations);
}

// The rotation b of a chunk, below the width.
TRAK_EXT_LAW uint64_t sjlt_rotation(uint32_t word, uint64_t width) {
  return (uint64_t{word} * width) >> 32;
}

// A word by its number, without an array that a device would keep in memory.
TRAK_EXT_LAW uint32_t sjlt_word(const PhiloxWords& words, uint32_t index) {
  return index < 2 ? (index == 0 ? words.word[0] : words.word[1])
                   : (index == 2 ? words.word[2] : words.word[3]);
}

// Where a parameter goes in a repetition, and whether with a plus: for the matrix; sums share their
// words.
struct SjltEntry {
  uint64_t column;
  bool plus;
};
TRAK_EXT_LAW SjltEntry sjlt_entry(const SjltLaw& law, uint32_t repetition, uint64_t param) {
  const uint64_t chunk = param / law.width;
  const PhiloxWords rotations = sjlt_rotation_words(law, repetition, chunk >> kSjltRotationLog2);
  const PhiloxWords signs = sjlt_sign_words(law, repetition, param >> kSjltSignLog2);
  const uint64_t column =
      param % law.width + sjlt_rotation(sjlt_word(rotations, chunk & 3u), law.width);
  const uint32_t bit = static_cast<uint32_t>(param) & 127u;
  return {column < law.width ? column : column - law.width,
          ((sjlt_word(signs, bit >> 5) >> (bit & 31u)) & 1u) != 0};
}

}  // namespace trak_ext
