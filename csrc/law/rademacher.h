// Rademacher entries: one bit an entry, 128 consecutive parameters a Philox block.
#pragma once

#include "philox.h"

namespace trak_ext {

constexpr int kRademacherBlockLog2 = 7;  // parameters a block, as a shift

// +1 where the bit is 1, else -1; bit 0 of x0 belongs to the first parameter of the block.
TRAK_EXT_LAW float rademacher_entry(const ColumnStream& stream, uint64_t param) {
  const PhiloxWords words = block_words(stream, param >> kRademacherBlockLog2);
  const uint32_t bit = static_cast<uint32_t>(param) & 127u;
  return (words.word[bit >> 5] >> (bit & 31u)) & 1u ? 1.0f : -1.0f;
}

}  // namespace trak_ext
