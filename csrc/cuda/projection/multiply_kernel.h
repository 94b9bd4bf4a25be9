// The multiplication: sums of a chunk, R^T [columns, 512 a superblock] times G^T, in matrix
// instructions whose first operand is made in registers and whose second is shared by the block.
#pragma once

#include "../device/device.h"
#include "block_tile.h"
#include "entries.h"
#include "multiply_problem.h"
#include "operand_slots.h"

namespace trak_ext::cuda {

// The shape of a block's tile: 8 warps side by side along the columns, each with kColumnTiles x
// kRowTiles instructions a step and pass. Shapes differ in speed, never in the order of summing.
template <template <int> class EntriesOf_, int kPasses_, int kColumnTiles_, int kRowTiles_,
          int kSlotStages_, int kSlots_, int kBlocksPerSm_>
struct TileShape {
  static constexpr int kPasses = kPasses_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kSlotStages = kSlotStages_;  // between two barriers
  static constexpr int kSlots = kSlots_;            // in shared memory
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kWarpColumns = kColumnTiles * kTileColumns;
  static constexpr int kColumns = kWarps * kWarpColumns;
  template <int kTiles>
  using EntriesOf = EntriesOf_<kTiles>;
  using Entries = EntriesOf<kColumnTiles>;
  static_assert(kSlots >= 2, "one slot is read while another is filled");
};

// Adds a stage's products to `sums`: 8 steps of 16 parameters, each pass after the other.
template <class Tile>
TRAK_EXT_DEVICE void multiply_stage(const char* operand, typename Tile::Entries& entries,
                                    float (&sums)[Tile::kColumnTiles][Tile::kRowTiles][4]) {
  float products[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
#pragma unroll Tile::Entries::kStepsUnrolled
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[Tile::kColumnTiles][4];
    entries.next_step(a);
    constexpr int kAtOnce = OperandSlots<Tile>::kPassesAtOnce;
#pragma unroll
    for (int first = 0; first < Tile::kPasses; first += kAtOnce) {
      uint32_t b[kAtOnce][Tile::kRowTiles][2];
      OperandSlots<Tile>::load_passes(operand, step, first, b);
#pragma unroll
      for (int pass = 0; pass < kAtOnce; ++pass) {
#pragma unroll
        for (int n = 0; n < Tile::kRowTiles; ++n) {
#pragma unroll
          for (int m = 0; m < Tile::kColumnTiles; ++m) {
            device::multiply_bf16(products[m][n], a[m], b[pass][n][0], b[pass][n][1]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < Tile::kColumnTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += products[m][n][i];
    }
  }
}

// While one slot's stages are multiplied later ones are on their way.
template <class Tile>
TRAK_EXT_KERNEL(Tile::kThreads, Tile::kBlocksPerSm)
multiply_kernel(TRAK_EXT_KERNEL_ARGUMENT MultiplyProblem problem) {
  char* shared = device::shared_memory();
  const BlockTile tile = locate_tile(problem, Tile::kRows, Tile::kColumns, Tile::kPasses);
  const ChunkSpan span = locate_chunk(problem, tile.chunk);
  const int warp_column = device::thread_index() / 32 * Tile::kWarpColumns;
  const bool has_columns = warp_column < tile.columns;
  typename Tile::Entries entries(problem,
                                 tile.column + warp_column + device::thread_index() % 32 / 4,
                                 shared + OperandSlots<Tile>::kSharedBytes);
  constexpr int kSuperblockSlots = kStagesPerSuperblock / Tile::kSlotStages;
  const int num_slots = span.num_superblocks * kSuperblockSlots;
  const OperandSlots<Tile> slots(tile.operand, num_slots, shared);
  for (int i = 0; i + 1 < Tile::kSlots; ++i) slots.fetch(i);

  float sums[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
#pragma unroll 1
  for (int slot = 0; slot < num_slots; ++slot) {
    // After this barrier the slot is there for all, and nobody reads the one before any more, which
    // is filled again.
    device::wait_copies<Tile::kSlots - 2>();
    device::block_barrier();
    slots.fetch(slot + Tile::kSlots - 1);
    if (!has_columns) continue;
    if (slot % kSuperblockSlots == 0) {
      entries.begin_superblock(span.superblock + static_cast<uint64_t>(slot / kSuperblockSlots));
    }
#pragma unroll 1
    for (int stage = 0; stage < Tile::kSlotStages; ++stage) {
      entries.begin_stage();
      multiply_stage<Tile>(slots.at(slot, stage), entries, sums);
    }
  }
  if (has_columns) store_sums<Tile>(tile, problem.columns, warp_column, sums);
}

}  // namespace trak_ext::cuda
