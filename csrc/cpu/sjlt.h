// The contract between the bindings and the CPU's projection by the sparse kind.
#pragma once

#include "../sjlt_problem.h"

namespace trak_ext::cpu {

void project_sjlt(const SjltProblem& problem, int num_threads);

// out[p, j] = R[param_offset + p, j] for p < params; [params, repetitions * width].
void fill_sjlt_matrix(const SjltLaw& law, uint64_t param_offset, int64_t params, float* out,
                      int num_threads);

// The first tensor that ends behind `param`, or num_grads.
inline int64_t sjlt_tensor_behind(const SjltProblem& problem, uint64_t param) {
  int64_t low = 0, high = problem.num_grads;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const GradientView& grads = problem.grads[middle];
    if (grads.param_offset + static_cast<uint64_t>(grads.params) <= param) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether a tensor has a parameter of [begin, end).
inline bool sjlt_touches(const SjltProblem& problem, uint64_t begin, uint64_t end) {
  const int64_t t = sjlt_tensor_behind(problem, begin);
  return t < problem.num_grads && problem.grads[t].param_offset < end;
}

// Rows and, of one repetition, columns: what is summed together.
struct SjltPanel {
  int64_t row_begin;
  int64_t row_end;
  uint32_t repetition;
  int64_t column_begin;
  int64_t column_end;
};

// A panel's columns at most: its signs and a row of its sums stay in the caches while its rows
// pass.
constexpr int64_t kSjltPanelColumns = 4096;

// From one row of a panel's sums to the next: whole vectors of any level.
constexpr int64_t sjlt_pitch(const SjltPanel& panel) {
  return (panel.column_end - panel.column_begin + 15) / 16 * 16;
}

}  // namespace trak_ext::cpu
