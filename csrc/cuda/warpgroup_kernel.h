// The multiplication by the warpgroup's matrix instruction (sm_90a): as in multiply_kernel.h, but
// the tensor core reads the gradients from shared memory itself and works while its warps make the
// signs of the next step.
#pragma once

#include "block_tile.h"
#include "device.h"
#include "entries.h"
#include "multiply_problem.h"
#include "shared_operand.h"

namespace trak_ext {

// The shape of a block's tile: two warpgroups side by side along the columns, each with
// kColumnTiles instructions of 64 columns a step and pass. Shapes differ in speed, never in the
// order of summing.
template <template <int> class EntriesOf, int kPasses_, int kColumnTiles_, int kRows_, int kSlots_,
          int kBlocksPerSm_>
struct WarpgroupTile {
  static constexpr int kPasses = kPasses_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kRows = kRows_;
  static constexpr int kRowTiles = kRows / kTileRows;
  static constexpr int kSlots = kSlots_;  // raw stages in shared memory
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarpgroups = 2;
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpColumns = kColumnTiles * kTileColumns;
  static constexpr int kColumns = kWarps * kWarpColumns;
  static constexpr int kSegmentPadBytes = 0;
  static constexpr int kRowPadBytes = 16;
  // Steps whose signs are in registers, in use or in the making.
  static constexpr int kStepsAhead = 2;
  using Entries = EntriesOf<kColumnTiles>;
  static_assert(kSlots >= 2, "one slot is read while another is filled");
};

template <int kRowTiles>
TRAK_EXT_DEVICE void clear(float (&values)[kRowTiles][4]) {
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[n][i] = 0.0f;
  }
}

// Adds a stage's products to `sums`, a column tile after the other: 8 steps of 16 parameters, each
// pass after the other. The registers of a step are made anew when no instruction has them any
// more; while they are made the step before is multiplied.
template <class Tile>
TRAK_EXT_DEVICE void multiply_operand(uint64_t operand, typename Tile::Entries& entries,
                                      float (&sums)[Tile::kColumnTiles][Tile::kRowTiles][4]) {
  constexpr int kAhead = Tile::kStepsAhead;
  constexpr int kUnrolled =
      Tile::Entries::kStepsUnrolled > kAhead ? Tile::Entries::kStepsUnrolled : kAhead;
  constexpr bool kSetsFirst = kUnrolled == kSteps;
#pragma unroll
  for (int m = 0; m < Tile::kColumnTiles; ++m) {
    float products[Tile::kRowTiles][4];
    // The first instruction may set rather than add; in a loop ptxas follows the registers only if
    // they were set before it.
    if constexpr (!kSetsFirst) clear(products);
    uint32_t a[kAhead][4];
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kUnrolled) {
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) {
        const int step = first + i;
        device::wait_multiplied<kAhead - 1>();
        entries.tile_step(m, step, a[i % kAhead]);
        device::begin_multiply(a[i % kAhead], products);
#pragma unroll
        for (int pass = 0; pass < Tile::kPasses; ++pass) {
          device::multiply_async<Tile::kRows>(products, a[i % kAhead],
                                              SharedOperand<Tile>::step_of(operand, step, pass),
                                              !kSetsFirst || step + pass > 0);
        }
        device::commit_multiplied();
      }
    }
    device::finish_multiply(products);
#pragma unroll
    for (int n = 0; n < Tile::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += products[n][i];
    }
  }
}

// Between two barriers a stage is multiplied and the next one converted. One warpgroup does the one
// first and one the other, so that the tensor cores always have work.
template <class Tile>
TRAK_EXT_DEVICE void multiply_with_warpgroups(const MultiplyProblem& problem) {
  char* shared = device::shared_memory();
  char* entries_shared = shared + SharedOperand<Tile>::kSharedBytes;
  auto* tile = reinterpret_cast<BlockTile*>(entries_shared + Tile::Entries::kSharedBytes);
  const BlockTile located = locate_tile(problem, Tile::kRows, Tile::kColumns);
  if (device::thread_index() == 0) device::store_shared<BlockTile>(tile, located);
  const int warp_column = device::thread_index() / 32 * Tile::kWarpColumns;
  const int warpgroup = device::warpgroup_index();
  const bool has_columns = warpgroup * 4 * Tile::kWarpColumns < located.columns;
  const int num_stages = located.num_superblocks * kStagesPerSuperblock;
  typename Tile::Entries entries(
      problem, located.column + warp_column + device::thread_index() % 32 / 4, entries_shared);
  const SharedOperand<Tile> gradients(problem, tile, shared);
  device::block_barrier();

  for (int i = 0; i < Tile::kSlots; ++i) gradients.fetch(i);
  device::wait_copies<Tile::kSlots - 1>();
  device::block_barrier();
  gradients.make_operand(0);
  device::publish_operand();

  float sums[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
  for (int stage = 0; stage < num_stages; ++stage) {
    // After this barrier the stage's operand and the next raw stage are there for all, and nobody
    // reads the slot and the operand of the stage before any more.
    device::wait_copies<Tile::kSlots - 2>();
    device::block_barrier();
    gradients.fetch(stage + Tile::kSlots);
#pragma unroll 1
    for (int turn = 0; turn < Tile::kWarpgroups; ++turn) {
      if (turn != warpgroup) {
        if (stage + 1 < num_stages) {
          gradients.make_operand(stage + 1);
          device::publish_operand();
        }
      } else if (has_columns) {
        if (stage % kStagesPerSuperblock == 0) {
          entries.begin_superblock(device::load_shared<BlockTile>(tile).superblock +
                                   static_cast<uint64_t>(stage / kStagesPerSuperblock));
        }
        entries.begin_stage();
        multiply_operand<Tile>(gradients.describe(stage), entries, sums);
        entries.end_stage();
      }
    }
  }
  if (has_columns) {
    store_sums<Tile>(device::load_shared<BlockTile>(tile), problem.columns, warp_column, sums);
  }
}

template <class Tile>
TRAK_EXT_KERNEL(Tile::kThreads, Tile::kBlocksPerSm)
warpgroup_kernel(TRAK_EXT_KERNEL_ARGUMENT MultiplyProblem problem) {
  if constexpr (device::kHasWarpgroups) {
    multiply_with_warpgroups<Tile>(problem);
  } else {
    device::never_called();
  }
}

}  // namespace trak_ext
