// Where work goes: a device by its number, and a stream of it.
#pragma once

#include <cstdint>

namespace trak_ext::cuda {

struct Queue {
  int device;
  uintptr_t stream;  // a cudaStream_t as an address
};

}  // namespace trak_ext::cuda
