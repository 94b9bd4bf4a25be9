// The sparse kind on a device, first part: the sums of the tree's lowest nodes, 64 chunks each.
//
// A thread has one column of one node, and reads the one parameter of each chunk that meets it, for
// kRows rows at a time: neighbours in a warp read neighbours in memory, and nothing is added by two
// threads, so the order of the sum is a loop's. Rotations and signs are the same for all rows: a
// block makes them once, in shared memory. Issue slots an element and row: an address (2), a load,
// a multiply-add with the sign, and 1 / kRows of some 15 for place and sign.
#pragma once

#include "../../law/arithmetic.h"
#include "../../sjlt_problem.h"
#include "../device/device.h"
#include "../device/element.h"

namespace trak_ext::cuda {

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
  // Chunks that the tensor has parameters of, and those that it has all parameters of, if any.
  uint64_t first_chunk, end_chunk;
  uint64_t first_whole_chunk, end_whole_chunk;
  int32_t go_on;  // whether the first node's sums so far, of tensors before this, are there
  float* sums;    // [nodes, rows, columns]; rows and columns are those of a pass
  int64_t sums_node_pitch;
  int64_t sums_row_pitch;
  int64_t first_column;  // of the pass, among all repetitions' columns
};

// What a group of threads keeps in shared memory of its node's chunks: their signs, their
// rotations, and what a thread needs to find its own parameter and sign.
constexpr int kSjltSignBytes = kSjltRadix * kSjltBlocks * static_cast<int>(sizeof(Words4));
constexpr int kSjltRotationBytes = kSjltRadix * static_cast<int>(sizeof(uint32_t));
struct alignas(16) SjltChunk {
  int64_t bytes;     // from the tensor's first parameter to the one of the tile's first column
  uint32_t left;     // columns of the tile before the rotation wraps around
  uint16_t bits[2];  // the first column's sign among the chunk's, before and after the wrap
};
constexpr int kSjltGroupBytes =
    kSjltSignBytes + kSjltRotationBytes + kSjltRadix * static_cast<int>(sizeof(SjltChunk));
constexpr int sjlt_shared_bytes(int tile_columns) {
  return kSjltThreads / tile_columns * kSjltGroupBytes;
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
  int begin, end;  // chunks of the node that the launch has; none if there is no such node
};

// A chunk's number in a node, between 0 and 64.
TRAK_EXT_DEVICE int chunk_in_node(uint64_t chunk, uint64_t node) {
  const uint64_t first = node << kSjltRadixLog2;
  const uint64_t behind = chunk - first;
  return chunk <= first ? 0 : behind < kSjltRadix ? static_cast<int>(behind) : kSjltRadix;
}

TRAK_EXT_DEVICE SjltTile locate_sjlt_tile(const SjltSumProblem& problem, int64_t node_group,
                                          int64_t tile_index) {
  const int64_t tile = problem.first_tile + tile_index;
  const int64_t column = tile % problem.tiles_per_repetition * problem.tile_columns;
  const int64_t left = static_cast<int64_t>(problem.law.width) - column;
  const int groups = kSjltThreads / problem.tile_columns;
  const int group = device::thread_index() / problem.tile_columns;
  const int64_t index = node_group * groups + group;
  const uint64_t node = problem.first_node + static_cast<uint64_t>(index);
  const bool exists = index < problem.nodes;
  return {static_cast<uint32_t>(tile / problem.tiles_per_repetition),
          static_cast<uint32_t>(column),
          static_cast<uint32_t>(left < problem.tile_columns ? left : problem.tile_columns),
          group,
          node,
          exists ? chunk_in_node(problem.first_chunk, node) : 0,
          exists ? chunk_in_node(problem.end_chunk, node) : 0};
}

// A group's part of shared memory.
struct SjltShared {
  char* signs;      // [kSjltRadix, kSjltBlocks] Words4
  char* rotations;  // [kSjltRadix] uint32_t
  char* chunks;     // [kSjltRadix] SjltChunk

  TRAK_EXT_DEVICE uint32_t rotation(int chunk) const {
    return device::load_shared<uint32_t>(rotations + chunk * static_cast<int>(sizeof(uint32_t)));
  }
};

// The group's first 16 threads make the rotations of four chunks each.
TRAK_EXT_DEVICE void make_rotations(const SjltSumProblem& problem, const SjltTile& tile, int lane,
                                    const SjltShared& shared) {
  if (tile.begin == tile.end || lane >= kSjltRadix / 4) return;
  const uint64_t block =
      (tile.node << (kSjltRadixLog2 - kSjltRotationLog2)) + static_cast<uint64_t>(lane);
  const PhiloxWords words = sjlt_rotation_words(problem.law, tile.repetition, block);
  Words4 four;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four.word[i] = static_cast<uint32_t>(sjlt_rotation(words.word[i], problem.law.width));
  }
  device::store_shared<Words4>(shared.rotations + lane * static_cast<int>(sizeof(Words4)), four);
}

// One of a tile's two runs of consecutive parameters in a chunk.
struct SjltRun {
  uint64_t first;
  uint32_t count;
};
TRAK_EXT_DEVICE SjltRun locate_run(const SjltSumProblem& problem, const SjltTile& tile, int chunk,
                                   uint32_t rotation, bool wrapped) {
  const uint64_t first =
      ((tile.node << kSjltRadixLog2) + static_cast<uint64_t>(chunk)) * problem.law.width;
  const uint64_t place = place_of(tile.column, rotation, static_cast<uint32_t>(problem.law.width));
  const uint64_t left = problem.law.width - place;
  const uint32_t before = tile.columns < left ? tile.columns : static_cast<uint32_t>(left);
  return wrapped ? SjltRun{first, tile.columns - before} : SjltRun{first + place, before};
}

// Once the rotations are there: the group's first 64 threads describe a chunk each, and all of them
// make the signs that a parameter of the tensor needs.
TRAK_EXT_DEVICE void make_chunks(const SjltSumProblem& problem, const SjltTile& tile, int lane,
                                 const SjltShared& shared) {
  constexpr uint32_t kBlock = 1u << kSjltSignLog2;
  if (lane >= tile.begin && lane < tile.end) {
    const uint32_t rotation = shared.rotation(lane);
    const SjltRun run = locate_run(problem, tile, lane, rotation, false);
    const SjltRun wrapped = locate_run(problem, tile, lane, rotation, true);
    const int64_t at = static_cast<int64_t>(run.first - problem.grad.param_offset);
    device::store_shared<SjltChunk>(
        shared.chunks + lane * static_cast<int>(sizeof(SjltChunk)),
        {at * problem.param_bytes,
         run.count,
         {static_cast<uint16_t>(run.first & (kBlock - 1)),
          static_cast<uint16_t>((wrapped.first & (kBlock - 1)) + kSjltSegmentBlocks * kBlock -
                                run.count)}});
  }
  const uint64_t begin = problem.grad.param_offset >> kSjltSignLog2;
  const uint64_t end =
      (problem.grad.param_offset + static_cast<uint64_t>(problem.grad.params) - 1) >> kSjltSignLog2;
  for (int i = tile.begin * kSjltBlocks + lane; i < tile.end * kSjltBlocks;
       i += problem.tile_columns) {
    const int chunk = i / kSjltBlocks, slot = i % kSjltBlocks;
    const bool wrapped = slot >= kSjltSegmentBlocks;
    const SjltRun run = locate_run(problem, tile, chunk, shared.rotation(chunk), wrapped);
    const uint64_t block = (run.first >> kSjltSignLog2) +
                           static_cast<uint64_t>(wrapped ? slot - kSjltSegmentBlocks : slot);
    if (run.count == 0 || block > (run.first + run.count - 1) >> kSjltSignLog2 || block < begin ||
        block > end) {
      continue;
    }
    const PhiloxWords words = sjlt_sign_words(problem.law, tile.repetition, block);
    device::store_shared<Words4>(shared.signs + i * static_cast<int>(sizeof(Words4)),
                                 {{words.word[0], words.word[1], words.word[2], words.word[3]}});
  }
}

// sums[row] += the parameters that meet the thread's column, of chunks begin .. end - 1 in their
// order, kUnroll at a time; returns the chunk to go on from. kWhole: the tensor has all of them.
template <DType kDType, int kRows, int kUnroll, bool kWhole>
TRAK_EXT_DEVICE int add_chunks(const SjltSumProblem& problem, const SjltTile& tile, int lane,
                               const SjltShared& shared, const char* const (&sources)[kRows],
                               int begin, int end, float (&sums)[kRows]) {
  const int64_t wrap_bytes = static_cast<int64_t>(problem.law.width) * problem.param_bytes;
  const auto own = static_cast<uint32_t>(lane);
  for (; begin + kUnroll <= end; begin += kUnroll) {
    float values[kUnroll][kRows];
    float signs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int chunk = begin + u;
      const auto found = device::load_shared<SjltChunk>(
          shared.chunks + chunk * static_cast<int>(sizeof(SjltChunk)));
      const bool wrapped = own >= found.left;
      if constexpr (!kWhole) {
        const SjltRun run = locate_run(problem, tile, chunk, shared.rotation(chunk), wrapped);
        const uint64_t param = run.first + (wrapped ? own - found.left : own);
        const uint64_t at = param - problem.grad.param_offset;  // huge before the tensor
        if (at >= static_cast<uint64_t>(problem.grad.params)) {
          signs[u] = 1.0f;
#pragma unroll
          for (int row = 0; row < kRows; ++row) values[u][row] = 0.0f;
          continue;
        }
      }
      const uint32_t bit = own + (wrapped ? found.bits[1] : found.bits[0]);
      const auto word = device::load_shared<uint32_t>(
          shared.signs + chunk * (kSjltBlocks * static_cast<int>(sizeof(Words4))) +
          (bit >> 5) * static_cast<uint32_t>(sizeof(uint32_t)));
      signs[u] = law_from_bits(
          device::clear_then_set(word << (31u - (bit & 31u)), 0x80000000u, 0x3F800000u));
      const int64_t bytes = wrapped ? found.bytes - wrap_bytes : found.bytes;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        values[u][row] = load_as<kDType>(sources[row] + bytes);
      }
    }
    // A product by 1 or -1 is exact, so a multiply-add is the addition of a signed number.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        sums[row] = law_fma(values[u][row], signs[u], sums[row]);
      }
    }
  }
  return begin;
}

// Blocks of a multiprocessor. For sm_120 ptxas spills where three have eight rows of halves.
template <DType kDType, int kRows>
constexpr int kSjltBlocksPerSm = kDType == DType::kFloat64 ? 2
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
                                 : kDType != DType::kFloat32 && kRows == 8 ? 2
#endif
                                                                           : 3;

template <DType kDType, int kRows>
TRAK_EXT_KERNEL(kSjltThreads, (kSjltBlocksPerSm<kDType, kRows>))
sjlt_sum_kernel(TRAK_EXT_KERNEL_ARGUMENT SjltSumProblem problem) {
  const int64_t index = device::block_index();
  const int64_t row_group = index / problem.tiles % problem.row_groups;
  const SjltTile tile =
      locate_sjlt_tile(problem, index / problem.tiles / problem.row_groups, index % problem.tiles);
  const int lane = device::thread_index() % problem.tile_columns;
  char* const own = device::shared_memory() + tile.group * kSjltGroupBytes;
  const SjltShared shared = {own, own + kSjltSignBytes, own + kSjltSignBytes + kSjltRotationBytes};
  make_rotations(problem, tile, lane, shared);
  device::block_barrier();
  make_chunks(problem, tile, lane, shared);
  device::block_barrier();
  if (tile.begin == tile.end || static_cast<uint32_t>(lane) >= tile.columns) return;

  const int64_t first_row = row_group * kRows;
  const char* sources[kRows];  // rows past the last are the last again, and not stored
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t read = first_row + row < problem.rows ? first_row + row : problem.rows - 1;
    sources[row] = static_cast<const char*>(problem.grad.data) +
                   (problem.first_row + read) * problem.row_bytes + lane * problem.param_bytes;
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
  // Loads under way a thread: enough for the latency of memory, and few enough registers.
  constexpr int kLoads = kDType == DType::kFloat64 || kRows == 1 ? 8 : kRows == 8 ? 32 : 16;
  const int end_whole = chunk_in_node(problem.end_whole_chunk, tile.node);
  int chunk = tile.begin;
  for (int turn = 0; turn < 2; ++turn) {
    // What the tensor has a part of alone, before whole chunks and after them.
    const int first_whole = chunk_in_node(problem.first_whole_chunk, tile.node);
    const int stop = turn == 1 || first_whole > tile.end ? tile.end : first_whole;
    chunk = add_chunks<kDType, kRows, 1, false>(problem, tile, lane, shared, sources, chunk, stop,
                                                sums);
    if (turn == 1) break;
    chunk = add_chunks<kDType, kRows, kLoads / kRows, true>(problem, tile, lane, shared, sources,
                                                            chunk, end_whole, sums);
    chunk = add_chunks<kDType, kRows, 1, true>(problem, tile, lane, shared, sources, chunk,
                                               end_whole, sums);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (first_row + row < problem.rows) {
      device::store_global<float>(target + row * problem.sums_row_pitch, sums[row]);
    }
  }
}

}  // namespace trak_ext::cuda
