// Scores by the warpgroup's matrix instruction (sm_90a): features [64, 16] in registers times
// targets [16, kTargets] that the tensor core reads from shared memory by itself.
//
// As in scoring_kernel.h a lane splits the features that it multiplies, (g, t) having features 4t
// .. 4t + 3 of a step, and the sums have the same terms in the same order: products of parts from
// the smallest on, step by step, and after kFlushSteps of them one fp32 addition.
#pragma once

#include "../device/device.h"
#include "../device/element.h"
#include "../device/split_nearest.h"
#include "scoring_launch.h"
#include "scoring_stages.h"

namespace trak_ext::cuda {

constexpr int kSharedBytesOfSm90 = 227 * 1024;  // of a block; every further one costs 1 KiB
constexpr int kSlotsMax = 8;

// The shape of a block's tile: kWarpgroups times 64 samples. Shapes differ in speed, never in the
// order of summing.
template <DType kDType_, int kParts_, int kTargets_, int kWarpgroups_, int kBlocksPerSm_>
struct WarpgroupScoringTile {
  static constexpr DType kDType = kDType_;
  static constexpr int kTargetParts = kParts_;
  static constexpr int kFeatureParts = kParts_ < parts_of(kDType_) ? kParts_ : parts_of(kDType_);
  static constexpr int kTargets = kTargets_;
  static constexpr int kTargetTiles = kTargets_ / 8;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 128 * kWarpgroups_;
  static constexpr int kRows = 64 * kWarpgroups_;
  static constexpr int kElementBytes = kDType == DType::kFloat32 ? 4 : 2;
  // The lanes of an access have consecutive rows of a step; copies have both steps of a row, which
  // the pad keeps in different banks.
  static constexpr int kStepFeatureBytes = kRows * kStepFeatures * kElementBytes + 64;
  static constexpr int kFeatureBytes = kStageSteps * kStepFeatureBytes;  // a stage
  // Core matrices of 8 targets and 8 places of the summed index, 16 bytes a target: [kStageSteps,
  // kParts, 2 halves of the step, kTargetTiles, 8 targets] of 16 bytes.
  static constexpr int kCoreBytes = 128;
  static constexpr int kHalfBytes = kTargetTiles * kCoreBytes;
  static constexpr int kPartBytes = 2 * kHalfBytes;
  static constexpr int kStepBytes = kParts_ * kPartBytes;
  static constexpr int kTargetBytes = kStageSteps * kStepBytes;  // a stage
  static constexpr int kSlotBytes = kFeatureBytes + kTargetBytes;
  static constexpr int kScaleBytes = 8 * kThreads;
  static constexpr int kSlotsThatFit =
      ((kSharedBytesOfSm90 - (kBlocksPerSm - 1) * 1024) / kBlocksPerSm - kScaleBytes) /
      (kSlotBytes + 8);
  static constexpr int kSlots = kSlotsThatFit < kSlotsMax ? kSlotsThatFit : kSlotsMax;
  static constexpr int kSharedBytes = kSlots * (kSlotBytes + 8) + kScaleBytes;
  // Three parts are wanted for accuracy: their sums leave after every step.
  static constexpr int kFlushSteps = kParts_ == 3 ? 1 : cuda::kFlushSteps;
  static_assert(kSlots >= 3, "one slot is multiplied, one may still be, one is filled");
  // Whether products leave only when the next step's features are wanted, so that the tensor cores
  // work on them across a barrier; with two or three parts of the features in flight as well as
  // three of the targets registers are too short for that.
  static constexpr bool kFlushesLate = kParts_ < 3 || kFeatureParts == 1;
  // Stages that a turn of the main loop multiplies: no products outlast it.
  static constexpr int kTurnStages = kFlushSteps > kStageSteps ? kFlushSteps / kStageSteps : 1;
  static_assert(kPeriodStages % kTurnStages == 0, "every turn is a whole one");
};

template <class Tile>
using WarpgroupSums = float[Tile::kTargetTiles][4];

// The lane's features of a step as the instruction's first operand, part by part.
template <class Tile>
TRAK_EXT_DEVICE void load_features(const char* slot, int step,
                                   uint32_t (&a)[Tile::kFeatureParts][4]) {
  const int row = device::thread_index() / 32 * 16 + device::thread_index() % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const char* quad =
        slot + ScoringStages<Tile>::quad_offset(row + 8 * i, step, device::thread_index() % 4);
    if constexpr (Tile::kDType == DType::kBFloat16) {
      const auto words = device::load_shared<Words2>(quad);
      a[0][i] = words.word[0];
      a[0][2 + i] = words.word[1];
    } else {
      float values[4];
      load_quad(quad, Tile::kDType, values);
      uint32_t first[Tile::kFeatureParts], second[Tile::kFeatureParts];
      split_nearest(values[0], values[1], first);
      split_nearest(values[2], values[3], second);
#pragma unroll
      for (int part = 0; part < Tile::kFeatureParts; ++part) {
        a[part][i] = first[part];
        a[part][2 + i] = second[part];
      }
    }
  }
}

// Starts the products of a step; the first of them sets `products` where nothing is to be added to.
template <class Tile>
TRAK_EXT_DEVICE void start_step(uint64_t operand, bool sets, uint32_t (&a)[Tile::kFeatureParts][4],
                                WarpgroupSums<Tile>& products) {
  device::begin_multiply(a, products);
  bool add = !sets;
  // The smallest products first: what an addition truncates is a part of the sum so far.
#pragma unroll
  for (int both = Tile::kTargetParts - 1; both >= 0; --both) {
#pragma unroll
    for (int i = 0; i < Tile::kFeatureParts; ++i) {
      const int j = both - i;
      if (j < 0) continue;
      device::multiply_async<Tile::kTargets>(
          products, a[i], device::move_operand(operand, j * Tile::kPartBytes), add);
      add = true;
    }
  }
  device::commit_multiplied();
}

// Where the scores of a lane are: (g, t) has samples g and g + 8 (half 0 and 1 of its sums), and
// targets 2t and 2t + 1 of every eight.
struct ScoresOfLane {
  int samples;     // from its first on, that exist; 0 or less for none
  int targets;     // the same
  int64_t sample;  // its first
  float* out;      // the score of its first sample and target

  TRAK_EXT_DEVICE ScoresOfLane(const ScoringLaunch<float>& launch, const ScoringBlock& block) {
    const auto thread = static_cast<unsigned>(device::thread_index());
    const unsigned row = thread / 32 * 16 + thread % 32 / 4, first_target = thread % 4 * 2;
    samples = block.rows - static_cast<int>(row);
    targets = block.targets - static_cast<int>(first_target);
    sample = launch.first_row + block.row + row;
    out = launch.out + (block.row + row) * launch.out_row_stride +
          (block.target + first_target) * launch.out_target_stride;
  }
};

template <class Tile>
TRAK_EXT_DEVICE void load_sums(const ScoringLaunch<float>& launch, int tile,
                               WarpgroupSums<Tile>& sums) {
#pragma unroll
  for (int n = 0; n < Tile::kTargetTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
  if (!launch.add) return;
  const ScoresOfLane scores(launch, locate_scoring_tile(launch, tile, Tile::kRows, Tile::kTargets));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* from = scores.out + 8 * half * launch.out_row_stride;
#pragma unroll
    for (int n = 0; n < Tile::kTargetTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * half < scores.samples && 8 * n + i < scores.targets) {
          sums[n][2 * half + i] = device::load_global<float>(from + i * launch.out_target_stride);
        }
      }
      from += 8 * launch.out_target_stride;
    }
  }
}

template <class Tile>
TRAK_EXT_DEVICE void store_sums(const ScoringLaunch<float>& launch, int tile,
                                WarpgroupSums<Tile>& sums) {
  const ScoresOfLane scores(launch, locate_scoring_tile(launch, tile, Tile::kRows, Tile::kTargets));
  // Two targets at a time where they are neighbours in memory.
  const bool pairs = launch.out_target_stride == 1 && launch.out_row_stride % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(launch.out) % 8 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half >= scores.samples) continue;
    float* to = scores.out + 8 * half * launch.out_row_stride;
    const float weight = launch.weights
                             ? device::load_global<float>(launch.weights + scores.sample + 8 * half)
                             : 1.0f;
#pragma unroll
    for (int n = 0; n < Tile::kTargetTiles; ++n) {
      const float first = weight * sums[n][2 * half], second = weight * sums[n][2 * half + 1];
      if (pairs && 8 * n + 1 < scores.targets) {
        device::store_global<Words2>(to, {{law_bits(first), law_bits(second)}});
      } else {
        if (8 * n < scores.targets) device::store_global<float>(to, first);
        if (8 * n + 1 < scores.targets) {
          device::store_global<float>(to + launch.out_target_stride, second);
        }
      }
      to += 8 * launch.out_target_stride;
    }
  }
}

// The checkpoint's coefficients of the lane's samples wait in shared memory, where the lane alone
// finds them: registers are short.
template <class Tile>
TRAK_EXT_DEVICE char* scales_of_lane(char* shared) {
  return shared + Tile::kSlots * Tile::kSlotBytes + 8 * device::thread_index();
}

template <class Tile>
TRAK_EXT_DEVICE void load_scales(const ScoringLaunch<float>& launch, int tile, int checkpoint,
                                 char* shared) {
  Words2 scales = {{law_bits(1.0f), law_bits(1.0f)}};
  if (launch.coefficients) {
    const ScoresOfLane scores(launch,
                              locate_scoring_tile(launch, tile, Tile::kRows, Tile::kTargets));
    const float* from = launch.coefficients + checkpoint * launch.num_train + scores.sample;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half < scores.samples) {
        scales.word[half] = device::load_global<uint32_t>(from + 8 * half);
      }
    }
  }
  device::store_shared<Words2>(scales_of_lane<Tile>(shared), scales);
}

// Waits for the products under way and moves them into the sums, times the checkpoint's coefficient
// of each sample; `none` if they are zeros.
template <class Tile>
TRAK_EXT_DEVICE void flush_products(char* shared, bool none, WarpgroupSums<Tile>& products,
                                    WarpgroupSums<Tile>& sums) {
  auto scales = device::load_shared<Words2>(scales_of_lane<Tile>(shared));
  if (none) scales = {{0, 0}};  // a coefficient that is not finite makes no score of nothing
  device::finish_multiply(products);
#pragma unroll
  for (int n = 0; n < Tile::kTargetTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[n][i] = law_fma(law_from_bits(scales.word[i / 2]), products[n][i], sums[n][i]);
    }
  }
}

// Whether the products that end with a step are those of no feature: before the first step there
// are none, and the last turn's end in steps of zeros.
template <class Tile>
TRAK_EXT_DEVICE bool is_nothing(const ScoringLaunch<float>& launch, int turn, int step) {
  const int begin = turn * Tile::kTurnStages * kStageSteps + step + 1 - Tile::kFlushSteps;
  return begin < 0 || begin >= launch.steps;
}

// Waits for a turn's stage, starts the fetch of a later one and multiplies it. The tensor cores
// work on the products of the stage before across the barrier: flushed before it, all warpgroups
// would come to it together, without work for them.
template <class Tile, int kStage>
TRAK_EXT_DEVICE void multiply_stage(const ScoringLaunch<float>& launch, char* shared, int& slot,
                                    int& odd, int turn, ScoringStages<Tile>& fetch,
                                    uint32_t (&a)[Tile::kFeatureParts][4],
                                    WarpgroupSums<Tile>& products, WarpgroupSums<Tile>& sums) {
  // After this barrier the stage is there for all. Of the stage before products may be under way
  // still; of the one before that none are, and its slot is filled again.
  device::wait_copies<Tile::kSlots - 3>();
  device::block_barrier();
  constexpr bool kEnds = Tile::kTurnStages % 2 == 1 || (kStage + Tile::kSlots) % 2 == 1;
  fetch.template next<kEnds>(slot < 2 ? slot + Tile::kSlots - 2 : slot - 2);
  fetch.wait_targets(slot, odd);
  const char* from = fetch.slot_of(slot);
#pragma unroll
  for (int i = 0; i < kStageSteps; ++i) {
    const int step = kStage * kStageSteps + i;
    if (Tile::kFlushesLate && step % Tile::kFlushSteps == 0) {
      flush_products<Tile>(shared, is_nothing<Tile>(launch, turn, step - 1), products, sums);
    } else {
      device::wait_multiplied<0>();
    }
    load_features<Tile>(from, i, a);
    start_step<Tile>(device::describe_operand(from + Tile::kFeatureBytes + i * Tile::kStepBytes,
                                              Tile::kHalfBytes, Tile::kCoreBytes),
                     step % Tile::kFlushSteps == 0, a, products);
    if (!Tile::kFlushesLate && step % Tile::kFlushSteps == Tile::kFlushSteps - 1) {
      flush_products<Tile>(shared, is_nothing<Tile>(launch, turn, step), products, sums);
    }
  }
  if (++slot == Tile::kSlots) {
    slot = 0;
    odd ^= 1;
  }
}

// The scores of the block's tiles, one after the other; stages are fetched across their borders.
template <class Tile>
TRAK_EXT_DEVICE void score_with_warpgroups(const ScoringLaunch<float>& launch) {
  char* shared = device::shared_memory();
  ScoringStages<Tile> fetch(launch, shared);
  for (int i = 0; i + 2 < Tile::kSlots; ++i) fetch.next(i);
  int slot = 0, odd = 0;
  for (auto tile = static_cast<int>(device::block_index()); tile < launch.tiles;
       tile += launch.blocks) {
    WarpgroupSums<Tile> sums;
    load_sums<Tile>(launch, tile, sums);
    for (int checkpoint = 0; checkpoint < launch.checkpoints; ++checkpoint) {
      load_scales<Tile>(launch, tile, checkpoint, shared);
      WarpgroupSums<Tile> products = {};  // that the first turn finds
      uint32_t a[Tile::kFeatureParts][4];
#pragma unroll 1
      for (int turn = 0; turn < launch.stages / Tile::kTurnStages; ++turn) {
        multiply_stage<Tile, 0>(launch, shared, slot, odd, turn, fetch, a, products, sums);
        if constexpr (Tile::kTurnStages == 2) {
          multiply_stage<Tile, 1>(launch, shared, slot, odd, turn, fetch, a, products, sums);
        }
      }
      if (Tile::kFlushesLate) {
        const int turns = launch.stages / Tile::kTurnStages;
        flush_products<Tile>(shared, is_nothing<Tile>(launch, turns, -1), products, sums);
      }
    }
    store_sums<Tile>(launch, tile, sums);
  }
}

template <class Tile>
TRAK_EXT_KERNEL(Tile::kThreads, Tile::kBlocksPerSm)
warpgroup_scoring_kernel(TRAK_EXT_KERNEL_ARGUMENT ScoringLaunch<float> launch) {
  if constexpr (device::kHasWarpgroups) {
    score_with_warpgroups<Tile>(launch);
  } else {
    device::never_called();
  }
}

}  // namespace trak_ext::cuda
