// Scores of a block of training samples against a block of targets, for one instruction set.
#pragma once

#include "kernel_table.h"
#include "microkernel.h"

namespace trak_ext {
namespace {

// Depth of the slice of packed targets that stays in the first cache with its rows.
constexpr int64_t kScoreDepth = 256;

// packed[tile][m][d][lane] = solved[m, tile * kMicroColumns + lane, d], zero beyond num_targets.
template <class T>
void pack_targets(const ScoringProblem<T>& problem, T* packed) {
  const int64_t tiles = (problem.num_targets + kMicroColumns<T> - 1) / kMicroColumns<T>;
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

// block[i][j] for rows [row_begin, row_end) and the targets of tiles [tile_begin, tile_end); the
// rows of `block` and of the scratch `partial` are kScoreTargets apart.
template <class T>
void score_block(const ScoringProblem<T>& problem, const T* packed, int64_t row_begin,
                 int64_t row_end, int64_t tile_begin, int64_t tile_end, T* block, T* partial) {
  using V = Vec<T>;
  const int64_t rows = row_end - row_begin;
  const int64_t columns = (tile_end - tile_begin) * kMicroColumns<T>;
  for (int64_t i = 0; i < rows; ++i) std::memset(block + i * kScoreTargets, 0, sizeof(T) * columns);
  for (int64_t m = 0; m < problem.num_checkpoints; ++m) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memset(partial + i * kScoreTargets, 0, sizeof(T) * columns);
    }
    const int64_t stride = problem.row_strides[m];
    const T* features = problem.features[m] + row_begin * stride;
    for (int64_t d = 0; d < problem.proj_dim; d += kScoreDepth) {
      const int64_t left = problem.proj_dim - d;
      const int64_t depth = left < kScoreDepth ? left : kScoreDepth;
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        const T* slab = packed + ((tile * problem.num_checkpoints + m) * problem.proj_dim + d) *
                                     kMicroColumns<T>;
        multiply_rows<T>(features + d, stride, rows, slab, depth,
                         partial + (tile - tile_begin) * kMicroColumns<T>, kScoreTargets);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const V scale = broadcast(problem.coefficients
                                    ? problem.coefficients[m * problem.num_train + row_begin + i]
                                    : T{1});
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        T* cell = block + i * kScoreTargets + j;
        store(cell, load<V>(cell) + scale * load<V>(partial + i * kScoreTargets + j));
      }
    }
  }
  if (!problem.weights) return;
  for (int64_t i = 0; i < rows; ++i) {
    const V weight = broadcast(problem.weights[row_begin + i]);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      T* cell = block + i * kScoreTargets + j;
      store(cell, weight * load<V>(cell));
    }
  }
}

}  // namespace
}  // namespace trak_ext
