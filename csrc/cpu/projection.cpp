// Cuts a projection into output tiles and runs them on threads. A tile's bits do not depend on the
// cut: every row and column is summed over all parameters in the same order inside one tile.
#include "projection.h"

#include <algorithm>

#include "kernel_table.h"
#include "threads.h"

namespace trak_ext {
namespace {

// Below this many multiply-adds a thread costs more to start than it saves.
constexpr double kWorkPerThread = 4e6;

int threads_for(double multiply_adds, int num_threads) {
  const double useful = std::min(multiply_adds / kWorkPerThread + 1.0, 1e6);
  return std::max(1, std::min(num_threads, static_cast<int>(useful)));
}

}  // namespace

void project(const ProjectionProblem& problem, int num_threads) {
  const KernelTable& table = kernels();
  if (problem.rows == 0 || problem.proj_dim == 0) return;
  double params = 0;
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    params += static_cast<double>(problem.grads[i].params);
  }
  if (params == 0) return;
  const double work =
      params * static_cast<double>(problem.rows) * static_cast<double>(problem.proj_dim);
  const int threads = threads_for(work, num_threads);

  // Wide enough that a chunk's gradients, packed once a tile, serve many columns; narrow enough
  // that every thread has some.
  const int64_t share = ceil_div(problem.proj_dim, threads);
  const int64_t tile_columns =
      std::min(table.tile_columns_max, ceil_div(share, table.tile_columns) * table.tile_columns);
  const int64_t column_tiles = ceil_div(problem.proj_dim, tile_columns);
  // Entries are made anew for every row tile: as few as can be, and of one size.
  const int64_t tile_rows = ceil_div(problem.rows, ceil_div(problem.rows, table.tile_rows_max));
  const int64_t row_tiles = ceil_div(problem.rows, tile_rows);

  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < threads; ++i) workspaces.push_back(allocate_aligned(table.workspace_bytes));
  parallel_for(column_tiles * row_tiles, threads, [&](int thread, int64_t task) {
    const int64_t row = task / column_tiles * tile_rows;
    const int64_t column = task % column_tiles * tile_columns;
    const OutputTile tile = {row, std::min(row + tile_rows, problem.rows), column,
                             std::min(column + tile_columns, problem.proj_dim)};
    table.project_tile(problem, tile, workspaces[static_cast<size_t>(thread)].get());
  });
}

void fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                 float* out, int num_threads) {
  const KernelTable& table = kernels();
  if (params == 0 || proj_dim == 0) return;
  const int threads =
      threads_for(static_cast<double>(params) * static_cast<double>(proj_dim), num_threads);
  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < threads; ++i) workspaces.push_back(allocate_aligned(table.workspace_bytes));
  parallel_for(ceil_div(proj_dim, table.tile_columns), threads, [&](int thread, int64_t task) {
    table.fill_matrix_columns(law, param_offset, params, proj_dim, task * table.tile_columns, out,
                              workspaces[static_cast<size_t>(thread)].get());
  });
}

}  // namespace trak_ext
