// Scores of a block of training samples against a block of targets, for one instruction set.
#pragma once

#include "convert.h"
#include "kernel_table.h"
#include "microkernel.h"

namespace trak_ext::cpu {
namespace {

// packed[tile][m][d][lane] = solved[m, tile * kMicroColumns + lane, d], zero beyond num_targets.
template <class T>
void pack_targets(const ScoringProblem<T>& problem, T* packed) {
  const int64_t tiles = ceil_div(problem.num_targets, kMicroColumns<T>);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t m = 0; m < problem.num_checkpoints; ++m) {
      T* slab = packed + (tile * problem.num_checkpoints + m) * problem.proj_dim * kMicroColumns<T>;
      for (int64_t lane = 0; lane < kMicroColumns<T>; ++lane) {
        const int64_t target = tile * kMicroColumns<T> + lane;
        const bool inside = target < problem.num_targets;
        const T* row =
            problem.solved + (m * problem.num_targets + (inside ? target : 0)) * problem.proj_dim;
        for (int64_t d = 0; d < problem.proj_dim; ++d) {
          slab[d * kMicroColumns<T> + lane] = inside ? row[d] : T{0};
        }
      }
    }
  }
}

// packed[i][d] = features[m][row_begin + i, begin + d]. Rows are copied even where they are T as
// stored: a power of two apart, as features usually lie, they would fight for one set of the cache.
template <class T>
TRAK_EXT_INLINE void pack_features(const ScoringProblem<T>& problem, int64_t m, int64_t row_begin,
                                   int64_t rows, int64_t begin, int64_t depth,
                                   T (*packed)[kScoreDepth]) {
  const int64_t stride = problem.row_strides[m];
  if constexpr (sizeof(T) == sizeof(float)) {
    const StridedRows source = {problem.features[m], problem.feature_dtype, stride, 1};
    pack_as_float(source, row_begin, rows, begin, depth, packed[0], kScoreDepth);
  } else {
    const T* source = static_cast<const T*>(problem.features[m]) + row_begin * stride + begin;
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(packed[i], source + i * stride, sizeof(T) * depth);
    }
  }
}

// scratch.block[i][j] for rows [row_begin, row_end) and the targets of tiles [tile_begin,
// tile_end).
template <class T>
void score_block(const ScoringProblem<T>& problem, const T* packed, int64_t row_begin,
                 int64_t row_end, int64_t tile_begin, int64_t tile_end, ScoreScratch<T>& scratch) {
  using V = Vec<T>;
  const int64_t rows = row_end - row_begin;
  const int64_t columns = (tile_end - tile_begin) * kMicroColumns<T>;
  for (int64_t i = 0; i < rows; ++i) std::memset(scratch.block[i], 0, sizeof(T) * columns);
  for (int64_t m = 0; m < problem.num_checkpoints; ++m) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memset(scratch.partial[i], 0, sizeof(T) * columns);
    }
    for (int64_t d = 0; d < problem.proj_dim; d += kScoreDepth) {
      const int64_t left = problem.proj_dim - d;
      const int64_t depth = left < kScoreDepth ? left : kScoreDepth;
      pack_features(problem, m, row_begin, rows, d, depth, scratch.features);
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        const T* slab = packed + ((tile * problem.num_checkpoints + m) * problem.proj_dim + d) *
                                     kMicroColumns<T>;
        multiply_rows<T>(scratch.features[0], kScoreDepth, rows, slab, depth,
                         &scratch.partial[0][(tile - tile_begin) * kMicroColumns<T>],
                         kScoreTargets);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const V scale = broadcast(problem.coefficients
                                    ? problem.coefficients[m * problem.num_train + row_begin + i]
                                    : T{1});
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        T* cell = &scratch.block[i][j];
        store(cell, load<V>(cell) + scale * load<V>(&scratch.partial[i][j]));
      }
    }
  }
  if (!problem.weights) return;
  for (int64_t i = 0; i < rows; ++i) {
    const V weight = broadcast(problem.weights[row_begin + i]);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      T* cell = &scratch.block[i][j];
      store(cell, weight * load<V>(cell));
    }
  }
}

}  // namespace
}  // namespace trak_ext::cpu
