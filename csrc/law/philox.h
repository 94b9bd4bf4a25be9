// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), scalar form.
#pragma once

#include <cstdint>

#include "platform.h"

namespace trak_ext {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

// Which column of which matrix: everything of the counter and key but the block.
struct ColumnStream {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t model_id;
  uint32_t column;
};

TRAK_EXT_LAW PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// The 128 random bits of one block of one column: the only place where the counter is laid out.
TRAK_EXT_LAW PhiloxWords block_words(const ColumnStream& stream, uint64_t block) {
  const PhiloxWords counter = {{static_cast<uint32_t>(block), stream.column,
                                static_cast<uint32_t>(block >> 32), stream.model_id}};
  return philox4x32(counter, stream.seed_low, stream.seed_high);
}

}  // namespace trak_ext
