// How entries are made: a chunk of matrix rows for one column tile, as floats, from the law.
#pragma once

#include "../law/normal.h"
#include "../law/rademacher.h"
#include "kernel_table.h"
#include "normal_simd.h"
#include "philox_simd.h"
#include "projection.h"

namespace trak_ext::cpu {
namespace {

constexpr int kColumnVectors = 2;                             // vectors of columns a tile
constexpr int kTileColumns = kColumnVectors * kLanes<float>;  // columns a tile

// A chunk is one Rademacher block or a whole number of normal blocks.
static_assert(kChunkParams == 1 << kRademacherBlockLog2);
static_assert(kChunkParams % (1 << kNormalBlockLog2) == 0);

// One chunk's entries: [kChunkParams][kTileColumns], row i the absolute parameter chunk * 128 + i.
struct EntryTile {
  alignas(kVectorBytes) float value[kChunkParams][kTileColumns];
};

// Rows [begin, end) of the tile are made (a few neighbours may be, too).
TRAK_EXT_OUT_OF_LINE void fill_rademacher(const KeySchedule& keys, uint64_t chunk, int begin,
                                          int end, uint32_t first_column, EntryTile& tile) {
  VecU words[4][kColumnVectors];
  philox_columns<kColumnVectors>(keys, make_shared_rounds(keys, chunk), first_column, words);
  for (int word = begin / 32; word * 32 < end; ++word) {
    for (int v = 0; v < kColumnVectors; ++v) {
      VecU bits = ~words[word][v];
      float* row = &tile.value[word * 32][v * kLanes<float>];
      for (int i = 0; i < 32; ++i, bits >>= 1, row += kTileColumns) {
        store(row, (bits << 31) | 0x3F800000u);  // a clear bit is the sign of -1.0f
      }
    }
  }
}

// In two passes, words first and then entries in their place, since both at once need more
// registers than there are.
TRAK_EXT_OUT_OF_LINE void fill_normal(const KeySchedule& keys, uint64_t chunk, int begin, int end,
                                      uint32_t first_column, EntryTile& tile) {
  constexpr int kBlockParams = 1 << kNormalBlockLog2;
  const int first_block = begin / kBlockParams;
  const int last_block = (end - 1) / kBlockParams;
  for (int block = first_block; block <= last_block; ++block) {
    VecU words[4][kColumnVectors];
    const uint64_t number = chunk * (kChunkParams / kBlockParams) + static_cast<uint64_t>(block);
    philox_columns<kColumnVectors>(keys, make_shared_rounds(keys, number), first_column, words);
    for (int i = 0; i < kBlockParams; ++i) {
      for (int v = 0; v < kColumnVectors; ++v) {
        store(&tile.value[block * kBlockParams + i][v * kLanes<float>], words[i][v]);
      }
    }
  }
  float* const last = tile.value[(last_block + 1) * kBlockParams - 1] + kTileColumns;
  for (float* entry = tile.value[first_block * kBlockParams]; entry < last;
       entry += kLanes<float>) {
    store(entry, normal_from_word(load<VecU>(entry)));
  }
}

TRAK_EXT_INLINE void fill_entries(Kind kind, const KeySchedule& keys, uint64_t chunk, int begin,
                                  int end, uint32_t first_column, EntryTile& tile) {
  if (kind == Kind::kRademacher) {
    fill_rademacher(keys, chunk, begin, end, first_column, tile);
  } else {
    fill_normal(keys, chunk, begin, end, first_column, tile);
  }
}

}  // namespace
}  // namespace trak_ext::cpu
