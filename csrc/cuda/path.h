// Which of the projection's kernels a device gets. No CUDA here, so that the tests ask for
// themselves.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

namespace trak_ext {

enum class CudaPath : int { kPlain = 0, kMma = 1, kWgmma = 2 };
constexpr int kCudaPaths = 3;
constexpr const char* kCudaPathNames[kCudaPaths] = {"plain", "mma", "wgmma"};

// What TRAK_EXT_CUDA_PATH says (null or "": nothing, and the best there is). `best` is the last
// path that this build has for the device; those before it work there too.
inline CudaPath choose_path(const char* wanted, CudaPath best) {
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string names;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, kCudaPathNames[i]) == 0) return static_cast<CudaPath>(i);
    names += (i == 0                        ? ""
              : i == static_cast<int>(best) ? " or "
                                            : ", ") +
             std::string(kCudaPathNames[i]);
  }
  throw std::invalid_argument("TRAK_EXT_CUDA_PATH: expected " + names +
                              " for this device and build, got " + wanted);
}

}  // namespace trak_ext
