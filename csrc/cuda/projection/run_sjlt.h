// A projection by the sparse kind as launches. Host code without a call of the CUDA runtime, so
// that the tests run it as it is.
//
// Nodes' sums lie in the workspace, a slot a node. If not all of them fit, the output is cut into
// passes of fewer rows, then of fewer columns, each of which reads its own part of the gradients
// alone, and the nodes into windows of whole groups of 64, whose sums are folded into open sums
// before the next window takes their slots.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../../division.h"
#include "sjlt_fold_kernel.h"
#include "sjlt_matrix_kernel.h"
#include "sjlt_sum_kernel.h"

namespace trak_ext::cuda {

struct SjltWorkspace {
  float* data;
  int64_t bytes;
};

// Blocks of a launch that are worth fewer rows each: three for each of some 132 multiprocessors,
// twice. Bits do not depend on it.
constexpr int64_t kSjltBlocksWanted = 768;

// Columns of a block: as wide as can be without leaving many threads idle.
inline int sjlt_tile_columns(uint64_t width) {
  int best = kSjltTileMin;
  uint64_t least = ~uint64_t{0};
  for (int tile = kSjltTileMax; tile >= kSjltTileMin; tile /= 2) {
    const auto columns = static_cast<uint64_t>(tile);
    const uint64_t padded = (width + columns - 1) / columns * columns;
    if (least == ~uint64_t{0} || padded + padded / 16 < least) {
      best = tile;
      least = padded;
    }
  }
  return best;
}

// How a projection is cut.
struct SjltPlan {
  SjltNodes nodes;
  int64_t slots;             // of a window
  int64_t window_slots_all;  // of a window that holds all nodes
  int64_t rows;              // of a pass
  int64_t tiles;             // of a pass
  int tile_columns;
  int64_t tiles_per_repetition;

  uint64_t first_window() const { return nodes.first & ~uint64_t{kSjltRadix - 1}; }
  bool one_window() const { return slots >= window_slots_all; }
};

// The least workspace: 64 nodes and the open sums of a tile's columns of one row.
constexpr int64_t kSjltWorkspaceLeast =
    int64_t{kSjltTileMax} * (kSjltRadix + kSjltLevelsMax) * static_cast<int64_t>(sizeof(float));

inline SjltPlan plan_sjlt(const SjltProblem& problem, int64_t workspace_bytes) {
  if (workspace_bytes < kSjltWorkspaceLeast) {
    throw std::invalid_argument("workspace: expected at least " +
                                std::to_string(kSjltWorkspaceLeast) + " bytes, got " +
                                std::to_string(workspace_bytes));
  }
  const auto width = static_cast<int64_t>(problem.law.width);
  SjltPlan plan = {};
  plan.nodes = sjlt_nodes(problem);
  plan.window_slots_all = static_cast<int64_t>(plan.nodes.last - plan.first_window()) + 1;
  plan.tile_columns = sjlt_tile_columns(problem.law.width);
  plan.tiles_per_repetition = ceil_div(width, plan.tile_columns);
  plan.rows = problem.rows;
  plan.tiles = plan.tiles_per_repetition * problem.law.repetitions;
  const int64_t floats = workspace_bytes / static_cast<int64_t>(sizeof(float));
  const int64_t columns = width * problem.law.repetitions;
  // What an output needs at least: a group's slots, and its open sums where there are more groups.
  const bool one_group = plan.window_slots_all <= kSjltRadix;
  const int64_t need = one_group ? plan.window_slots_all : kSjltRadix + plan.nodes.levels;
  const int64_t outputs = floats / need;
  if (outputs / columns < plan.rows) {
    plan.rows = std::max<int64_t>(1, outputs / columns);
    if (plan.rows >= 8) plan.rows = plan.rows / 8 * 8;
  }
  if (outputs < columns) plan.tiles = std::min(plan.tiles, outputs / plan.tile_columns);
  const int64_t pass_columns = std::min(columns, plan.tiles * plan.tile_columns);
  const int64_t pass_outputs = plan.rows * pass_columns;
  plan.slots = plan.window_slots_all;
  if (floats / pass_outputs < plan.slots) {
    plan.slots = (floats / pass_outputs - plan.nodes.levels) / kSjltRadix * kSjltRadix;
  }
  return plan;
}

using SjltSumKernel = void (*)(SjltSumProblem);

template <DType kDType>
SjltSumKernel choose_sjlt_kernel(int rows) {
  return rows == 8   ? sjlt_sum_kernel<kDType, 8>
         : rows == 4 ? sjlt_sum_kernel<kDType, 4>
         : rows == 2 ? sjlt_sum_kernel<kDType, 2>
                     : sjlt_sum_kernel<kDType, 1>;
}

inline SjltSumKernel choose_sjlt_kernel(DType dtype, int rows) {
  switch (dtype) {
    case DType::kFloat64:
      return choose_sjlt_kernel<DType::kFloat64>(rows);
    case DType::kFloat32:
      return choose_sjlt_kernel<DType::kFloat32>(rows);
    case DType::kFloat16:
      return choose_sjlt_kernel<DType::kFloat16>(rows);
    default:
      return choose_sjlt_kernel<DType::kBFloat16>(rows);
  }
}

// Rows and columns of the output that are summed together, over all nodes.
class SjltPass {
 public:
  SjltPass(const SjltProblem& problem, const SjltPlan& plan, int64_t first_row, int64_t rows,
           int64_t first_tile, int64_t tiles, float* workspace, int64_t blocks_wanted,
           device::Stream stream)
      : problem_(problem),
        plan_(plan),
        first_row_(first_row),
        rows_(rows),
        first_tile_(first_tile),
        tiles_(tiles),
        first_column_(column_of(first_tile)),
        columns_(column_of(first_tile + tiles) - first_column_),
        sums_(workspace),
        open_(workspace + plan.slots * rows * columns_),
        blocks_wanted_(blocks_wanted),
        stream_(stream),
        window_(plan.first_window()) {}

  void run() {
    bool touched = false;
    uint64_t last = 0;  // node, of those touched
    for (int64_t i = 0; i < problem_.num_grads; ++i) {
      const GradientView& grad = problem_.grads[i];
      if (grad.params == 0) continue;
      uint64_t node = sjlt_node(problem_.law, grad.param_offset);
      const uint64_t end =
          sjlt_node(problem_.law, grad.param_offset + static_cast<uint64_t>(grad.params) - 1);
      while (true) {
        while (node - window_ >= static_cast<uint64_t>(plan_.slots)) {
          fold(window_ + static_cast<uint64_t>(plan_.slots) - 1, false);
          window_ += static_cast<uint64_t>(plan_.slots);
        }
        const uint64_t stop = std::min(end, window_ + static_cast<uint64_t>(plan_.slots) - 1);
        sum(grad, node, stop, touched && node == last);
        touched = true;
        last = stop;
        if (stop == end) break;
        node = stop + 1;
      }
    }
    fold(last, true);
  }

 private:
  int64_t column_of(int64_t tile) const {
    const auto width = static_cast<int64_t>(problem_.law.width);
    return tile / plan_.tiles_per_repetition * width +
           std::min(width, tile % plan_.tiles_per_repetition * plan_.tile_columns);
  }

  void sum(const GradientView& grad, uint64_t first, uint64_t last, bool go_on) {
    const int64_t bytes = element_bytes(grad.dtype);
    SjltSumProblem part = {};
    part.law = problem_.law;
    part.grad = grad;
    part.param_bytes = grad.param_stride * bytes;
    part.row_bytes = grad.row_stride * bytes;
    part.tile_columns = plan_.tile_columns;
    part.tiles_per_repetition = plan_.tiles_per_repetition;
    part.first_tile = first_tile_;
    part.tiles = tiles_;
    part.first_node = first;
    part.nodes = static_cast<int64_t>(last - first) + 1;
    const uint64_t width = problem_.law.width;
    const uint64_t end = grad.param_offset + static_cast<uint64_t>(grad.params);
    part.first_chunk = grad.param_offset / width;
    part.end_chunk = (end - 1) / width + 1;
    part.first_whole_chunk = part.first_chunk + (grad.param_offset % width != 0 ? 1 : 0);
    part.end_whole_chunk = end / width;
    part.go_on = go_on;
    part.sums_node_pitch = rows_ * columns_;
    part.sums_row_pitch = columns_;
    part.first_column = first_column_;
    const int64_t node_groups = ceil_div(part.nodes, kSjltThreads / plan_.tile_columns);
    for (int64_t row = 0; row < rows_;) {
      const int64_t left = rows_ - row;
      int kernel_rows = left >= 5 ? 8 : left >= 3 ? 4 : static_cast<int>(left);
      part.first_row = first_row_ + row;
      part.rows = left >= 8 ? left / 8 * 8 : left;
      while (kernel_rows > 1 &&
             node_groups * tiles_ * ceil_div(part.rows, kernel_rows) < blocks_wanted_) {
        kernel_rows /= 2;
      }
      part.row_groups = ceil_div(part.rows, kernel_rows);
      part.sums = sums_ + static_cast<int64_t>(first - window_) * part.sums_node_pitch +
                  row * part.sums_row_pitch;
      device::launch(choose_sjlt_kernel(grad.dtype, kernel_rows),
                     node_groups * part.row_groups * tiles_, kSjltThreads,
                     sjlt_shared_bytes(plan_.tile_columns), stream_, part);
      row += part.rows;
    }
  }

  // The window's nodes, the last of which is `last`, into the open sums, or into `out`.
  void fold(uint64_t last, bool ends) {
    const int64_t outputs = rows_ * columns_;
    const uint64_t first = std::max(window_, plan_.nodes.first);
    const auto begin = static_cast<int64_t>(first - window_);
    const auto end = static_cast<int64_t>(last - window_) + 1;
    SjltFoldProblem part = {};
    part.sums = sums_ + begin * outputs;
    part.slot_pitch = outputs;
    part.count = end - begin;
    part.first = first;
    part.levels = plan_.nodes.levels;
    if (plan_.window_slots_all > kSjltRadix) {
      const int64_t groups = ceil_div(end, kSjltRadix);
      device::launch(sjlt_group_kernel, ceil_div(outputs, kSjltFoldThreads) * groups,
                     kSjltFoldThreads, 0, stream_, SjltGroupProblem{sums_, outputs, begin, end});
      part.sums = sums_;
      part.slot_pitch = kSjltRadix * outputs;
      part.count = groups;
      part.first = window_ >> kSjltRadixLog2;
      part.levels = std::max(1, plan_.nodes.levels - 1);
    }
    part.begins = first == plan_.nodes.first;
    part.ends = ends;
    part.scale = sjlt_scale(problem_.law);
    part.open = open_;
    part.rows = rows_;
    part.columns = columns_;
    const OutputView& out = problem_.out;
    part.out = {out.data + first_row_ * out.row_stride + first_column_ * out.column_stride,
                out.row_stride, out.column_stride};
    device::launch(sjlt_fold_kernel, ceil_div(outputs, kSjltFoldThreads), kSjltFoldThreads, 0,
                   stream_, part);
  }

  const SjltProblem& problem_;
  const SjltPlan& plan_;
  int64_t first_row_, rows_, first_tile_, tiles_, first_column_, columns_;
  float* sums_;  // [slots, rows, columns]
  float* open_;  // [levels, rows, columns]
  int64_t blocks_wanted_;
  device::Stream stream_;
  uint64_t window_;  // the node of the first slot
};

// out += the features of all tensors.
inline void run_sjlt(const SjltProblem& problem, const SjltWorkspace& workspace,
                     device::Stream stream, int64_t blocks_wanted = kSjltBlocksWanted) {
  if (problem.rows == 0 || sjlt_nodes(problem).levels == 0) return;
  const SjltPlan plan = plan_sjlt(problem, workspace.bytes);
  const int64_t all_tiles = plan.tiles_per_repetition * problem.law.repetitions;
  for (int64_t row = 0; row < problem.rows; row += plan.rows) {
    for (int64_t tile = 0; tile < all_tiles; tile += plan.tiles) {
      SjltPass(problem, plan, row, std::min(plan.rows, problem.rows - row), tile,
               std::min(plan.tiles, all_tiles - tile), workspace.data, blocks_wanted, stream)
          .run();
    }
  }
}

inline int64_t plan_sjlt_workspace(const SjltProblem& problem, int64_t limit) {
  const SjltNodes nodes = sjlt_nodes(problem);
  if (problem.rows == 0 || nodes.levels == 0) return 0;
  const uint64_t first = nodes.first & ~uint64_t{kSjltRadix - 1};
  const double wanted = static_cast<double>(nodes.last - first + 1) *
                        static_cast<double>(problem.rows) * static_cast<double>(problem.law.width) *
                        static_cast<double>(problem.law.repetitions) * sizeof(float);
  if (wanted > static_cast<double>(limit)) return std::max(limit, kSjltWorkspaceLeast);
  return std::max(static_cast<int64_t>(wanted), kSjltWorkspaceLeast);
}

// out[p, j] = R[param_offset + p, j].
inline void run_fill_sjlt_matrix(const SjltMatrixProblem& problem, device::Stream stream) {
  const int64_t columns = problem.law.repetitions * static_cast<int64_t>(problem.law.width);
  if (problem.params == 0 || columns == 0) return;
  device::launch(sjlt_zero_kernel, ceil_div(problem.params * columns, kSjltMatrixThreads),
                 kSjltMatrixThreads, 0, stream, problem);
  device::launch(sjlt_entry_kernel,
                 ceil_div(problem.params * problem.law.repetitions, kSjltMatrixThreads),
                 kSjltMatrixThreads, 0, stream, problem);
}

}  // namespace trak_ext::cuda
