// What one launch of a scoring kernel is told.
//
// Samples, targets and checkpoints are cut into launches so that the targets' bf16 parts fit in the
// workspace; every score is summed in an order that no cut changes: checkpoints one after another,
// each in steps of 16 features, of which a few are added up before their sum, scaled, is added to
// the score.
#pragma once

#include <cstdint>

#include "../../problem.h"
#include "../device/device.h"

namespace trak_ext::cuda {

constexpr int kStepFeatures = 16;  // of the summed index, a matrix instruction
// Matrix instructions truncate at every addition; after so many steps at most, their sums move into
// an ordinary fp32 addition.
constexpr int kFlushSteps = 4;
// What fits, with the rest, in a launch's 4 KiB of arguments.
constexpr int kCheckpointsMax = 128;

struct FeatureRows {
  const void* data;    // [num_train, proj_dim], unit column stride
  int64_t row_stride;  // in elements
};

template <class T>
struct ScoringLaunch {
  FeatureRows features[kCheckpointsMax];
  DType dtype;          // of the features
  bool aligned_quads;   // four features at a multiple of 4 can be copied at once, in every row
  bool aligned_pieces;  // and so can 16 bytes at a multiple of 16, rows being less than 2^31 apart
  bool add;             // to what `out` holds, rather than to zero
  int32_t checkpoints;  // of this launch
  int64_t num_train;
  int64_t num_targets;
  int64_t proj_dim;
  int64_t first_row;
  int64_t rows;
  int64_t first_target;
  int64_t targets;
  const T* solved;        // [checkpoints, num_targets, proj_dim]
  char* packed;           // the targets of this launch as bf16 parts, see split_targets_kernel.h
  const T* coefficients;  // [checkpoints, num_train] or null for ones
  const T* weights;       // [num_train] or null for ones
  T* out;                 // the score of the launch's first sample and target
  int64_t out_row_stride;
  int64_t out_target_stride;
  int32_t target_tiles;
  int32_t tiles;   // of all samples and targets
  int32_t blocks;  // that are launched; where they are fewer than the tiles, each makes several
  int32_t stages;  // of a checkpoint, see scoring_stages.h
  int32_t steps;   // of a checkpoint; stages may have more, of zeros
};

static_assert(sizeof(ScoringLaunch<double>) <= 4096, "the arguments of a kernel");

// A tile of a launch: consecutive ones, and so blocks that run together, have the same samples.
struct ScoringBlock {
  int64_t row;  // both counted from the launch's first
  int64_t target;
  int rows;  // that exist
  int targets;
};

template <class T>
TRAK_EXT_DEVICE ScoringBlock locate_scoring_tile(const ScoringLaunch<T>& launch, int index,
                                                 int tile_rows, int tile_targets) {
  const int64_t row = index / launch.target_tiles * int64_t{tile_rows};
  const int64_t target = index % launch.target_tiles * int64_t{tile_targets};
  const int64_t rows_left = launch.rows - row;
  const int64_t targets_left = launch.targets - target;
  return {row, target, static_cast<int>(rows_left < tile_rows ? rows_left : tile_rows),
          static_cast<int>(targets_left < tile_targets ? targets_left : tile_targets)};
}

// Where a block makes one tile.
template <class T>
TRAK_EXT_DEVICE ScoringBlock locate_scoring_block(const ScoringLaunch<T>& launch, int tile_rows,
                                                  int tile_targets) {
  return locate_scoring_tile(launch, static_cast<int>(device::block_index()), tile_rows,
                             tile_targets);
}

}  // namespace trak_ext::cuda
