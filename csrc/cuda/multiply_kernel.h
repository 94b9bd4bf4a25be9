// The multiplication: sums of a chunk, R^T [columns, 512 a superblock] times G^T, in matrix
// instructions whose first operand is made in registers and whose second is shared by the block.
#pragma once

#include "block_tile.h"
#include "device.h"
#include "entries.h"
#include "gradient_tile.h"
#include "multiply_problem.h"

namespace trak_ext {

// The shape of a block's tile: 8 warps side by side along the columns, each with kColumnTiles x
// kRowTiles instructions a step and pass. Shapes differ in speed, never in the order of summing.
template <template <int> class EntriesOf, int kPasses_, int kColumnTiles_, int kRowTiles_,
          int kSlots_, int kBlocksPerSm_>
struct TileShape {
  static constexpr int kPasses = kPasses_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kSlots = kSlots_;  // raw stages in shared memory
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kWarpColumns = kColumnTiles * kTileColumns;
  static constexpr int kColumns = kWarps * kWarpColumns;
  static constexpr int kSegmentPadBytes = 16;
  static constexpr int kRowPadBytes = 0;
  using Entries = EntriesOf<kColumnTiles>;
  static_assert(kSlots >= 2, "one slot is read while another is filled");
};

// Adds a stage's products to `sums`: 8 steps of 16 parameters, each pass after the other.
template <class Tile>
TRAK_EXT_DEVICE void multiply_stage(const GradientTile<Tile>& gradients, int stage,
                                    typename Tile::Entries& entries,
                                    float (&sums)[Tile::kColumnTiles][Tile::kRowTiles][4]) {
  float products[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
#pragma unroll Tile::Entries::kStepsUnrolled
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[Tile::kColumnTiles][4];
    entries.next_step(a);
#pragma unroll
    for (int n = 0; n < Tile::kRowTiles; ++n) {
      uint32_t b[Tile::kPasses][2];
      gradients.load_step(stage, step, n, b);
#pragma unroll
      for (int pass = 0; pass < Tile::kPasses; ++pass) {
#pragma unroll
        for (int m = 0; m < Tile::kColumnTiles; ++m) {
          device::multiply_bf16(products[m][n], a[m], b[pass][0], b[pass][1]);
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

// While one stage is multiplied the next is converted and later ones are on their way.
template <class Tile>
TRAK_EXT_KERNEL(Tile::kThreads, Tile::kBlocksPerSm)
multiply_kernel(TRAK_EXT_KERNEL_ARGUMENT MultiplyProblem problem) {
  char* shared = device::shared_memory();
  char* entries_shared = shared + GradientTile<Tile>::kSharedBytes;
  auto* tile = reinterpret_cast<BlockTile*>(entries_shared + Tile::Entries::kSharedBytes);
  const BlockTile located = locate_tile(problem, Tile::kRows, Tile::kColumns);
  if (device::thread_index() == 0) device::store_shared<BlockTile>(tile, located);
  const int warp_column = device::thread_index() / 32 * Tile::kWarpColumns;
  const bool has_columns = warp_column < located.columns;
  const int num_stages = located.num_superblocks * kStagesPerSuperblock;
  typename Tile::Entries entries(
      problem, located.column + warp_column + device::thread_index() % 32 / 4, entries_shared);
  const GradientTile<Tile> gradients(problem, tile, shared);
  device::block_barrier();

  for (int i = 0; i < Tile::kSlots; ++i) gradients.fetch(i);
  device::wait_copies<Tile::kSlots - 1>();
  device::block_barrier();
  gradients.make_fragments(0);

  float sums[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
  for (int stage = 0; stage < num_stages; ++stage) {
    // After this barrier the stage's fragments and the next raw stage are there for all, and nobody
    // reads the slot and the fragments of the stage before any more.
    device::wait_copies<Tile::kSlots - 2>();
    device::block_barrier();
    gradients.fetch(stage + Tile::kSlots);
    if (stage + 1 < num_stages) gradients.make_fragments(stage + 1);
    if (!has_columns) continue;
    if (stage % kStagesPerSuperblock == 0) {
      entries.begin_superblock(device::load_shared<BlockTile>(tile).superblock +
                               static_cast<uint64_t>(stage / kStagesPerSuperblock));
    }
    entries.begin_stage();
    multiply_stage<Tile>(gradients, stage, entries, sums);
  }
  if (has_columns) {
    store_sums<Tile>(device::load_shared<BlockTile>(tile), problem.columns, warp_column, sums);
  }
}

}  // namespace trak_ext
