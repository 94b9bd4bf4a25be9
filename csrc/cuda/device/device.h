// The few operations that kernels take from the device. There are two sets of them: the device's
// own (device_cuda.h), and one that runs the same kernel source on the host, a fiber a thread, so
// that the kernels can be tested where there is no GPU (tests/helpers/cuda_host/device_host.h).
#pragma once

#include <cstdint>

namespace trak_ext::cuda {

// What moves in one access; the alignment is what makes it one.
struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace trak_ext::cuda

#if defined(__CUDACC__)
#include "device_cuda.h"
#else
#include "device_host.h"
#endif
