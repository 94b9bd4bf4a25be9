// The contract between the bindings and the CPU scoring: plain structs, no torch.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace trak_ext {

// score[i, t] = weight[i] * sum_m coefficient[m, i] * <features[m][i], solved[m, t]>
// where solved holds the targets' features with the inverse kernel matrix applied.
template <class T>
struct ScoringProblem {
  int64_t num_checkpoints;
  int64_t num_train;
  int64_t num_targets;
  int64_t proj_dim;
  const void* const* features;  // a pointer a checkpoint: [num_train, proj_dim]
  DType feature_dtype;          // of all of them: T, or a half type where T is float
  const int64_t* row_strides;   // one a checkpoint, in elements
  const T* solved;              // [num_checkpoints, num_targets, proj_dim], contiguous
  const T* coefficients;        // [num_checkpoints, num_train] or null for ones
  const T* weights;             // [num_train] or null for ones
};

// out: [num_train, num_targets], contiguous.
template <class T>
void score(const ScoringProblem<T>& problem, T* out, int num_threads);

// values, indices: [num_targets, count], the largest first, ties by lower index. One pass over the
// features; num_train x num_targets is never held. Returns false if a score is NaN, when the
// outputs mean nothing. Needs count <= num_train.
template <class T>
bool top_k(const ScoringProblem<T>& problem, int64_t count, T* values, int64_t* indices,
           int num_threads);

}  // namespace trak_ext
