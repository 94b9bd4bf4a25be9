// Stands for the driver's library: what device_guard.h calls of it, for one thread.
#include <cuda.h>

extern "C" {

struct {
  int initialized;
  int context;  // i + 1 of device i, 0 for none
  int mode;
  int fails;  // what asks for the context returns this
} libcuda_state;

CUresult cuInit(unsigned) {
  libcuda_state.initialized = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  if (libcuda_state.initialized == 0) return CUDA_ERROR_NOT_INITIALIZED;
  *context = reinterpret_cast<CUcontext>(static_cast<uintptr_t>(libcuda_state.context));
  return static_cast<CUresult>(libcuda_state.fails);
}

CUresult cuCtxSetCurrent(CUcontext context) {
  libcuda_state.context = static_cast<int>(reinterpret_cast<uintptr_t>(context));
  return CUDA_SUCCESS;
}

#ifndef WITHOUT_CAPTURE_MODES
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  if (libcuda_state.initialized == 0) return CUDA_ERROR_NOT_INITIALIZED;
  const int before = libcuda_state.mode;
  libcuda_state.mode = *mode;
  *mode = static_cast<CUstreamCaptureMode>(before);
  return CUDA_SUCCESS;
}
#endif
}
