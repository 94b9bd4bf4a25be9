// The contract between the bindings and the CUDA scoring; no CUDA header needed to call it.
// Failures of the CUDA runtime are std::runtime_error, a workspace that is too small is
// std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>

#include "../../problem.h"
#include "../device/queue.h"

namespace trak_ext::cuda {

// At a multiple of 16 bytes.
struct ScoringWorkspace {
  char* data;
  int64_t bytes;
};

// What scores (count 0) or the best `count` of each target can use, `limit` at most, unless the
// least that they can do with is more: for 64 targets the bf16 parts of one checkpoint, at most
// 6 bytes a feature (of a multiple of 64), and for the best also their lists, 12 or 16 bytes a
// place, and 1024 scores.
template <class T>
int64_t scoring_workspace_bytes(const ScoringProblem<T>& problem, int64_t count, int64_t limit);

// Both only add work to the stream: they allocate nothing and wait for nothing. `path`: "plain", or
// "mma" for T = float where the build has matrix instructions for the device.
// out[i * row_stride + t * target_stride] = score[i, t].
template <class T>
void score(const ScoringProblem<T>& problem, const std::string& path, T* out, int64_t row_stride,
           int64_t target_stride, const ScoringWorkspace& workspace, const Queue& queue);
// values, indices: [num_targets, count], the largest first, ties by lower index; num_train x
// num_targets is never held. They mean nothing if *not_a_number, which must be 0 before, becomes 1.
// Needs count <= num_train and count <= kTopKMax.
constexpr int64_t kTopKMax = 1024;
template <class T>
void top_k(const ScoringProblem<T>& problem, const std::string& path, int64_t count, T* values,
           int64_t* indices, int32_t* not_a_number, const ScoringWorkspace& workspace,
           const Queue& queue);

}  // namespace trak_ext::cuda
