// The contract between the bindings and the CPU scoring: plain structs, no torch.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace trak_ext::cpu {

// out: [num_train, num_targets], contiguous.
template <class T>
void score(const ScoringProblem<T>& problem, T* out, int num_threads);

// values, indices: [num_targets, count], the largest first, ties by lower index. One pass over the
// features; num_train x num_targets is never held. Returns false if a score is NaN, when the
// outputs mean nothing. Needs count <= num_train.
template <class T>
bool top_k(const ScoringProblem<T>& problem, int64_t count, T* values, int64_t* indices,
           int num_threads);

}  // namespace trak_ext::cpu
