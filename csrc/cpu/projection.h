// The contract between the bindings and the CPU projection: plain structs, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace trak_ext {

enum class Kind : int { kRademacher = 0, kNormal = 1 };
enum class Precision : int { kMedium = 0, kHigh = 1, kHighest = 2 };

// The law's arguments: matrix entry (p, j) is a function of these, p and j alone.
struct MatrixLaw {
  Kind kind;
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t model_id;
};

// One gradient tensor, [rows, params], any strides (in elements).
struct GradientView {
  const void* data;
  DType dtype;
  int64_t params;
  int64_t row_stride;
  int64_t param_stride;
  uint64_t param_offset;  // row of the matrix that meets the first parameter
};

// [rows, columns] fp32, any strides (in elements).
struct OutputView {
  float* data;
  int64_t row_stride;
  int64_t column_stride;
};

// A rectangle of the output: what one thread makes at a time.
struct OutputTile {
  int64_t row_begin;
  int64_t row_end;
  int64_t column_begin;
  int64_t column_end;
};

// out[b, j] += sum_p g[b, p] R[p, j] for every tensor in turn.
struct ProjectionProblem {
  MatrixLaw law;
  Precision precision;
  const GradientView* grads;
  int64_t num_grads;
  int64_t rows;
  int64_t proj_dim;
  OutputView out;
};

void project(const ProjectionProblem& problem, int num_threads);

// out[p, j] = R[param_offset + p, j] for p < params.
void fill_matrix(const MatrixLaw& law, uint64_t param_offset, int64_t params, int64_t proj_dim,
                 float* out, int num_threads);

}  // namespace trak_ext
