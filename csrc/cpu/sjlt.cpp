// The sparse kind on the CPU: cuts a projection into panels of the output, or, where there are too
// few for the threads, into nodes of the sum, and adds nodes' sums in the order of the law. Bits do
// not depend on the cut.
#include "sjlt.h"

#include <algorithm>
#include <cfenv>
#include <cstring>
#include <vector>

#include "kernel_table.h"
#include "threads.h"

namespace trak_ext::cpu {
namespace {

// Rounds to nearest and keeps denormals while it lives, whatever the caller's thread does.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t before_;
};

// Below this many additions a thread costs more to start than it saves.
constexpr double kWorkPerThread = 1 << 18;

constexpr int64_t kPanelColumnsLeast = 512;
constexpr int64_t kPanelRows = 64;
constexpr int64_t kPanelRowsLeast = 8;

// What sums of nodes may take where threads share a panel, in bytes.
constexpr int64_t kNodeSumBytes = 32 << 20;

// The panels of a problem, all of nearly one size.
struct Panels {
  int64_t rows, columns;              // of a panel, at most
  int64_t row_panels, column_panels;  // of the rows, of one repetition's columns
  int64_t count;

  SjltPanel at(const SjltProblem& problem, int64_t index) const {
    const int64_t column = index % column_panels * columns;
    const int64_t rest = index / column_panels;
    const int64_t row = rest / problem.law.repetitions * rows;
    return {row, std::min(row + rows, problem.rows),
            static_cast<uint32_t>(rest % problem.law.repetitions), column,
            std::min(column + columns, static_cast<int64_t>(problem.law.width))};
  }
};

int64_t divide_evenly(int64_t total, int64_t most) {
  return ceil_div(total, ceil_div(total, most));
}

Panels plan_panels(const SjltProblem& problem, int threads) {
  const auto width = static_cast<int64_t>(problem.law.width);
  const int64_t repetitions = problem.law.repetitions;
  int64_t rows = std::min(problem.rows, kPanelRows);
  int64_t column_panels = ceil_div(width, kSjltPanelColumns);
  auto count = [&] { return column_panels * repetitions * ceil_div(problem.rows, rows); };
  // Columns are cut further until the threads' shares are even, or nearly so; then rows, until
  // every thread has a panel.
  const int64_t least = column_panels;
  while (count() % threads != 0 && count() < 4 * threads && column_panels < least + threads) {
    ++column_panels;
  }
  column_panels = std::max(least, std::min(column_panels, width / kPanelColumnsLeast));
  while (count() < threads && rows >= 2 * kPanelRowsLeast) rows = ceil_div(rows, 2);
  Panels panels = {};
  panels.columns = ceil_div(ceil_div(width, column_panels), 16) * 16;
  panels.rows = divide_evenly(problem.rows, rows);
  panels.column_panels = ceil_div(width, panels.columns);
  panels.row_panels = ceil_div(problem.rows, panels.rows);
  panels.count = panels.column_panels * repetitions * panels.row_panels;
  return panels;
}

void add_to(float* sums, const float* terms, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += terms[i];
}

// The open sums of a panel, one a level above the nodes.
class Tree {
 public:
  // `buffer` has room for `size` floats a level.
  Tree(const SjltNodes& nodes, int64_t size, void* buffer)
      : nodes_(nodes), size_(size), sums_(static_cast<float*>(buffer)) {
    std::fill_n(sums_, nodes.levels * size, 0.0f);
  }

  // In the order of the nodes; null for sums of nothing.
  void add(uint64_t node, const float* node_sums) {
    if (node_sums != nullptr) add_to(level(0), node_sums, size_);
    close(sjlt_closes(node, nodes_.levels));
  }
  const float* finish() {
    close(nodes_.levels - 1);
    return level(nodes_.levels - 1);
  }

 private:
  float* level(int index) { return sums_ + index * size_; }
  void close(int levels) {
    for (int i = 0; i < levels; ++i) {
      add_to(level(i + 1), level(i), size_);
      std::fill_n(level(i), size_, 0.0f);
    }
  }

  SjltNodes nodes_;
  int64_t size_;
  float* sums_;  // [levels, size]
};

// out += scale * sums for a panel.
void add_features(const SjltProblem& problem, const SjltPanel& panel, const float* sums) {
  const float scale = sjlt_scale(problem.law);
  const OutputView& out = problem.out;
  const int64_t first = static_cast<int64_t>(panel.repetition * problem.law.width);
  for (int64_t row = panel.row_begin; row < panel.row_end; ++row) {
    const float* own = sums + (row - panel.row_begin) * sjlt_pitch(panel);
    for (int64_t j = panel.column_begin; j < panel.column_end; ++j, ++own) {
      float* target = out.data + row * out.row_stride + (first + j) * out.column_stride;
      const float feature = *own * scale;
      const float value = *target + feature;
      if (value == value) {
        *target = value;
      } else {
        const uint32_t nan = 0x7FC00000u;
        std::memcpy(target, &nan, sizeof(nan));
      }
    }
  }
}

// Whether a tensor has a parameter of a node.
bool touches_node(const SjltProblem& problem, uint64_t node) {
  const uint64_t begin = (node << kSjltRadixLog2) * problem.law.width;
  return sjlt_touches(problem, begin, begin + kSjltRadix * problem.law.width);
}

int64_t size_of(const SjltPanel& panel) {
  return (panel.row_end - panel.row_begin) * sjlt_pitch(panel);
}

std::vector<AlignedBuffer> allocate_for(int threads, int64_t bytes) {
  std::vector<AlignedBuffer> buffers;
  for (int i = 0; i < threads; ++i) buffers.push_back(allocate_aligned(bytes));
  return buffers;
}

// A panel a task, all nodes each.
void project_by_panels(const SjltProblem& problem, const SjltNodes& nodes, const Panels& panels,
                       int threads) {
  const auto sum_node = kernels().sum_sjlt_node;
  const int64_t bytes = panels.rows * panels.columns * static_cast<int64_t>(sizeof(float));
  const auto buffers = allocate_for(threads, bytes);
  const auto trees = allocate_for(threads, nodes.levels * bytes);
  const auto scratch = allocate_for(threads, kernels().sjlt_scratch_bytes);
  parallel_for(panels.count, threads, [&](int thread, int64_t task) {
    const DefaultArithmetic arithmetic;
    const SjltPanel panel = panels.at(problem, task);
    auto* sums = static_cast<float*>(buffers[static_cast<size_t>(thread)].get());
    Tree tree(nodes, size_of(panel), trees[static_cast<size_t>(thread)].get());
    for (uint64_t node = nodes.first;; ++node) {
      const bool touched = touches_node(problem, node);
      if (touched) sum_node(problem, node, panel, scratch[static_cast<size_t>(thread)].get(), sums);
      tree.add(node, touched ? sums : nullptr);
      if (node == nodes.last) break;
    }
    add_features(problem, panel, tree.finish());
  });
}

// A node of a panel a task: a few at a time go to buffers of their own and from there to the tree.
void project_by_nodes(const SjltProblem& problem, const SjltNodes& nodes, const Panels& panels,
                      int threads) {
  const auto sum_node = kernels().sum_sjlt_node;
  const DefaultArithmetic arithmetic;
  const auto scratch = allocate_for(threads, kernels().sjlt_scratch_bytes);
  for (int64_t index = 0; index < panels.count; ++index) {
    const SjltPanel panel = panels.at(problem, index);
    const int64_t size = size_of(panel);
    const int64_t bytes = size * static_cast<int64_t>(sizeof(float));
    const auto window = static_cast<uint64_t>(
        std::max<int64_t>(threads, std::min<int64_t>(64 * threads, kNodeSumBytes / bytes)));
    const AlignedBuffer buffer = allocate_aligned(static_cast<int64_t>(window) * bytes);
    auto* sums = static_cast<float*>(buffer.get());
    const AlignedBuffer levels = allocate_aligned(nodes.levels * bytes);
    Tree tree(nodes, size, levels.get());
    for (uint64_t first = nodes.first; first <= nodes.last; first += window) {
      const uint64_t left = nodes.last - first + 1;
      const auto count = static_cast<int64_t>(std::min(window, left));
      parallel_for(count, threads, [&](int thread, int64_t task) {
        const DefaultArithmetic arithmetic_here;
        const uint64_t node = first + static_cast<uint64_t>(task);
        if (!touches_node(problem, node)) return;
        sum_node(problem, node, panel, scratch[static_cast<size_t>(thread)].get(),
                 sums + task * size);
      });
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t node = first + static_cast<uint64_t>(i);
        tree.add(node, touches_node(problem, node) ? sums + i * size : nullptr);
      }
    }
    add_features(problem, panel, tree.finish());
  }
}

}  // namespace

void project_sjlt(const SjltProblem& problem, int num_threads) {
  const SjltNodes nodes = sjlt_nodes(problem);
  if (nodes.levels == 0 || problem.rows == 0) return;
  double params = 0;
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    params += static_cast<double>(problem.grads[i].params);
  }
  const double work =
      params * static_cast<double>(problem.rows) * static_cast<double>(problem.law.repetitions);
  const int threads = std::max(
      1, std::min(num_threads, static_cast<int>(std::min(work / kWorkPerThread + 1.0, 1e6))));
  const Panels panels = plan_panels(problem, threads);
  if (threads == 1 || panels.count >= threads) {
    project_by_panels(problem, nodes, panels, threads);
  } else {
    project_by_nodes(problem, nodes, panels, threads);
  }
}

void fill_sjlt_matrix(const SjltLaw& law, uint64_t param_offset, int64_t params, float* out,
                      int num_threads) {
  if (law.width == 0 || params == 0) return;
  const float scale = sjlt_scale(law);
  const int64_t columns = static_cast<int64_t>(law.width) * law.repetitions;
  const int threads =
      std::max(1, static_cast<int>(std::min<double>(
                      num_threads, 1.0 + static_cast<double>(params) *
                                             static_cast<double>(columns) / kWorkPerThread)));
  constexpr int64_t kRows = 64;
  parallel_for(ceil_div(params, kRows), threads, [&](int, int64_t task) {
    for (int64_t p = task * kRows; p < std::min(params, (task + 1) * kRows); ++p) {
      float* row = out + p * columns;
      std::fill_n(row, columns, 0.0f);
      const uint64_t param = param_offset + static_cast<uint64_t>(p);
      for (int64_t r = 0; r < law.repetitions; ++r) {
        const SjltEntry entry = sjlt_entry(law, static_cast<uint32_t>(r), param);
        row[r * static_cast<int64_t>(law.width) + static_cast<int64_t>(entry.column)] =
            entry.plus ? scale : -scale;
      }
    }
  });
}

}  // namespace trak_ext::cpu
