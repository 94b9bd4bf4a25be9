// The kernels' paths by name. Which one a call takes is chosen in Python (trak_ext/cuda_paths.py)
// and comes as an argument. No CUDA here, so that the tests ask for themselves.
#pragma once

#include <stdexcept>
#include <string>

namespace trak_ext {

enum class CudaPath : int { kPlain = 0, kMma = 1, kWgmma = 2 };
constexpr int kCudaPaths = 3;
constexpr const char* kCudaPathNames[kCudaPaths] = {"plain", "mma", "wgmma"};

// The path of that name. `best` is the last path that this build has for the device; those before
// it work there too.
inline CudaPath find_path(const std::string& wanted, CudaPath best) {
  std::string names;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (wanted == kCudaPathNames[i]) return static_cast<CudaPath>(i);
    names += (i == 0                        ? ""
              : i == static_cast<int>(best) ? " or "
                                            : ", ") +
             std::string(kCudaPathNames[i]);
  }
  throw std::invalid_argument("path: expected " + names + " for this device and build, got " +
                              wanted);
}

}  // namespace trak_ext
