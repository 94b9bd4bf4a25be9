// The contract between the bindings and the CPU's projection by the sparse kind.
#pragma once

#include "../sjlt_problem.h"

namespace trak_ext {

void project_sjlt(const SjltProblem& problem, int num_threads);

// out[p, j] = R[param_offset + p, j] for p < params; [params, repetitions * width].
void fill_sjlt_matrix(const SjltLaw& law, uint64_t param_offset, int64_t params, float* out,
                      int num_threads);

// Rows and, of one repetition, columns: what is summed together.
struct SjltPanel {
  int64_t row_begin;
  int64_t row_end;
  uint32_t repetition;
  int64_t column_begin;
  int64_t column_end;
};

}  // namespace trak_ext
