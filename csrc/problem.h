// What a projection is, for the bindings and for the kernels of every device: plain structs, no
// torch. Addresses are of the device that the kernels run on.
#pragma once

#include <cstdint>

#include "law/platform.h"

namespace trak_ext {

enum class Kind : int { kRademacher = 0, kNormal = 1 };
// Named as torch.set_float32_matmul_precision names them.
enum class Precision : int { kMedium = 1, kHigh = 2, kHighest = 3 };
// Bf16 parts that matrix instructions multiply of an fp32 number.
TRAK_EXT_LAW constexpr int bf16_parts(Precision precision) { return static_cast<int>(precision); }
enum class DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

TRAK_EXT_LAW constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

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

// out[b, j] += sum_p g[b, p] R[p, j] for every tensor in turn.
struct ProjectionProblem {
  MatrixLaw law;
  const GradientView* grads;
  int64_t num_grads;
  int64_t rows;
  int64_t proj_dim;
  OutputView out;
  Precision precision;
};

// score[i, t] = weight[i] * sum_m coefficient[m, i] * <features[m][i], solved[m, t]>
// where solved holds the targets' features with the inverse kernel matrix applied. T is float, with
// features of fp32, fp16 or bf16, or double, with features of any dtype.
template <class T>
struct ScoringProblem {
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
  Precision precision;          // of fp32 on CUDA; of no effect elsewhere
};

}  // namespace trak_ext
