// A projection as launches: which rows, columns and chunks each one takes, so that their sums fit
// in the workspace. Host code without a call of the CUDA runtime, so that the tests run it as it
// is.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "add_partials_kernel.h"
#include "matrix_kernel.h"
#include "multipliers.h"

namespace trak_ext {

struct Workspace {
  float* data;
  int64_t bytes;
};

// What one launch of a multiplier takes at most.
struct LaunchShape {
  int64_t rows;
  int64_t columns;
  int64_t chunks;
};

inline int64_t count_chunks(const GradientView& grad) {
  const int64_t superblocks = count_superblocks(grad);
  return divide_up(superblocks, choose_chunk_superblocks(superblocks));
}

// The least workspace that a projection can be cut to: the sums of one tile.
inline int64_t least_workspace(const Multiplier& multiplier, int64_t rows, int64_t proj_dim) {
  return std::min<int64_t>(rows, multiplier.tile_rows) *
         std::min<int64_t>(proj_dim, multiplier.tile_columns) * static_cast<int64_t>(sizeof(float));
}

// As many columns as fit, then rows, then chunks: blocks of one chunk share its gradients in cache.
inline LaunchShape choose_launch(const Multiplier& multiplier, int64_t rows, int64_t proj_dim,
                                 int64_t chunks, int64_t workspace_bytes) {
  const int64_t least = least_workspace(multiplier, rows, proj_dim);
  if (workspace_bytes < least) {
    throw std::invalid_argument("workspace: expected at least " + std::to_string(least) +
                                " bytes, got " + std::to_string(workspace_bytes));
  }
  const int64_t tile_rows = std::min<int64_t>(rows, multiplier.tile_rows);
  const int64_t sums = workspace_bytes / static_cast<int64_t>(sizeof(float));
  LaunchShape shape = {rows, proj_dim, 1};
  if (sums / tile_rows < proj_dim) {
    shape.columns = sums / tile_rows / multiplier.tile_columns * multiplier.tile_columns;
  }
  if (sums / shape.columns < rows) {
    shape.rows = sums / shape.columns / multiplier.tile_rows * multiplier.tile_rows;
  }
  shape.chunks = std::min(chunks, sums / shape.columns / shape.rows);
  // A launch has at most 2^31 - 1 blocks.
  const int64_t tiles = divide_up(shape.rows, multiplier.tile_rows) *
                        divide_up(shape.columns, multiplier.tile_columns);
  shape.chunks = std::max<int64_t>(1, std::min(shape.chunks, (int64_t{1} << 30) / tiles));
  return shape;
}

// out += grad R, for one gradient tensor [rows, params].
inline void run_projection(const Multiplier& multiplier, const MatrixLaw& law,
                           const GradientView& grad, int64_t rows, int64_t proj_dim,
                           const OutputView& out, const Workspace& workspace,
                           device::Stream stream) {
  if (rows == 0 || proj_dim == 0 || grad.params == 0) return;
  const int64_t chunks = count_chunks(grad);
  const LaunchShape shape = choose_launch(multiplier, rows, proj_dim, chunks, workspace.bytes);
  MultiplyProblem problem = {};
  problem.law = law;
  problem.grad = grad;
  if (rows == 1) problem.grad.row_stride = 0;  // leads nowhere, and must not spoil the alignment
  problem.layout = choose_layout(problem.grad, multiplier.pads);
  problem.superblocks = count_superblocks(grad);
  problem.chunk_superblocks = choose_chunk_superblocks(problem.superblocks);
  problem.partials = workspace.data;
  for (int64_t row = 0; row < rows; row += shape.rows) {
    problem.first_row = row;
    problem.rows = std::min(shape.rows, rows - row);
    for (int64_t column = 0; column < proj_dim; column += shape.columns) {
      problem.first_column = column;
      problem.columns = std::min(shape.columns, proj_dim - column);
      const int64_t outputs = problem.rows * problem.columns;
      const OutputView part = {out.data + row * out.row_stride + column * out.column_stride,
                               out.row_stride, out.column_stride};
      for (int64_t chunk = 0; chunk < chunks; chunk += shape.chunks) {
        problem.first_chunk = chunk;
        problem.chunks = std::min(shape.chunks, chunks - chunk);
        device::launch(multiplier.kernel,
                       problem.chunks * divide_up(problem.rows, multiplier.tile_rows) *
                           divide_up(problem.columns, multiplier.tile_columns),
                       multiplier.threads, multiplier.shared_bytes, stream, problem);
        const AddProblem add = {workspace.data, problem.chunks, problem.rows, problem.columns,
                                part};
        device::launch(add_partials_kernel, divide_up(outputs, kAddThreads), kAddThreads, 0, stream,
                       add);
      }
    }
  }
}

// out[p, j] = R[param_offset + p, j].
inline void run_fill_matrix(const MatrixProblem& problem, device::Stream stream) {
  if (problem.params == 0 || problem.proj_dim == 0) return;
  const auto head = static_cast<int64_t>(problem.param_offset % kStageParams);
  const int64_t param_tiles =
      (problem.params - 1) / kStageParams +
      divide_up(head + (problem.params - 1) % kStageParams + 1, kStageParams);
  const int64_t blocks = divide_up(problem.proj_dim, kMatrixThreads) * param_tiles;
  device::launch(problem.law.kind == Kind::kRademacher ? matrix_kernel<Kind::kRademacher>
                                                       : matrix_kernel<Kind::kNormal>,
                 blocks, kMatrixThreads, 0, stream, problem);
}

}  // namespace trak_ext
