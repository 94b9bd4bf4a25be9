// The kernels' paths by name. Which one a call takes is chosen in Python (trak_ext/cuda_paths.py)
// and comes as an argument. No CUDA here, so that the tests ask for themselves.
#pragma once

#include <stdexcept>
#include <string>

namespace trak_ext::cuda {

enum class Path : int { kPlain = 0, kMma = 1, kWgmma = 2 };
constexpr int kPaths = 3;
constexpr const char* kPathNames[kPaths] = {"plain", "mma", "wgmma"};

// The path of that name. `best` is the last path that this build has for the device; those before
// it work there too.
inline Path find_path(const std::string& wanted, Path best) {
  std::string names;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (wanted == kPathNames[i]) return static_cast<Path>(i);
    names += (i == 0                        ? ""
              : i == static_cast<int>(best) ? " or "
                                            : ", ") +
             std::string(kPathNames[i]);
  }
  throw std::invalid_argument("path: expected " + names + " for this device and build, got " +
                              wanted);
}

}  // namespace trak_ext::cuda
