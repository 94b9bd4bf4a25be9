// The contract between the bindings and the CPU projection: plain structs, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace trak_ext::cpu {

// A rectangle of the output: what one thread makes at a time.
struct OutputTile {
  int64_t row_begin;
  int64_t row_end;
  int64_t column_begin;
  int64_t column_end;
};

void project(const ProjectionProblem& problem, int num_threads);

// out[p, j] = R[param_offset + p, j] for p < params.
void fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                 float* out, int num_threads);

}  // namespace trak_ext::cpu
