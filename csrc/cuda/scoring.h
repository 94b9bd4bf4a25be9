// The contract between the bindings and the CUDA scoring; no CUDA header needed to call it.
// Failures of the CUDA runtime are std::runtime_error, a workspace that is too small is
// std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"
#include "projection.h"

namespace trak_ext {

// score[i, t] = weight[i] * sum_m coefficient[m, i] * <features[m][i], solved[m, t]>
// where solved holds the targets' features with the inverse kernel matrix applied. T is float, with
// features of fp32, fp16 or bf16, or double, with features of any dtype.
template <class T>
struct CudaScoringProblem {
  int64_t num_checkpoints;
  int64_t num_train;
  int64_t num_targets;
  int64_t proj_dim;
  const void* const* features;  // a pointer a checkpoint: [num_train, proj_dim]; host memory
  DType feature_dtype;          // of all of them
  const int64_t* row_strides;   // one a checkpoint, in elements; host memory
  const T* solved;              // [num_checkpoints, num_targets, proj_dim], contiguous
  const T* coefficients;        // [num_checkpoints, num_train] or null for ones
  const T* weights;             // [num_train] or null for ones
  int parts;                    // bf16 parts of an fp32 number: 1, 2 or 3; of no effect on double
};

// At a multiple of 16 bytes.
struct ScoringWorkspace {
  char* data;
  int64_t bytes;
};

// What scores (count 0) or the best `count` of each target can use, `limit` at most, unless the
// least that they can do with is more: for 64 targets the bf16 parts of one checkpoint, at most
// 6 bytes a feature, and for the best also their lists, 12 or 16 bytes a place, and 1024 scores.
template <class T>
int64_t cuda_scoring_workspace_bytes(const CudaScoringProblem<T>& problem, int64_t count,
                                     int64_t limit);

// Both only add work to the stream: they allocate nothing and wait for nothing. `path`: "plain", or
// "mma" for T = float where the build has matrix instructions for the device.
// out[i * row_stride + t * target_stride] = score[i, t].
template <class T>
void cuda_score(const CudaScoringProblem<T>& problem, const std::string& path, T* out,
                int64_t row_stride, int64_t target_stride, const ScoringWorkspace& workspace,
                const CudaQueue& queue);
// values, indices: [num_targets, count], the largest first, ties by lower index; num_train x
// num_targets is never held. They mean nothing if *not_a_number, which must be 0 before, becomes 1.
// Needs count <= num_train and count <= kCudaTopKMax.
constexpr int64_t kCudaTopKMax = 1024;
template <class T>
void cuda_top_k(const CudaScoringProblem<T>& problem, const std::string& path, int64_t count,
                T* values, int64_t* indices, int32_t* not_a_number,
                const ScoringWorkspace& workspace, const CudaQueue& queue);

}  // namespace trak_ext
