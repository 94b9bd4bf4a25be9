// The multiplication by the warpgroup's matrix instruction (sm_90a): as in multiply_kernel.h, but
// the tensor core reads the gradients from shared memory itself and works while its warps make the
// signs of the next step.
#pragma once

#include "../device/device.h"
#include "block_tile.h"
#include "entries.h"
#include "multiply_problem.h"
#include "operand_ring.h"

namespace trak_ext::cuda {

// The shape of a block's tile: warpgroups side by side along the columns, each with kColumnTiles
// instructions of 64 columns a step and pass. Shapes differ in speed, never in the order of
// summing.
template <template <int> class EntriesOf_, int kPasses_, int kWarpgroups_, int kColumnTiles_,
          int kRows_, int kSlots_, int kBlocksPerSm_>
struct WarpgroupTile {
  static constexpr int kPasses = kPasses_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kRows = kRows_;
  static constexpr int kRowTiles = kRows / kTileRows;
  static constexpr int kSlots = kSlots_;  // stages in shared memory
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpColumns = kColumnTiles * kTileColumns;
  static constexpr int kColumns = kWarps * kWarpColumns;
  // Steps whose instructions are started together. Warps of a warpgroup wait for one another at
  // every start, which is short beside two instructions of few rows.
  static constexpr int kGroupSteps = EntriesOf_<1>::kStepsUnrolled < kSteps ? 1 : 2;
  template <int kTiles>
  using EntriesOf = EntriesOf_<kTiles>;
  using Entries = EntriesOf<kColumnTiles>;
  static_assert(kSlots >= 3, "two slots are read or waited for while another is filled");
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
// pass after the other. Steps go in groups, and the registers of a group are made anew when no
// instruction has them any more; while they are made the group before is multiplied.
template <class Tile>
TRAK_EXT_DEVICE void multiply_operand(uint64_t operand, typename Tile::Entries& entries,
                                      float (&sums)[Tile::kColumnTiles][Tile::kRowTiles][4]) {
  constexpr int kGroup = Tile::kGroupSteps;
  constexpr int kAhead = 2;
  constexpr int kUnrolled = Tile::Entries::kStepsUnrolled > kAhead * kGroup
                                ? Tile::Entries::kStepsUnrolled
                                : kAhead * kGroup;
  constexpr bool kSetsFirst = kUnrolled == kSteps;
#pragma unroll
  for (int m = 0; m < Tile::kColumnTiles; ++m) {
    float products[Tile::kRowTiles][4];
    // The first instruction may set rather than add; in a loop ptxas follows the registers only if
    // they were set before it.
    if constexpr (!kSetsFirst) clear(products);
    uint32_t a[kAhead][kGroup][4];
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kUnrolled) {
#pragma unroll
      for (int i = 0; i < kUnrolled / kGroup; ++i) {
        uint32_t (&group)[kGroup][4] = a[i % kAhead];
        device::wait_multiplied<kAhead - 1>();
#pragma unroll
        for (int j = 0; j < kGroup; ++j) entries.tile_step(m, first + i * kGroup + j, group[j]);
        device::begin_multiply(group, products);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const int step = first + i * kGroup + j;
#pragma unroll
          for (int pass = 0; pass < Tile::kPasses; ++pass) {
            device::multiply_async<Tile::kRows>(products, group[j],
                                                OperandRing<Tile>::step_of(operand, step, pass),
                                                !kSetsFirst || step + pass > 0);
          }
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

template <class Tile>
TRAK_EXT_DEVICE void multiply_with_warpgroups(const MultiplyProblem& problem) {
  char* shared = device::shared_memory();
  const BlockTile tile = locate_tile(problem, Tile::kRows, Tile::kColumns, Tile::kPasses);
  const ChunkSpan span = locate_chunk(problem, tile.chunk);
  const int warp_column = device::thread_index() / 32 * Tile::kWarpColumns;
  const int warpgroup_columns = 4 * Tile::kWarpColumns;
  const bool has_columns = device::warpgroup_index() * warpgroup_columns < tile.columns;
  const int num_stages = span.num_superblocks * kStagesPerSuperblock;
  typename Tile::Entries entries(problem,
                                 tile.column + warp_column + device::thread_index() % 32 / 4,
                                 shared + OperandRing<Tile>::kSharedBytes);
  const OperandRing<Tile> ring(tile.operand, num_stages, shared);
  const bool is_first = device::thread_index() == 0;
  if (is_first) {
    ring.begin((tile.columns + warpgroup_columns - 1) / warpgroup_columns * 4);
    for (int i = 0; i < Tile::kSlots; ++i) ring.fill(i);
  }
  device::block_barrier();
  if (!has_columns) return;

  float sums[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
  for (int stage = 0; stage < num_stages; ++stage) {
    if (stage % kStagesPerSuperblock == 0) {
      entries.begin_superblock(span.superblock +
                               static_cast<uint64_t>(stage / kStagesPerSuperblock));
    }
    ring.wait_filled(stage);
    entries.begin_stage();
    multiply_operand<Tile>(ring.describe(stage), entries, sums);
    entries.end_stage();
    if (device::thread_index() % 32 == 0) ring.release(stage);
    // A stage late, so that the other warpgroups need not be as far as this one.
    if (is_first && stage > 0) ring.refill(stage - 1);
    device::warp_barrier();
  }
  store_sums<Tile>(tile, problem.columns, warp_column, sums);
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

}  // namespace trak_ext::cuda
