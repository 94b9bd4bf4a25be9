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

// How the output is cut for threads. Column cuts repeat what is done to gradients (packing, tables)
// on every thread, row cuts repeat what is done to the matrix.
struct Cut {
  int64_t tile_rows;
  int64_t tile_columns;
};

Cut cut_output(const ProjectionProblem& problem, const ProjectionKernels& table, int threads) {
  // Both repeated parts cost about as much as this many columns or rows of sums.
  constexpr int64_t kEnoughColumns = 512;
  constexpr int64_t kEnoughRows = 32;
  int64_t column_share = ceil_div(problem.proj_dim, threads);
  int64_t row_share = problem.rows;
  if (column_share < kEnoughColumns && ceil_div(problem.rows, threads) >= kEnoughRows) {
    column_share = problem.proj_dim;
    row_share = ceil_div(problem.rows, threads);
  }
  column_share = std::min(column_share, table.tile_columns_max);
  row_share = std::min(row_share, table.tile_rows_max);
  // Of one size each, as few as can be: entries are made anew for every row tile.
  return {ceil_div(problem.rows, ceil_div(problem.rows, row_share)),
          ceil_div(column_share, table.tile_columns) * table.tile_columns};
}

}  // namespace

void project(const ProjectionProblem& problem, int num_threads) {
  const ProjectionKernels& table = projection_kernels(problem.law.kind, problem.precision);
  if (problem.rows == 0 || problem.proj_dim == 0) return;
  double params = 0;
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    params += static_cast<double>(problem.grads[i].params);
  }
  if (params == 0) return;
  const double work =
      params * static_cast<double>(problem.rows) * static_cast<double>(problem.proj_dim);
  const int threads = threads_for(work, num_threads);
  const Cut cut = cut_output(problem, table, threads);
  const int64_t column_tiles = ceil_div(problem.proj_dim, cut.tile_columns);
  const int64_t row_tiles = ceil_div(problem.rows, cut.tile_rows);

  const int64_t bytes =
      table.workspace_bytes({0, cut.tile_rows, 0, std::min(cut.tile_columns, problem.proj_dim)});
  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < threads; ++i) workspaces.push_back(allocate_aligned(bytes));
  parallel_for(column_tiles * row_tiles, threads, [&](int thread, int64_t task) {
    const int64_t row = task / column_tiles * cut.tile_rows;
    const int64_t column = task % column_tiles * cut.tile_columns;
    const OutputTile tile = {row, std::min(row + cut.tile_rows, problem.rows), column,
                             std::min(column + cut.tile_columns, problem.proj_dim)};
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
  for (int i = 0; i < threads; ++i) {
    workspaces.push_back(allocate_aligned(table.matrix_workspace_bytes));
  }
  parallel_for(ceil_div(proj_dim, table.matrix_columns), threads, [&](int thread, int64_t task) {
    table.fill_matrix_columns(law, param_offset, params, proj_dim, task * table.matrix_columns, out,
                              workspaces[static_cast<size_t>(thread)].get());
  });
}

}  // namespace trak_ext
