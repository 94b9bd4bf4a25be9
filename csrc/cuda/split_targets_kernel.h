// Splits the targets of a launch into bf16 parts, once, in the order in which the scoring kernel's
// lanes read them: packed[target tile][checkpoint][step][part][pair of 8 targets][lane][16 bytes].
// Lane (g, t) has, of targets g and g + 8 of a pair, features 4t .. 4t + 3 of the step. Targets and
// features that do not exist are zero.
#pragma once

#include "device.h"
#include "scoring_launch.h"
#include "split_nearest.h"

namespace trak_ext {

constexpr int kSplitThreads = 256;

inline int64_t packed_bytes(int64_t targets, int64_t tile_targets, int64_t proj_dim, int parts) {
  return (targets + tile_targets - 1) / tile_targets * tile_targets *
         ((proj_dim + kStepFeatures - 1) / kStepFeatures) * kStepFeatures * parts * 2;
}

template <int kParts, int kPairs>
TRAK_EXT_KERNEL(kSplitThreads, 1)
split_targets_kernel(TRAK_EXT_KERNEL_ARGUMENT ScoringLaunch<float> launch) {
  const int64_t steps = (launch.proj_dim + kStepFeatures - 1) / kStepFeatures;
  int64_t rest = device::block_index() * kSplitThreads + device::thread_index();
  const int lane = static_cast<int>(rest % 32);
  rest /= 32;
  const int pair = static_cast<int>(rest % kPairs);
  rest /= kPairs;
  const int64_t step_of_all = rest;
  const int64_t step = rest % steps;
  rest /= steps;
  const int64_t checkpoint = rest % launch.checkpoints;
  const int64_t tile = rest / launch.checkpoints;
  if (tile * kPairs * 16 >= launch.targets) return;

  Words4 parts[kParts];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t target = (tile * kPairs + pair) * 16 + half * 8 + lane / 4;
    const int64_t feature = step * kStepFeatures + lane % 4 * 4;
    const float* from =
        launch.solved +
        (checkpoint * launch.num_targets + launch.first_target + target) * launch.proj_dim +
        feature;
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = target < launch.targets && feature + i < launch.proj_dim;
      values[i] = exists ? device::load_global<float>(from + i) : 0.0f;
    }
    uint32_t first[kParts], second[kParts];
    split_nearest(values[0], values[1], first);
    split_nearest(values[2], values[3], second);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      parts[part].word[2 * half] = first[part];
      parts[part].word[2 * half + 1] = second[part];
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int64_t piece = ((step_of_all * kParts + part) * kPairs + pair) * 32 + lane;
    device::store_global<Words4>(launch.packed + piece * 16, parts[part]);
  }
}

}  // namespace trak_ext
