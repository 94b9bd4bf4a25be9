// What this build's CUDA part is and which devices it sees; no CUDA header needed to ask.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace trak_ext::cuda {

struct DeviceInfo {
  std::string name;
  int compute_capability;  // 90 for 9.0
  int64_t memory_bytes;
};

struct Build {
  int runtime_version;  // 13000 for 13.0; the runtime is linked statically
  int driver_version;   // the newest the driver supports, 0 without a driver
  std::vector<DeviceInfo> devices;
  std::string status;  // "ok", or why there are no devices, in the runtime's words
};

Build describe_build();

}  // namespace trak_ext::cuda
