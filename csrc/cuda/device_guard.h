// The device that work goes to, for the time of a call, and what it can run.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace trak_ext {

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Makes a device the current one, and the one before it current again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const cudaError_t error = cudaGetDevice(&before_);
    if (error == cudaErrorInsufficientDriver) {
      int driver = 0;
      (void)cudaDriverGetVersion(&driver);
      (void)cudaGetLastError();
      throw std::runtime_error(driver == 0
                                   ? std::string("CUDA: no driver is installed")
                                   : "CUDA: the driver supports CUDA " + version_text(driver) +
                                         ", and this build needs one that supports " +
                                         version_text(CUDART_VERSION));
    }
    device::check(error, "cudaGetDevice");
    if (device != before_) device::check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  device::check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int compute_capability(int device) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// The architecture that a kernel's code was written for, which is not the device's where the driver
// compiled it from PTX. Throws where the build has no code for the device.
template <class Kernel>
int code_architecture(Kernel kernel, int device) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    (void)cudaGetLastError();
    const int found = compute_capability(device);
    throw std::runtime_error("CUDA: this build has code for architectures " +
                             std::string(TRAK_EXT_CUDA_ARCHITECTURES) +
                             ", and none that runs on compute capability " +
                             std::to_string(found / 10) + "." + std::to_string(found % 10));
  }
  device::check(error, "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

// Registers a thread, of a kernel that the current device has code for.
template <class Kernel>
int register_count(Kernel kernel) {
  cudaFuncAttributes attributes;
  device::check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.numRegs;
}

}  // namespace trak_ext
