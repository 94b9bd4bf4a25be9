// The sparse kind on a device, second part: nodes' sums up the tree, and into `out`. A thread an
// output, neighbours on neighbours; there is 1/64 of the gradients to read.
#pragma once

#include "../../law/arithmetic.h"
#include "../../sjlt_problem.h"
#include "../device/device.h"

namespace trak_ext::cuda {

constexpr int kSjltFoldThreads = 256;

// sums[64 g] = the sum of sums[64 g] .. sums[64 g + 63], of those from begin to end - 1.
struct SjltGroupProblem {
  float* sums;  // [slots, outputs]
  int64_t outputs;
  int64_t begin;
  int64_t end;
};

TRAK_EXT_KERNEL(kSjltFoldThreads, 1)
sjlt_group_kernel(TRAK_EXT_KERNEL_ARGUMENT SjltGroupProblem problem) {
  const int64_t blocks = (problem.outputs + kSjltFoldThreads - 1) / kSjltFoldThreads;
  const int64_t output = device::block_index() % blocks * kSjltFoldThreads + device::thread_index();
  const int64_t first = device::block_index() / blocks * kSjltRadix;
  if (output >= problem.outputs) return;
  const int64_t begin = first < problem.begin ? problem.begin : first;
  const int64_t end = first + kSjltRadix < problem.end ? first + kSjltRadix : problem.end;
  float* const sums = problem.sums + output;
  float sum = 0.0f;
#pragma unroll 16
  for (int64_t slot = begin; slot < end; ++slot) {
    sum += device::load_global<float>(sums + slot * problem.outputs);
  }
  device::store_global<float>(sums + first * problem.outputs, sum);
}

// Adds consecutive sums of one level to the open sums of the levels above it, one after another,
// and closes what they complete. Open sums are kept in `open` from one launch to the next.
struct SjltFoldProblem {
  const float* sums;  // [count, outputs], slot_pitch apart
  int64_t slot_pitch;
  int64_t count;
  uint64_t first;  // the first one's number at its level
  int32_t levels;  // 1 to kSjltLevelsMax
  int32_t begins;  // whether nothing is open yet
  int32_t ends;    // whether the features go to `out`
  float scale;
  float* open;  // [levels, rows, columns]; not used where it both begins and ends
  int64_t rows;
  int64_t columns;
  OutputView out;
};

TRAK_EXT_DEVICE void close_levels(int closed, float (&open)[kSjltLevelsMax]) {
#pragma unroll
  for (int level = 0; level + 1 < kSjltLevelsMax; ++level) {
    if (level < closed) {
      open[level + 1] += open[level];
      open[level] = 0.0f;
    }
  }
}

TRAK_EXT_KERNEL(kSjltFoldThreads, 1)
sjlt_fold_kernel(TRAK_EXT_KERNEL_ARGUMENT SjltFoldProblem problem) {
  const int64_t output = device::block_index() * kSjltFoldThreads + device::thread_index();
  const int64_t outputs = problem.rows * problem.columns;
  if (output >= outputs) return;
  float open[kSjltLevelsMax] = {};
  if (problem.begins == 0) {
#pragma unroll
    for (int level = 0; level < kSjltLevelsMax; ++level) {
      if (level < problem.levels) {
        open[level] = device::load_global<float>(problem.open + level * outputs + output);
      }
    }
  }
  // To the end of a group of 64 at a time, so that the loop has nothing but additions.
  for (int64_t i = 0; i < problem.count;) {
    const uint64_t number = problem.first + static_cast<uint64_t>(i);
    const int64_t left = kSjltRadix - static_cast<int64_t>(number & (kSjltRadix - 1));
    const int64_t end = problem.count - i < left ? problem.count : i + left;
    float level_sum = open[0];
#pragma unroll 16
    for (; i < end; ++i) {
      level_sum += device::load_global<float>(problem.sums + i * problem.slot_pitch + output);
    }
    open[0] = level_sum;
    close_levels(sjlt_closes(problem.first + static_cast<uint64_t>(end - 1), problem.levels), open);
  }
  if (problem.ends == 0) {
#pragma unroll
    for (int level = 0; level < kSjltLevelsMax; ++level) {
      if (level < problem.levels) {
        device::store_global<float>(problem.open + level * outputs + output, open[level]);
      }
    }
    return;
  }
  // To the highest level: where there is nothing to add, adding changes nothing.
  close_levels(kSjltLevelsMax - 1, open);
  const float sum = open[kSjltLevelsMax - 1];
  float* const target = problem.out.data + output / problem.columns * problem.out.row_stride +
                        output % problem.columns * problem.out.column_stride;
  const float value = device::load_global<float>(target) + law_multiply(sum, problem.scale);
  device::store_global<float>(target, value == value ? value : law_from_bits(0x7FC00000u));
}

}  // namespace trak_ext::cuda
