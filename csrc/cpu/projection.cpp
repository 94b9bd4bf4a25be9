// Cuts a projection into pieces and runs them on threads. Bits do not depend on the cut: every
// element is summed over the parameters of a span in the same order inside one piece, and spans are
// added to it in their order.
#include "projection.h"

#include <algorithm>

#include "kernel_table.h"
#include "threads.h"

namespace trak_ext::cpu {
namespace {

// Below this many multiply-adds a thread costs more to start than it saves.
constexpr double kWorkPerThread = 4e6;

// With fewer columns a thread, what is done to gradients (packing, tables) and with fewer rows,
// what is done to the matrix, weighs too much to be done on every thread.
constexpr int64_t kEnoughColumns = 512;
constexpr int64_t kEnoughRows = 32;

int threads_for(double multiply_adds, int num_threads) {
  const double useful = std::min(multiply_adds / kWorkPerThread + 1.0, 1e6);
  return std::max(1, std::min(num_threads, static_cast<int>(useful)));
}

// Memory for every thread of a call.
std::vector<AlignedBuffer> allocate_workspaces(int threads, int64_t bytes) {
  std::vector<AlignedBuffer> workspaces;
  for (int i = 0; i < threads; ++i) workspaces.push_back(allocate_aligned(bytes));
  return workspaces;
}

// Tiles of the output, all parameters each.
void project_by_tiles(const ProjectionProblem& problem, const ProjectionKernels& kernels,
                      int64_t rows_share, int64_t columns_share, int threads) {
  rows_share = std::min(rows_share, kernels.tile_rows_max);
  columns_share = std::min(columns_share, kernels.tile_columns_max);
  // Of one size each, as few as can be: entries are made anew for every row tile.
  const int64_t tile_rows = ceil_div(problem.rows, ceil_div(problem.rows, rows_share));
  const int64_t tile_columns = ceil_div(columns_share, kernels.tile_columns) * kernels.tile_columns;
  const int64_t column_tiles = ceil_div(problem.proj_dim, tile_columns);
  const int64_t row_tiles = ceil_div(problem.rows, tile_rows);

  const auto workspaces = allocate_workspaces(
      threads,
      kernels.workspace_bytes({0, tile_rows, 0, std::min(tile_columns, problem.proj_dim)}));
  parallel_for(column_tiles * row_tiles, threads, [&](int thread, int64_t task) {
    const int64_t row = task / column_tiles * tile_rows;
    const int64_t column = task % column_tiles * tile_columns;
    const OutputTile tile = {row, std::min(row + tile_rows, problem.rows), column,
                             std::min(column + tile_columns, problem.proj_dim)};
    kernels.project_tile(problem, tile, workspaces[static_cast<size_t>(thread)].get());
  });
}

// Parameters [begin, end) of a gradient tensor.
GradientView slice(const GradientView& grads, int64_t begin, int64_t end) {
  GradientView part = grads;
  part.data = static_cast<const char*>(grads.data) +
              begin * grads.param_stride * element_bytes(grads.dtype);
  part.params = end - begin;
  part.param_offset = grads.param_offset + static_cast<uint64_t>(begin);
  return part;
}

// What project_by_spans() may take for sums, in bytes; and what it takes in any case, so that small
// outputs do not start threads for every few spans.
constexpr double kSpanBufferBytes = 64 << 20;
constexpr int64_t kSpanBufferLeast = 8 << 20;

// Whether the output is one tile, its buffers are small, and most parameters belong to tensors that
// have spans for every thread.
bool spans_pay(const ProjectionProblem& problem, const ProjectionKernels& kernels, int threads) {
  const double buffer =
      8.0 * threads * static_cast<double>(problem.rows) * static_cast<double>(problem.proj_dim);
  if (problem.rows > kernels.tile_rows_max || problem.proj_dim > kernels.tile_columns_max ||
      buffer > kSpanBufferBytes) {
    return false;
  }
  double all = 0, in_long_tensors = 0;
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    const auto params = static_cast<double>(problem.grads[i].params);
    all += params;
    if (problem.grads[i].params >= 2 * threads * kernels.span_params) in_long_tensors += params;
  }
  return in_long_tensors > 0.9 * all;
}

// Spans of the parameters, the whole output each: for outputs too small to be cut. A few spans at a
// time go to buffers of their own, which are then added to the output in order.
void project_by_spans(const ProjectionProblem& problem, const ProjectionKernels& kernels,
                      int threads) {
  const OutputTile whole = {0, problem.rows, 0, problem.proj_dim};
  const auto workspaces = allocate_workspaces(threads, kernels.workspace_bytes(whole));
  const int64_t size = problem.rows * problem.proj_dim;
  const int64_t size_bytes = size * static_cast<int64_t>(sizeof(float));
  const int64_t spans_at_once = std::max<int64_t>(2 * threads, kSpanBufferLeast / size_bytes);
  const AlignedBuffer buffer = allocate_aligned(spans_at_once * size_bytes);
  float* const sums = static_cast<float*>(buffer.get());

  for (int64_t i = 0; i < problem.num_grads; ++i) {
    const GradientView& grads = problem.grads[i];
    // Spans are counted from the chunk of the first parameter.
    const int64_t before = static_cast<int64_t>(grads.param_offset % kChunkParams);
    const int64_t spans = ceil_div(before + grads.params, kernels.span_params);
    for (int64_t first = 0; grads.params > 0 && first < spans; first += spans_at_once) {
      const int64_t count = std::min(spans_at_once, spans - first);
      parallel_for(count, threads, [&](int thread, int64_t task) {
        const int64_t begin = (first + task) * kernels.span_params - before;
        const GradientView part = slice(grads, std::max<int64_t>(begin, 0),
                                        std::min(begin + kernels.span_params, grads.params));
        ProjectionProblem piece = problem;
        piece.grads = &part;
        piece.num_grads = 1;
        piece.out = {sums + task * size, problem.proj_dim, 1};
        std::fill_n(piece.out.data, size, 0.0f);
        kernels.project_tile(piece, whole, workspaces[static_cast<size_t>(thread)].get());
      });
      for (int64_t span = 0; span < count; ++span) {
        const float* source = sums + span * size;
        for (int64_t row = 0; row < problem.rows; ++row) {
          float* target = problem.out.data + row * problem.out.row_stride;
          for (int64_t j = 0; j < problem.proj_dim; ++j) {
            target[j * problem.out.column_stride] += source[row * problem.proj_dim + j];
          }
        }
      }
    }
  }
}

}  // namespace

void project(const ProjectionProblem& problem, int num_threads) {
  const ProjectionKernels& kernels = projection_kernels(problem.law.kind, problem.precision);
  if (problem.rows == 0 || problem.proj_dim == 0) return;
  double params = 0;
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    params += static_cast<double>(problem.grads[i].params);
  }
  if (params == 0) return;
  const double work =
      params * static_cast<double>(problem.rows) * static_cast<double>(problem.proj_dim);
  const int threads = threads_for(work, num_threads);
  const int64_t columns_share = ceil_div(problem.proj_dim, threads);
  const int64_t rows_share = ceil_div(problem.rows, threads);

  if (threads == 1 || columns_share >= kEnoughColumns) {
    project_by_tiles(problem, kernels, problem.rows, columns_share, threads);
  } else if (rows_share >= kEnoughRows) {
    project_by_tiles(problem, kernels, rows_share, problem.proj_dim, threads);
  } else if (spans_pay(problem, kernels, threads)) {
    project_by_spans(problem, kernels, threads);
  } else {
    project_by_tiles(problem, kernels, problem.rows, columns_share, threads);
  }
}

void fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                 float* out, int num_threads) {
  const KernelTable& table = kernels();
  if (params == 0 || proj_dim == 0) return;
  const int threads =
      threads_for(static_cast<double>(params) * static_cast<double>(proj_dim), num_threads);
  const auto workspaces = allocate_workspaces(threads, table.matrix_workspace_bytes);
  parallel_for(ceil_div(proj_dim, table.matrix_columns), threads, [&](int thread, int64_t task) {
    table.fill_matrix_columns(law, param_offset, params, proj_dim, task * table.matrix_columns, out,
                              workspaces[static_cast<size_t>(thread)].get());
  });
}

}  // namespace trak_ext::cpu
