// From a call to the kernel that scores it: tensor_core_scorer, warpgroup_scorer and plain_scorer
// (at the end) take a dtype, bf16 parts and targets; the *tile_scorer functions say which tile so
// many targets get. Every dtype is compiled in a file of its own (scoring_*_tiles.cu).
#pragma once

#include "scoring_kernel.h"
#include "scoring_plain_kernel.h"
#include "scoring_warpgroup_kernel.h"
#include "split_targets_kernel.h"

namespace trak_ext::cuda {

// A kernel ready to launch, and the tile that one of its blocks makes.
template <class T>
struct Scorer {
  int tile_rows;
  int tile_targets;
  int threads;
  int shared_bytes;
  int parts;             // bf16 parts of the targets that it reads; 0: none
  int feature_multiple;  // to which the parts of a checkpoint are filled up
  int split_features;    // of a target, a thread of `split`
  void (*kernel)(ScoringLaunch<T>);
  void (*split)(ScoringLaunch<T>);  // makes those parts; null where there are none
  int blocks_per_sm;                // that stay for several tiles; 0: a block makes one
  int32_t blocks_max;               // of a launch, then; 0: no limit
};

// Tiles of few targets for few targets, when reading the features binds. All sum in one order.
constexpr int kManyTargets = 64;
constexpr int kFewTargets = 16;

template <class Tile>
Scorer<float> scorer_of_tile() {
  return {Tile::kRows,
          Tile::kTargets,
          Tile::kThreads,
          Tile::kSharedBytes,
          Tile::kTargetParts,
          kStepFeatures,
          kSplitFeatures,
          scoring_kernel<Tile>,
          split_targets_kernel<Tile::kTargetParts, Tile::kTargetPairs>,
          0,
          0};
}

template <DType kDType, int kParts>
Scorer<float> tile_scorer(int64_t targets) {
  if (targets <= kFewTargets) {
    return scorer_of_tile<ScoringTile<kDType, kParts, kFewTargets / 8, 4>>();
  }
  return scorer_of_tile<ScoringTile<kDType, kParts, kManyTargets / 8, 2>>();
}

// Of the warpgroup's, blocks of two warpgroups, two of them side by side; with the largest tile
// their sums leave room for one block of three.
constexpr int kMostTargets = 128;

template <class Tile>
Scorer<float> scorer_of_warpgroup_tile() {
  return {Tile::kRows,
          Tile::kTargets,
          Tile::kThreads,
          Tile::kSharedBytes,
          Tile::kTargetParts,
          kPeriodFeatures,
          kSplitOperandFeatures,
          warpgroup_scoring_kernel<Tile>,
          split_operand_kernel<Tile::kTargetParts, Tile::kTargets>,
          Tile::kBlocksPerSm,
          0};
}

template <DType kDType, int kParts>
Scorer<float> warpgroup_tile_scorer(int64_t targets) {
  if (targets <= 16)
    return scorer_of_warpgroup_tile<WarpgroupScoringTile<kDType, kParts, 16, 2, 2>>();
  if (targets <= 32)
    return scorer_of_warpgroup_tile<WarpgroupScoringTile<kDType, kParts, 32, 2, 2>>();
  if (targets <= 64)
    return scorer_of_warpgroup_tile<WarpgroupScoringTile<kDType, kParts, 64, 2, 2>>();
  return scorer_of_warpgroup_tile<WarpgroupScoringTile<kDType, kParts, kMostTargets, 3, 1>>();
}

template <DType kDType>
Scorer<float> warpgroup_tile_scorer(int parts, int64_t targets) {
  switch (parts) {
    case 1:
      return warpgroup_tile_scorer<kDType, 1>(targets);
    case 2:
      return warpgroup_tile_scorer<kDType, 2>(targets);
    default:
      return warpgroup_tile_scorer<kDType, 3>(targets);
  }
}

template <DType kDType>
Scorer<float> tile_scorer(int parts, int64_t targets) {
  switch (parts) {
    case 1:
      return tile_scorer<kDType, 1>(targets);
    case 2:
      return tile_scorer<kDType, 2>(targets);
    default:
      return tile_scorer<kDType, 3>(targets);
  }
}

// Each is compiled in a file of its own (scoring_*_tiles.cu).
Scorer<float> float32_scorer(int parts, int64_t targets);
Scorer<float> float16_scorer(int parts, int64_t targets);
Scorer<float> bfloat16_scorer(int parts, int64_t targets);
Scorer<float> float32_warpgroup_scorer(int parts, int64_t targets);
Scorer<float> float16_warpgroup_scorer(int parts, int64_t targets);
Scorer<float> bfloat16_warpgroup_scorer(int parts, int64_t targets);

// For features of fp32, fp16 or bf16.
inline Scorer<float> tensor_core_scorer(DType dtype, int parts, int64_t targets) {
  if (dtype == DType::kFloat16) return float16_scorer(parts, targets);
  if (dtype == DType::kBFloat16) return bfloat16_scorer(parts, targets);
  return float32_scorer(parts, targets);
}

// The same for sm_90a.
inline Scorer<float> warpgroup_scorer(DType dtype, int parts, int64_t targets) {
  if (dtype == DType::kFloat16) return float16_warpgroup_scorer(parts, targets);
  if (dtype == DType::kBFloat16) return bfloat16_warpgroup_scorer(parts, targets);
  return float32_warpgroup_scorer(parts, targets);
}

// For features of any dtype.
template <class T>
Scorer<T> plain_scorer() {
  return {kPlainScoringTile,
          kPlainScoringTile,
          kPlainScoringThreads,
          plain_scoring_shared_bytes<T>(),
          0,
          kStepFeatures,
          kSplitFeatures,
          plain_scoring_kernel<T>,
          nullptr,
          0,
          0};
}

}  // namespace trak_ext::cuda
