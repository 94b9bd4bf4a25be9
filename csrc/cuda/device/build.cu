#include <cuda_runtime_api.h>

#include "build.h"

namespace trak_ext::cuda {

Build describe_build() {
  Build build = {CUDART_VERSION, 0, {}, "ok"};
  // Without a driver this leaves 0; the call below then says why.
  (void)cudaDriverGetVersion(&build.driver_version);
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, i);
    if (error == cudaSuccess) {
      build.devices.push_back({properties.name, properties.major * 10 + properties.minor,
                               static_cast<int64_t>(properties.totalGlobalMem)});
    }
  }
  if (error != cudaSuccess) build.status = cudaGetErrorString(error);
  (void)cudaGetLastError();  // leave no error behind for the next caller
  return build;
}

}  // namespace trak_ext::cuda
