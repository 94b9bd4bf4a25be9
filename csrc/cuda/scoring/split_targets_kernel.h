// Splits the targets of a launch into bf16 parts, once, in the order in which a scoring kernel
// reads them. Targets and features that do not exist are zero.
#pragma once

#include "../device/device.h"
#include "../device/split_nearest.h"
#include "scoring_launch.h"
#include "scoring_stages.h"

namespace trak_ext::cuda {

constexpr int kSplitThreads = 256;

// Bytes of targets' parts; the features of a checkpoint are filled up to a multiple of some.
inline int64_t packed_bytes(int64_t targets, int64_t tile_targets, int64_t proj_dim,
                            int64_t multiple, int parts) {
  return (targets + tile_targets - 1) / tile_targets * tile_targets *
         ((proj_dim + multiple - 1) / multiple) * multiple * parts * 2;
}

// Features that a thread of a kernel splits of a target.
constexpr int kSplitFeatures = 8;
constexpr int kSplitOperandFeatures = kStepFeatures;

// For scoring_kernel.h: packed[target tile][checkpoint][step][part][pair of 8 targets][lane][16
// bytes]. Lane (g, t) has, of targets g and g + 8 of a pair, features 4t .. 4t + 3 of the step.
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

// For scoring_warpgroup_kernel.h: packed[target tile][checkpoint][step][part][half][8 targets][8
// bf16]. Half 0 has features 4t and 4t + 1 of the step for each t < 4, half 1 has 4t + 2 and 4t +
// 3: what a lane's registers meet.
template <int kParts, int kTileTargets>
TRAK_EXT_KERNEL(kSplitThreads, 1)
split_operand_kernel(TRAK_EXT_KERNEL_ARGUMENT ScoringLaunch<float> launch) {
  const int64_t steps = launch.stages * int64_t{kStageSteps};
  int64_t rest = device::block_index() * kSplitThreads + device::thread_index();
  const int64_t item = rest;
  const int of_tile = static_cast<int>(rest % kTileTargets);
  rest /= kTileTargets;
  const int64_t step = rest % steps;
  rest /= steps;
  const int64_t checkpoint = rest % launch.checkpoints;
  const int64_t target = rest / launch.checkpoints * kTileTargets + of_tile;
  if (target - of_tile >= launch.targets) return;

  const int64_t feature = step * kStepFeatures;
  const float* from =
      launch.solved +
      (checkpoint * launch.num_targets + launch.first_target + target) * launch.proj_dim + feature;
  const int64_t left = target < launch.targets ? launch.proj_dim - feature : 0;
  float values[kStepFeatures];
#pragma unroll
  for (int i = 0; i < kStepFeatures; ++i) {
    values[i] = i < left ? device::load_global<float>(from + i) : 0.0f;
  }
  Words4 parts[kParts][2];  // [part][half]
#pragma unroll
  for (int pair = 0; pair < kStepFeatures / 2; ++pair) {
    uint32_t split[kParts];
    split_nearest(values[2 * pair], values[2 * pair + 1], split);
#pragma unroll
    for (int part = 0; part < kParts; ++part) parts[part][pair % 2].word[pair / 2] = split[part];
  }
  char* to = launch.packed + (item / kTileTargets * kParts * 2 * kTileTargets + of_tile) * 16;
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    device::store_global<Words4>(to + i * kTileTargets * 16, parts[i / 2][i % 2]);
  }
}

}  // namespace trak_ext::cuda
