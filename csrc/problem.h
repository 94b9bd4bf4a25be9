// What a projection is, for the bindings and for the kernels of every device: plain structs, no
// torch. Addresses are of the device that the kernels run on.
#pragma once

#include <cstdint>

namespace trak_ext {

enum class Kind : int { kRademacher = 0, kNormal = 1 };
// Named as torch.set_float32_matmul_precision names them.
enum class Precision : int { kMedium = 1, kHigh = 2, kHighest = 3 };
enum class DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

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

}  // namespace trak_ext
