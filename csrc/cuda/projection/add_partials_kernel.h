// The end of a launch: chunk sums are added to `out` one after another, in the order of the chunks,
// so that it makes no difference how many of them a launch had room for.
#pragma once

#include "../device/device.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

constexpr int kAddThreads = 256;

struct AddProblem {
  const float* partials;  // [chunks, rows, columns]
  int64_t chunks;
  int64_t rows;
  int64_t columns;
  OutputView out;  // [rows, columns]
};

TRAK_EXT_KERNEL(kAddThreads, 1)
add_partials_kernel(TRAK_EXT_KERNEL_ARGUMENT AddProblem problem) {
  const int64_t index = device::block_index() * kAddThreads + device::thread_index();
  const int64_t outputs = problem.rows * problem.columns;
  if (index >= outputs) return;
  float* out = problem.out.data + index / problem.columns * problem.out.row_stride +
               index % problem.columns * problem.out.column_stride;
  float sum = device::load_global<float>(out);
#pragma unroll 8
  for (int64_t chunk = 0; chunk < problem.chunks; ++chunk) {
    sum += device::load_global<float>(problem.partials + chunk * outputs + index);
  }
  device::store_global<float>(out, sum);
}

}  // namespace trak_ext::cuda
