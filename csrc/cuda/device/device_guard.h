// The device that work goes to, for the time of a call, and what it can run.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "current_device.h"
#include "device.h"

namespace trak_ext::cuda {

inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Throws where the driver is not there or too old for this build.
inline void check_driver() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
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
}

// What CurrentDevice asks of CUDA. The driver's own functions come from the library that the
// runtime has loaded: nothing is linked, so that the extension imports where there is no driver.
struct CudaDriver {
  using Context = CUcontext;
  using CaptureMode = CUstreamCaptureMode;
  static constexpr CaptureMode kRelaxed = CU_STREAM_CAPTURE_MODE_RELAXED;

  static Context context() {
    Context context = nullptr;
    check(functions().get_context(&context), "cuCtxGetCurrent");
    return context;
  }
  static void set_context(Context context) { (void)functions().set_context(context); }
  static int device() {
    int device = 0;
    device::check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
  }
  static void set_device(int device) { device::check(cudaSetDevice(device), "cudaSetDevice"); }
  // Fails where work before has failed, which the calls that follow say better. Must not throw
  // after its first call, since a destructor calls it.
  static CaptureMode exchange_capture_mode(CaptureMode mode) {
    (void)functions().exchange_mode(&mode);
    return mode;
  }

 private:
  struct Functions {
    decltype(&cuInit) init = find<decltype(&cuInit)>("cuInit");
    decltype(&cuCtxGetCurrent) get_context = find<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
    decltype(&cuCtxSetCurrent) set_context = find<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
    decltype(&cuThreadExchangeStreamCaptureMode) exchange_mode =
        find<decltype(&cuThreadExchangeStreamCaptureMode)>("cuThreadExchangeStreamCaptureMode");

    Functions() { check(init(0), "cuInit"); }
  };
  static const Functions& functions() {
    static const Functions functions;
    return functions;
  }
  template <class Function>
  static Function find(const char* name) {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);  // a count up on what is there
    void* found = library == nullptr ? nullptr : dlsym(library, name);
    if (found == nullptr) {
      throw std::runtime_error("CUDA: libcuda.so.1 has no " + std::string(name));
    }
    return reinterpret_cast<Function>(found);
  }
  static void check(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    throw std::runtime_error("CUDA: " + std::string(what) + " failed: error " +
                             std::to_string(static_cast<int>(result)));
  }
};

// Makes a device the current one for a call; see current_device.h.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : current_((check_driver(), device)) {}

 private:
  const CurrentDevice<CudaDriver> current_;
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

}  // namespace trak_ext::cuda
