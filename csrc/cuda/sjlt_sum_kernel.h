// The sparse kind on a device, first part: the sums of the tree's lowest nodes, 64 chunks each.
//
// A thread has one column of one node, and reads the one parameter of each chunk that meets it, for
// kRows rows at a time: neighbours in a warp read neighbours in memory, and nothing is added by two
// threads, so the order of the sum is a loop's. Rotations and signs are the same for all rows: a
// block makes them once, in shared memory. Issue slots an element and row: an address (2), a load,
// a sign, an addition, and 1 / kRows of some 25 for place, sign and address of the first row.
#pragma once

#include "../law/arithmetic.h"
#include "../sjlt_problem.h"
#include "device.h"
#include "element.h"

namespace trak_ext {

constexpr int kSjltThreads = 256;
constexpr int kSjltTileMax = 256;  // columns a block; narrower tiles take several nodes a block
constexpr int kSjltTileMin = 64;
// Philox blocks of signs for a chunk of a tile: those from its first column on, and those from the
// beginning of the chunk on, where a rotation wraps around. 256 parameters lie in 3 at most.
constexpr int kSjltSegmentBlocks = 3;
constexpr int kSjltBlocks = 2 * kSjltSegmentBlocks;

// One launch: the sums of some nodes, rows and columns, as far as one tensor goes.
struct SjltSumProblem {
  SjltLaw law;
  GradientView grad;
  int64_t param_bytes;  // from one parameter of the tensor to the next
  int64_t row_bytes;
  int64_t first_row;
  int64_t rows;
  int64_t row_groups;
  int32_t tile_columns;  // kSjltTileMin to kSjltTileMax, a power of two
  int64_t tiles_per_repetition;
  int64_t first_tile;  // of all repetitions' tiles
  int64_t tiles;
  uint64_t first_node;
  int64_t nodes;
  int32_t go_on;  // whether the first node's sums so far, of tensors before this, are there
  float* sums;    // [nodes, rows, columns]; rows and columns are those of a pass
  int64_t sums_node_pitch;
  int64_t sums_row_pitch;
  int64_t first_column;  // of the pass, among all repetitions' columns
};

constexpr int sjlt_shared_bytes(int tile_columns) {
  return kSjltThreads / tile_columns * kSjltRadix *
         static_cast<int>(kSjltBlocks * sizeof(Words4) + sizeof(uint32_t));
}

template <DType kDType>
TRAK_EXT_DEVICE float load_as(const char* address) {
  if constexpr (kDType == DType::kFloat64) {
    return static_cast<float>(device::load_global<double>(address));
  } else if constexpr (kDType == DType::kFloat32) {
    return device::load_global<float>(address);
  } else if constexpr (kDType == DType::kFloat16) {
    return device::half_to_float(device::load_global<uint16_t>(address));
  } else {
    return bfloat16_to_float(device::load_global<uint16_t>(address));
  }
}

// Where a column's parameter lies in a chunk. Both and the width may be 2^32 - 1, and the width
// 2^32, of which the low word is 0 and does as well.
TRAK_EXT_DEVICE uint32_t place_of(uint32_t column, uint32_t rotation, uint32_t width) {
  return column - rotation + (column < rotation ? width : 0);
}

// A block's tile of one repetition's columns, and the node of a thread's group.
struct SjltTile {
  uint32_t repetition;
  uint32_t column;  // the first
  uint32_t columns;
  int group;  // of threads, a node each
  uint64_t node;
  bool exists;  // whether the launch has that node
};

TRAK_EXT_DEVICE SjltTile locate_sjlt_tile(const SjltSumProblem& problem, int64_t node_group,
                                          int64_t tile_index) {
  const int64_t tile = problem.first_tile + tile_index;
  const int64_t column = tile % problem.tiles_per_repetition * problem.tile_columns;
  const int64_t left = static_cast<int64_t>(problem.law.width) - column;
  const int groups = kSjltThreads / problem.tile_columns;
  const int group = device::thread_index() / problem.tile_columns;
  const int64_t node = node_group * groups + group;
  return {static_cast<uint32_t>(tile / problem.tiles_per_repetition),
          static_cast<uint32_t>(column),
          static_cast<uint32_t>(left < problem.tile_columns ? left : problem.tile_columns),
          group,
          problem.first_node + static_cast<uint64_t>(node),
          node < problem.nodes};
}

// rotations[chunk] of the thread's node; the group's first 16 threads make four each.
TRAK_EXT_DEVICE void make_rotations(const SjltSumProblem& problem, const SjltTile& tile, int lane,
                                    char* rotations) {
  if (!tile.exists || lane >= kSjltRadix / 4) return;
  const uint64_t block =
      (tile.node << (kSjltRadixLog2 - kSjltRotationLog2)) + static_cast<uint64_t>(lane);
  const PhiloxWords words = sjlt_rotation_words(problem.law, tile.repetition, block);
  Words4 four;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four.word[i] = static_cast<uint32_t>(sjlt_rotation(words.word[i], problem.law.width));
  }
  device::store_shared<Words4>(rotations + lane * sizeof(Words4), four);
}

// words[chunk][kSjltBlocks] of the thread's node, where a parameter of the tensor needs them.
TRAK_EXT_DEVICE void make_signs(const SjltSumProblem& problem, const SjltTile& tile, int lane,
                                const char* rotations, char* words) {
  if (!tile.exists) return;
  const uint64_t begin = problem.grad.param_offset >> kSjltSignLog2;
  const uint64_t end =
      (problem.grad.param_offset + static_cast<uint64_t>(problem.grad.params) - 1) >> kSjltSignLog2;
  for (int i = lane; i < kSjltRadix * kSjltBlocks; i += problem.tile_columns) {
    const int chunk = i / kSjltBlocks, slot = i % kSjltBlocks;
    const auto rotation =
        device::load_shared<uint32_t>(rotations + chunk * static_cast<int>(sizeof(uint32_t)));
    const uint64_t first =
        ((tile.node << kSjltRadixLog2) + static_cast<uint64_t>(chunk)) * problem.law.width;
    const uint64_t place =
        place_of(tile.column, rotation, static_cast<uint32_t>(problem.law.width));
    const uint64_t left = problem.law.width - place;  // before the wrap
    const uint64_t before = tile.columns < left ? tile.columns : left;
    uint64_t low = first + place, count = before;
    int own = slot;
    if (slot >= kSjltSegmentBlocks) {
      low = first;
      count = tile.columns - before;
      own = slot - kSjltSegmentBlocks;
    }
    const uint64_t block = (low >> kSjltSignLog2) + static_cast<uint64_t>(own);
    if (count == 0 || block > (low + count - 1) >> kSjltSignLog2 || block < begin || block > end) {
      continue;
    }
    const PhiloxWords signs = sjlt_sign_words(problem.law, tile.repetition, block);
    device::store_shared<Words4>(words + i * static_cast<int>(sizeof(Words4)),
                                 {{signs.word[0], signs.word[1], signs.word[2], signs.word[3]}});
  }
}

// sums[row] += the column's parameters of the node's chunks, in their order. kWhole: the tensor has
// all the node's parameters.
template <DType kDType, int kRows, bool kWhole>
TRAK_EXT_DEVICE void add_chunks(const SjltSumProblem& problem, const SjltTile& tile,
                                uint32_t column, const char* rotations, const char* words,
                                const int64_t (&row_bytes)[kRows], float (&sums)[kRows]) {
  // Loads under way a thread: enough for the latency of memory, and few enough registers.
  constexpr int kUnroll = kRows >= 8 ? 4 : kRows >= 4 ? 8 : 16;
  const uint64_t width = problem.law.width;
  const uint64_t params = static_cast<uint64_t>(problem.grad.params);
  uint64_t first = (tile.node << kSjltRadixLog2) * width;  // the chunk's first parameter
  const char* const data =
      static_cast<const char*>(problem.grad.data) + problem.first_row * problem.row_bytes;
  for (int chunk = 0; chunk < kSjltRadix; chunk += kUnroll) {
    float values[kUnroll][kRows];
    uint32_t flips[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int own = chunk + u;
      const auto rotation =
          device::load_shared<uint32_t>(rotations + own * static_cast<int>(sizeof(uint32_t)));
      const uint32_t place = place_of(column, rotation, static_cast<uint32_t>(width));
      const uint64_t param = first + place;
      const uint64_t at = param - problem.grad.param_offset;  // huge before the tensor
      flips[u] = 0;
#pragma unroll
      for (int row = 0; row < kRows; ++row) values[u][row] = 0.0f;
      if (kWhole || at < params) {
        const bool wrapped = tile.column < rotation && rotation <= column;
        const uint64_t start =
            wrapped ? first : first + place_of(tile.column, rotation, static_cast<uint32_t>(width));
        const auto slot = static_cast<uint32_t>(param >> kSjltSignLog2) -
                          static_cast<uint32_t>(start >> kSjltSignLog2) +
                          (wrapped ? kSjltSegmentBlocks : 0u);
        const auto bit = static_cast<uint32_t>(param);
        const auto word = device::load_shared<uint32_t>(
            words + ((own * kSjltBlocks + slot) * sizeof(Words4) + (bit >> 5 & 3u) * 4u));
        flips[u] = ~(word << (31u - (bit & 31u))) & 0x80000000u;
        const char* const source = data + static_cast<int64_t>(at) * problem.param_bytes;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          values[u][row] = load_as<kDType>(source + row_bytes[row]);
        }
      }
      first += width;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        sums[row] += law_from_bits(law_bits(values[u][row]) ^ flips[u]);
      }
    }
  }
}

template <DType kDType, int kRows>
TRAK_EXT_KERNEL(kSjltThreads, 3)
sjlt_sum_kernel(TRAK_EXT_KERNEL_ARGUMENT SjltSumProblem problem) {
  const int64_t index = device::block_index();
  const int64_t row_group = index / problem.tiles % problem.row_groups;
  const SjltTile tile =
      locate_sjlt_tile(problem, index / problem.tiles / problem.row_groups, index % problem.tiles);
  const int lane = device::thread_index() % problem.tile_columns;
  const int groups = kSjltThreads / problem.tile_columns;
  constexpr int kWordsBytes = kSjltRadix * kSjltBlocks * static_cast<int>(sizeof(Words4));
  constexpr int kRotationsBytes = kSjltRadix * static_cast<int>(sizeof(uint32_t));
  char* const words = device::shared_memory() + tile.group * kWordsBytes;
  char* const rotations =
      device::shared_memory() + groups * kWordsBytes + tile.group * kRotationsBytes;
  make_rotations(problem, tile, lane, rotations);
  device::block_barrier();
  make_signs(problem, tile, lane, rotations, words);
  device::block_barrier();
  if (!tile.exists || static_cast<uint32_t>(lane) >= tile.columns) return;

  const int64_t first_row = row_group * kRows;
  int64_t row_bytes[kRows];  // rows past the last are the last again, and not stored
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t own = first_row + row < problem.rows ? first_row + row : problem.rows - 1;
    row_bytes[row] = own * problem.row_bytes;
  }
  const uint32_t column = tile.column + static_cast<uint32_t>(lane);
  float* const target =
      problem.sums +
      static_cast<int64_t>(tile.node - problem.first_node) * problem.sums_node_pitch +
      first_row * problem.sums_row_pitch +
      (static_cast<int64_t>(tile.repetition * problem.law.width + column) - problem.first_column);
  float sums[kRows] = {};
  if (problem.go_on != 0 && tile.node == problem.first_node) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (first_row + row < problem.rows) {
        sums[row] = device::load_global<float>(target + row * problem.sums_row_pitch);
      }
    }
  }
  const uint64_t begin = (tile.node << kSjltRadixLog2) * problem.law.width;
  const uint64_t end = begin + (problem.law.width << kSjltRadixLog2);
  if (begin >= problem.grad.param_offset &&
      end - problem.grad.param_offset <= static_cast<uint64_t>(problem.grad.params)) {
    add_chunks<kDType, kRows, true>(problem, tile, column, rotations, words, row_bytes, sums);
  } else {
    add_chunks<kDType, kRows, false>(problem, tile, column, rotations, words, row_bytes, sums);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (first_row + row < problem.rows) {
      device::store_global<float>(target + row * problem.sums_row_pitch, sums[row]);
    }
  }
}

}  // namespace trak_ext
