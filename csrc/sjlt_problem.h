// What a projection by the sparse kind is, for the bindings and the kernels of every device, and
// what the devices share of its sum: plain structs, no torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "law/sjlt.h"
#include "problem.h"

namespace trak_ext {

// out[b, j] += sum_p g[b, p] R[p, j], one sum over all tensors, in the order of the law. Tensors
// follow one another in the matrix, on CUDA without a gap. On the CPU there may be some: gradients
// of the parameters in them are zero, which changes no sum.
struct SjltProblem {
  SjltLaw law;
  const GradientView* grads;
  int64_t num_grads;
  int64_t rows;
  OutputView out;  // [rows, repetitions * width]
};

static inline float sjlt_scale(const SjltLaw& law) {
  return static_cast<float>(std::sqrt(static_cast<double>(law.width)));
}

// The tree's lowest sums are those of its nodes, 64 chunks each.
static inline uint64_t sjlt_node(const SjltLaw& law, uint64_t param) {
  return param / law.width >> kSjltRadixLog2;
}

// Where the parameters of a problem lie.
struct SjltRange {
  uint64_t begin, end;
};

TRAK_EXT_LAW SjltRange sjlt_range(const SjltProblem& problem) {
  if (problem.num_grads == 0) return {0, 0};
  const GradientView& last = problem.grads[problem.num_grads - 1];
  return {problem.grads[0].param_offset, last.param_offset + static_cast<uint64_t>(last.params)};
}

// Which nodes a projection touches, and how many levels above them are worth summing: those below
// the one that is a single number.
constexpr int kSjltLevelsMax = 10;  // a node's number has 57 bits
struct SjltNodes {
  uint64_t first;
  uint64_t last;
  int levels;  // 1 to kSjltLevelsMax; 0 where there is nothing to sum
};

static inline SjltNodes sjlt_nodes(const SjltProblem& problem) {
  const SjltRange range = sjlt_range(problem);
  if (range.begin == range.end || problem.law.width == 0) return {0, 0, 0};
  SjltNodes nodes = {sjlt_node(problem.law, range.begin), sjlt_node(problem.law, range.end - 1), 1};
  while (nodes.first >> (kSjltRadixLog2 * nodes.levels) !=
         nodes.last >> (kSjltRadixLog2 * nodes.levels)) {
    ++nodes.levels;
  }
  return nodes;
}

// How many levels a node closes: after it, that many open sums go up into the next one.
TRAK_EXT_LAW int sjlt_closes(uint64_t node, int levels) {
  int closed = 0;
  while (closed + 1 < levels && (~node & (kSjltRadix - 1)) == 0) {
    node >>= kSjltRadixLog2;
    ++closed;
  }
  return closed;
}

}  // namespace trak_ext
