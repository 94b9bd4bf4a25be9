// Element types of tensors that come from Python.
#pragma once

namespace trak_ext {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace trak_ext
