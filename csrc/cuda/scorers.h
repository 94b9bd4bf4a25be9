// The scoring kernels that are built, and which of them serves a problem.
#pragma once

#include "scoring_kernel.h"
#include "scoring_plain_kernel.h"
#include "split_targets_kernel.h"

namespace trak_ext {

// A kernel ready to launch, and the tile that one of its blocks makes.
template <class T>
struct Scorer {
  int tile_rows;
  int tile_targets;
  int threads;
  int shared_bytes;
  int parts;  // bf16 parts of the targets that it reads; 0: none
  void (*kernel)(ScoringLaunch<T>);
  void (*split)(ScoringLaunch<T>);  // makes those parts; null where there are none
};

// Tiles of few targets for few targets, when reading the features binds. Both sum in one order.
constexpr int kManyTargets = 64;
constexpr int kFewTargets = 16;

template <DType kDType, int kParts>
Scorer<float> tile_scorer(int64_t targets) {
  if (targets <= kFewTargets) {
    using Tile = ScoringTile<kDType, kParts, kFewTargets / 8, 4>;
    return {Tile::kRows,
            Tile::kTargets,
            Tile::kThreads,
            Tile::kSharedBytes,
            kParts,
            scoring_kernel<Tile>,
            split_targets_kernel<kParts, Tile::kTargetPairs>};
  }
  using Tile = ScoringTile<kDType, kParts, kManyTargets / 8, 2>;
  return {Tile::kRows,
          Tile::kTargets,
          Tile::kThreads,
          Tile::kSharedBytes,
          kParts,
          scoring_kernel<Tile>,
          split_targets_kernel<kParts, Tile::kTargetPairs>};
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

// For features of fp32, fp16 or bf16.
inline Scorer<float> tensor_core_scorer(DType dtype, int parts, int64_t targets) {
  if (dtype == DType::kFloat16) return float16_scorer(parts, targets);
  if (dtype == DType::kBFloat16) return bfloat16_scorer(parts, targets);
  return float32_scorer(parts, targets);
}

// For features of any dtype.
template <class T>
Scorer<T> plain_scorer() {
  return {kPlainScoringTile,
          kPlainScoringTile,
          kPlainScoringThreads,
          plain_scoring_shared_bytes<T>(),
          0,
          plain_scoring_kernel<T>,
          nullptr};
}

}  // namespace trak_ext
