// The sparse matrix itself, for inspection: zeros first, then a thread an entry that is none.
#pragma once

#include "../../law/arithmetic.h"
#include "../../sjlt_problem.h"
#include "../device/device.h"

namespace trak_ext::cuda {

constexpr int kSjltMatrixThreads = 256;

struct SjltMatrixProblem {
  SjltLaw law;
  uint64_t param_offset;
  int64_t params;
  float scale;
  float* out;  // [params, repetitions * width]
};

TRAK_EXT_KERNEL(kSjltMatrixThreads, 1)
sjlt_zero_kernel(TRAK_EXT_KERNEL_ARGUMENT SjltMatrixProblem problem) {
  const int64_t index = device::block_index() * kSjltMatrixThreads + device::thread_index();
  const int64_t columns = problem.law.repetitions * static_cast<int64_t>(problem.law.width);
  if (index < problem.params * columns) device::store_global<float>(problem.out + index, 0.0f);
}

TRAK_EXT_KERNEL(kSjltMatrixThreads, 1)
sjlt_entry_kernel(TRAK_EXT_KERNEL_ARGUMENT SjltMatrixProblem problem) {
  const int64_t index = device::block_index() * kSjltMatrixThreads + device::thread_index();
  if (index >= problem.params * problem.law.repetitions) return;
  const int64_t row = index / problem.law.repetitions;
  const auto repetition = static_cast<uint32_t>(index % problem.law.repetitions);
  const SjltEntry entry =
      sjlt_entry(problem.law, repetition, problem.param_offset + static_cast<uint64_t>(row));
  const int64_t columns = problem.law.repetitions * static_cast<int64_t>(problem.law.width);
  device::store_global<float>(
      problem.out + row * columns +
          static_cast<int64_t>(repetition * problem.law.width + entry.column),
      entry.plus ? problem.scale : -problem.scale);
}

}  // namespace trak_ext::cuda
