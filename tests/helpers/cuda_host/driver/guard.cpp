// The device guard as it is, over a double of the runtime here and of the driver's library beside
// it (libcuda.cpp), which it finds by name as on a machine with a GPU.
#include <string>

#define TRAK_EXT_CUDA_ARCHITECTURES ""
#include "device/device_guard.h"

extern "C" {

extern struct {
  int initialized, context, mode, fails;
} libcuda_state;

struct {
  int error;   // of cudaGetDevice
  int driver;  // the CUDA version it supports, or 0 for none
  int sets;    // how often a device was chosen
} runtime_state;

cudaError_t cudaGetDevice(int* device) {
  *device = libcuda_state.context == 0 ? 0 : libcuda_state.context - 1;
  return static_cast<cudaError_t>(runtime_state.error);
}
cudaError_t cudaSetDevice(int device) {
  if (device > 7) return cudaErrorInvalidDevice;
  ++runtime_state.sets;
  libcuda_state.context = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime_state.driver;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "what the runtime says"; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

// Guards `device`, with these states before: those meanwhile, or the error.
const char* host_guard(int error, int driver, int context, int fails, int device, int* meanwhile) {
  static std::string message;
  runtime_state = {error, driver, 0};
  libcuda_state = {libcuda_state.initialized, context, 1, fails};
  try {
    const trak_ext::cuda::DeviceGuard guard(device);
    meanwhile[0] = libcuda_state.context;
    meanwhile[1] = libcuda_state.mode;
  } catch (const std::exception& caught) {
    message = caught.what();
    return message.c_str();
  }
  return nullptr;
}

// The context and the mode now, and how often a device was chosen.
void host_state(int* state) {
  state[0] = libcuda_state.context;
  state[1] = libcuda_state.mode;
  state[2] = runtime_state.sets;
}
}
