// A projection as launches: which rows, columns and chunks each one takes, so that the gradients'
// bf16 parts and the sums fit in the workspace and the blocks fill the device. Host code without a
// call of the CUDA runtime, so that the tests run it as it is.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "add_partials_kernel.h"
#include "matrix_kernel.h"
#include "multipliers.h"

namespace trak_ext::cuda {

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

// How a gradient tensor's parameters are cut into chunks, see multiply_problem.h.
struct ChunkCut {
  int64_t superblocks;        // of the tensor
  int64_t chunk_superblocks;  // of a chunk; the last one may have fewer
  int64_t chunks;
};

inline ChunkCut cut_chunks(const GradientView& grad) {
  const int64_t superblocks = count_superblocks(grad);
  const int64_t size =
      std::min(choose_chunk_superblocks(superblocks), std::max<int64_t>(1, superblocks));
  return {superblocks, size, ceil_div(superblocks, size)};
}

// Bytes of a chunk's gradients as bf16 parts.
inline int64_t chunk_operand_bytes(const ChunkCut& cut, int64_t rows, int tile_rows, int passes) {
  return ceil_div(rows, tile_rows) * operand_chunk_bytes(tile_rows, passes, cut.chunk_superblocks);
}

// The least workspace that a projection can be cut to: one chunk of one tile.
inline int64_t least_workspace(const Multiplier& multiplier, const ChunkCut& cut, int64_t rows,
                               int64_t proj_dim) {
  return std::min<int64_t>(rows, multiplier.tile_rows) *
             std::min<int64_t>(proj_dim, multiplier.tile_columns) *
             static_cast<int64_t>(sizeof(float)) +
         chunk_operand_bytes(cut, 1, multiplier.tile_rows, multiplier.passes);
}

// Chunks a launch, `most` at most: blocks of equal length run in waves of `resident`, so as many as
// leave the last wave nearly full. More are better where that is the same: a launch costs time too,
// counted as a tenth of a wave.
inline int64_t choose_chunks(int64_t chunks, int64_t most, int64_t tiles, int64_t resident) {
  constexpr int64_t kTried = 512;
  int64_t best = most;
  double best_cost = 0;
  for (int64_t size = most; size > 0 && size > most - kTried && 4 * size > most; --size) {
    const int64_t last = chunks % size;
    const double cost = static_cast<double>(chunks / size * ceil_div(tiles * size, resident) +
                                            ceil_div(tiles * last, resident)) +
                        0.1 * static_cast<double>(ceil_div(chunks, size));
    if (best_cost == 0 || cost < best_cost) {
      best = size;
      best_cost = cost;
    }
  }
  return best;
}

// As many columns as fit beside a chunk's gradients, then rows, then chunks: blocks of one chunk
// share its gradients in cache. resident: blocks that the device runs at once.
inline LaunchShape choose_launch(const Multiplier& multiplier, const ChunkCut& cut, int64_t rows,
                                 int64_t proj_dim, int64_t workspace_bytes, int64_t resident) {
  constexpr auto kSumBytes = static_cast<int64_t>(sizeof(float));
  const int64_t least = least_workspace(multiplier, cut, rows, proj_dim);
  if (workspace_bytes < least) {
    throw std::invalid_argument("workspace: expected at least " + std::to_string(least) +
                                " bytes, got " + std::to_string(workspace_bytes));
  }
  const int64_t tile_operand = chunk_operand_bytes(cut, 1, multiplier.tile_rows, multiplier.passes);
  const int64_t tile_rows = std::min<int64_t>(rows, multiplier.tile_rows);
  const int64_t columns = (workspace_bytes - tile_operand) / kSumBytes / tile_rows;
  LaunchShape shape = {rows, proj_dim, 1};
  if (columns < proj_dim) {
    shape.columns = columns / multiplier.tile_columns * multiplier.tile_columns;
  }
  // Bytes of a chunk's parts and sums for a tile of rows, and for all of them.
  const int64_t of_tile = tile_operand + tile_rows * shape.columns * kSumBytes;
  const int64_t row_tiles = ceil_div(rows, multiplier.tile_rows);
  if (workspace_bytes / of_tile < row_tiles) {
    shape.rows = workspace_bytes / of_tile * multiplier.tile_rows;
  }
  const int64_t of_chunk =
      chunk_operand_bytes(cut, shape.rows, multiplier.tile_rows, multiplier.passes) +
      shape.rows * shape.columns * kSumBytes;
  // A launch has at most 2^31 - 1 blocks, of a kernel that splits gradients too.
  const int64_t tiles =
      ceil_div(shape.rows, multiplier.tile_rows) * ceil_div(shape.columns, multiplier.tile_columns);
  const int64_t blocks_of_chunk =
      std::max(tiles, ceil_div(shape.rows, multiplier.tile_rows) * kTileRowsMax / kCoreRows *
                          cut.chunk_superblocks);
  const int64_t most = std::min(std::min(cut.chunks, workspace_bytes / of_chunk),
                                (int64_t{1} << 30) / blocks_of_chunk);
  shape.chunks = choose_chunks(cut.chunks, std::max<int64_t>(1, most), tiles, resident);
  return shape;
}

// out += grad R for `rows` rows of one gradient tensor from problem.first_row on, by one kernel.
// problem: law, grad and the first row.
inline void run_rows(const Multiplier& multiplier, MultiplyProblem problem, int64_t rows,
                     int64_t proj_dim, const OutputView& out, const Workspace& workspace,
                     int64_t multiprocessors, device::Stream stream) {
  const ChunkCut cut = cut_chunks(problem.grad);
  const LaunchShape shape = choose_launch(multiplier, cut, rows, proj_dim, workspace.bytes,
                                          multiprocessors * multiplier.blocks_per_sm);
  problem.superblocks = cut.superblocks;
  problem.chunk_superblocks = cut.chunk_superblocks;
  const int64_t first_row = problem.first_row;
  for (int64_t row = 0; row < rows; row += shape.rows) {
    problem.first_row = first_row + row;
    problem.rows = std::min(shape.rows, rows - row);
    const int64_t row_tiles = ceil_div(problem.rows, multiplier.tile_rows);
    for (int64_t chunk = 0; chunk < cut.chunks; chunk += shape.chunks) {
      problem.first_chunk = chunk;
      problem.chunks = std::min(shape.chunks, cut.chunks - chunk);
      // Bf16 parts first: their copies want multiples of 16 bytes.
      problem.operand = reinterpret_cast<char*>(workspace.data);
      problem.partials =
          workspace.data +
          problem.chunks *
              chunk_operand_bytes(cut, problem.rows, multiplier.tile_rows, multiplier.passes) /
              static_cast<int64_t>(sizeof(float));
      if (multiplier.split != nullptr) {
        const SplitProblem split = {problem, multiplier.tile_rows,
                                    has_aligned_quads(problem.grad, rows)};
        device::launch(multiplier.split,
                       problem.chunks * problem.chunk_superblocks * row_tiles *
                           multiplier.tile_rows / kCoreRows,
                       kSplitGradientsThreads, multiplier.split_shared_bytes, stream, split);
      }
      for (int64_t column = 0; column < proj_dim; column += shape.columns) {
        problem.first_column = column;
        problem.columns = std::min(shape.columns, proj_dim - column);
        device::launch(
            multiplier.kernel,
            problem.chunks * row_tiles * ceil_div(problem.columns, multiplier.tile_columns),
            multiplier.threads, multiplier.shared_bytes, stream, problem);
        const int64_t outputs = problem.rows * problem.columns;
        const AddProblem add = {
            problem.partials,
            problem.chunks,
            problem.rows,
            problem.columns,
            {out.data + problem.first_row * out.row_stride + column * out.column_stride,
             out.row_stride, out.column_stride}};
        device::launch(add_partials_kernel, ceil_div(outputs, kAddThreads), kAddThreads, 0, stream,
                       add);
      }
    }
  }
}

// out += grad R, for one gradient tensor [rows, params]. choose(rows, is_rest) is the kernel for so
// many rows: what a batch has beyond whole tiles goes to a smaller one.
template <class Choose>
void run_projection(const Choose& choose, const MatrixLaw& law, const GradientView& grad,
                    int64_t rows, int64_t proj_dim, const OutputView& out,
                    const Workspace& workspace, int64_t multiprocessors, device::Stream stream) {
  if (rows == 0 || proj_dim == 0 || grad.params == 0) return;
  MultiplyProblem problem = {};
  problem.law = law;
  problem.grad = grad;
  for (int64_t row = 0; row < rows;) {
    const Multiplier multiplier = choose(rows - row, row > 0);
    const int64_t left = rows - row;
    const int64_t whole = left / multiplier.tile_rows * multiplier.tile_rows;
    const int64_t taken = whole > 0 ? whole : left;
    problem.first_row = row;
    run_rows(multiplier, problem, taken, proj_dim, out, workspace, multiprocessors, stream);
    row += taken;
  }
}

// out[p, j] = R[param_offset + p, j].
inline void run_fill_matrix(const MatrixProblem& problem, device::Stream stream) {
  if (problem.params == 0 || problem.proj_dim == 0) return;
  const auto head = static_cast<int64_t>(problem.param_offset % kStageParams);
  const int64_t param_tiles =
      (problem.params - 1) / kStageParams +
      ceil_div(head + (problem.params - 1) % kStageParams + 1, kStageParams);
  const int64_t blocks = ceil_div(problem.proj_dim, kMatrixThreads) * param_tiles;
  device::launch(problem.law.kind == Kind::kRademacher ? matrix_kernel<Kind::kRademacher>
                                                       : matrix_kernel<Kind::kNormal>,
                 blocks, kMatrixThreads, 0, stream, problem);
}

}  // namespace trak_ext::cuda
