// Scores of a tile of samples and targets, in matrix instructions: features [16, 16] times targets
// [16, 8], both as bf16 parts.
//
// A warp's samples are its own, so every lane splits the features it multiplies, in registers, from
// raw ones that it has itself copied ahead; no other thread touches them. The targets come split
// (split_targets_kernel.h) and are shared by the block. The order of the summed index inside a step
// is free: lane (g, t) takes features 4t .. 4t + 3, which is one access.
#pragma once

#include "../device/device.h"
#include "../device/element.h"
#include "../device/split_nearest.h"
#include "scoring_launch.h"

namespace trak_ext::cuda {

// kParts bf16 parts of each target, and as many of each feature as there are in its dtype. Of their
// products those of parts i and j with i + j < kParts are kept: 1 for one part, 3 for two, 6 for
// three (of fp32; 5 of fp16, 3 of bf16). What three leave out
// is below 2^-23 of a product.
template <DType kDType_, int kParts_, int kTargetTiles_, int kBlocksPerSm_>
struct ScoringTile {
  static constexpr DType kDType = kDType_;
  static constexpr int kTargetParts = kParts_;
  static constexpr int kFeatureParts = kParts_ < parts_of(kDType_) ? kParts_ : parts_of(kDType_);
  static constexpr int kTargetTiles = kTargetTiles_;  // of 8 targets
  static constexpr int kTargetPairs = kTargetTiles / 2;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kRowTiles = 2;  // of 16 samples, a warp
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTargets = 8 * kTargetTiles;
  // Three parts are wanted for accuracy: their sums leave after every step.
  static constexpr int kFlushSteps = kParts_ == 3 ? 1 : cuda::kFlushSteps;
  static constexpr int kQuads = 2 * kRowTiles;  // samples of a lane
  static constexpr int kElementBytes = kDType == DType::kFloat32 ? 4 : 2;
  static constexpr int kQuadBytes = 4 * kElementBytes;
  static constexpr int kFeatureBytes = kQuads * kThreads * kQuadBytes;  // a step
  static constexpr int kTargetBytes = kTargetParts * kTargets * kStepFeatures * 2;
  static constexpr int kSlotBytes = kFeatureBytes + kTargetBytes;
  // Steps in shared memory: two blocks find room in the 100 KiB of sm_86, 89 and 120, 1 KiB of
  // which every block costs.
  static constexpr int kSlots = 4 * kSlotBytes <= 49 * 1024 ? 4 : 3;
  static constexpr int kSharedBytes = kSlots * kSlotBytes;
  static_assert(kSharedBytes <= 49 * 1024, "two blocks a multiprocessor");
  static_assert(kTargetTiles % 2 == 0, "a lane reads two tiles of targets at a time");
};

// Brings steps into shared memory, one call a step, in order.
template <class Tile>
class ScoringFetch {
 public:
  TRAK_EXT_DEVICE ScoringFetch(const ScoringLaunch<float>& launch, const ScoringBlock& block,
                               char* shared)
      : launch_(launch),
        first_row_(launch.first_row + block.row),
        last_row_(block.rows - 1),
        shared_(shared) {
    const int64_t steps = (launch.proj_dim + kStepFeatures - 1) / kStepFeatures;
    targets_ = launch.packed +
               block.target / Tile::kTargets * launch.checkpoints * steps * Tile::kTargetBytes +
               device::thread_index() * 16;
  }

  // Every call is a group of copies, so that groups can be counted; past the end it is empty.
  TRAK_EXT_DEVICE void next() {
    if (checkpoint_ < launch_.checkpoints) {
      if (feature_ == 0) begin_checkpoint();
      fetch_features();
      fetch_targets();
      feature_ += kStepFeatures;
      if (feature_ >= launch_.proj_dim) {
        feature_ = 0;
        ++checkpoint_;
      }
      slot_ = slot_ + 1 == Tile::kSlots ? 0 : slot_ + 1;
    }
    device::commit_copies();
  }

  TRAK_EXT_DEVICE static char* quad_of(char* slot, int quad) {
    return slot + (quad * Tile::kThreads + device::thread_index()) * Tile::kQuadBytes;
  }

 private:
  TRAK_EXT_DEVICE void begin_checkpoint() {
    const FeatureRows features = launch_.features[checkpoint_];
    const int thread = device::thread_index();
#pragma unroll
    for (int i = 0; i < Tile::kQuads; ++i) {
      const int row = thread / 32 * Tile::kWarpRows + 8 * i + thread % 32 / 4;
      // Samples that do not exist are the last one again; their scores go nowhere.
      const int64_t element =
          (first_row_ + (row < last_row_ ? row : last_row_)) * features.row_stride + thread % 4 * 4;
      from_[i] = static_cast<const char*>(features.data) + element * Tile::kElementBytes;
    }
  }

  TRAK_EXT_DEVICE void fetch_features() {
    const int64_t left = launch_.proj_dim - feature_ - device::thread_index() % 4 * 4;
    char* slot = shared_ + slot_ * Tile::kSlotBytes;
    if (launch_.aligned_quads && left >= 4) {
#pragma unroll
      for (int i = 0; i < Tile::kQuads; ++i) {
        device::copy_async<Tile::kQuadBytes>(quad_of(slot, i), from_[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kQuads; ++i) copy_elements(quad_of(slot, i), from_[i], left);
    }
#pragma unroll
    for (int i = 0; i < Tile::kQuads; ++i) from_[i] += kStepFeatures * Tile::kElementBytes;
  }

  // The elements that exist, one by one, and zeros for the others.
  TRAK_EXT_DEVICE static void copy_elements(char* to, const char* from, int64_t count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = i < count;
      if constexpr (Tile::kElementBytes == 4) {
        device::store_shared<uint32_t>(
            to + 4 * i, exists ? device::load_global<uint32_t>(from + 4 * i) : uint32_t{0});
      } else {
        device::store_shared<uint16_t>(
            to + 2 * i, exists ? device::load_global<uint16_t>(from + 2 * i) : uint16_t{0});
      }
    }
  }

  TRAK_EXT_DEVICE void fetch_targets() {
    char* to = shared_ + slot_ * Tile::kSlotBytes + Tile::kFeatureBytes;
#pragma unroll
    for (int before = 0; before < Tile::kTargetBytes / 16; before += Tile::kThreads) {
      const int piece = before + device::thread_index();
      if (before + Tile::kThreads <= Tile::kTargetBytes / 16 || piece < Tile::kTargetBytes / 16) {
        device::copy_async<16>(to + piece * 16, targets_ + before * 16);
      }
    }
    targets_ += Tile::kTargetBytes;
  }

  const ScoringLaunch<float>& launch_;
  const int64_t first_row_;
  const int last_row_;  // of the block
  char* const shared_;
  const char* from_[Tile::kQuads];  // this lane's next features
  const char* targets_;             // this thread's next piece
  int64_t feature_ = 0;             // the step's first
  int checkpoint_ = 0;
  int slot_ = 0;
};

template <class Tile>
using TileSums = float[Tile::kRowTiles][Tile::kTargetTiles][4];

template <class Tile>
TRAK_EXT_DEVICE void multiply_step(char* slot, TileSums<Tile>& products) {
  uint32_t a[Tile::kFeatureParts][Tile::kRowTiles][4];
#pragma unroll
  for (int i = 0; i < Tile::kQuads; ++i) {
    float values[4];
    load_quad(ScoringFetch<Tile>::quad_of(slot, i), Tile::kDType, values);
    uint32_t first[Tile::kFeatureParts], second[Tile::kFeatureParts];
    split_nearest(values[0], values[1], first);
    split_nearest(values[2], values[3], second);
#pragma unroll
    for (int part = 0; part < Tile::kFeatureParts; ++part) {
      a[part][i / 2][i % 2] = first[part];
      a[part][i / 2][2 + i % 2] = second[part];
    }
  }
  const char* targets = slot + Tile::kFeatureBytes + device::thread_index() % 32 * 16;
#pragma unroll
  for (int pair = 0; pair < Tile::kTargetPairs; ++pair) {
    Words4 b[Tile::kTargetParts];
#pragma unroll
    for (int j = 0; j < Tile::kTargetParts; ++j) {
      b[j] = device::load_shared<Words4>(targets + (j * Tile::kTargetPairs + pair) * 32 * 16);
    }
    // The smallest products first: what an addition truncates is a part of the sum so far.
#pragma unroll
    for (int both = Tile::kTargetParts - 1; both >= 0; --both) {
#pragma unroll
      for (int i = 0; i < Tile::kFeatureParts; ++i) {
        const int j = both - i;
        if (j < 0) continue;
#pragma unroll
        for (int row_tile = 0; row_tile < Tile::kRowTiles; ++row_tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            device::multiply_bf16(products[row_tile][2 * pair + half], a[i][row_tile],
                                  b[j].word[2 * half], b[j].word[2 * half + 1]);
          }
        }
      }
    }
  }
}

// Calls body(sum, row, target) for every score of the lane; both counted from the block's first.
// Lane (g, t) has samples g and g + 8, targets 2t and 2t + 1 of every instruction.
template <class Tile, class Body>
TRAK_EXT_DEVICE void for_each_score(TileSums<Tile>& sums, const Body& body) {
  const int thread = device::thread_index();
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kTargetTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        body(sums[m][n][i], thread / 32 * Tile::kWarpRows + 16 * m + 8 * (i / 2) + thread % 32 / 4,
             8 * n + thread % 4 * 2 + i % 2);
      }
    }
  }
}

// Moves products into the sums, times the checkpoint's coefficient of each sample.
template <class Tile>
TRAK_EXT_DEVICE void flush_products(const float* coefficients, int64_t first_row, int rows,
                                    TileSums<Tile>& products, TileSums<Tile>& sums) {
  const int thread = device::thread_index();
  const int row = thread / 32 * Tile::kWarpRows + thread % 32 / 4;
#pragma unroll
  for (int quad = 0; quad < Tile::kQuads; ++quad) {
    float scale = 1.0f;
    if (coefficients && row + 8 * quad < rows) {
      scale = device::load_global<float>(coefficients + first_row + row + 8 * quad);
    }
#pragma unroll
    for (int n = 0; n < Tile::kTargetTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& product = products[quad / 2][n][quad % 2 * 2 + i];
        float& sum = sums[quad / 2][n][quad % 2 * 2 + i];
        sum = law_fma(scale, product, sum);
        product = 0.0f;
      }
    }
  }
}

template <class Tile>
TRAK_EXT_KERNEL(Tile::kThreads, Tile::kBlocksPerSm)
scoring_kernel(TRAK_EXT_KERNEL_ARGUMENT ScoringLaunch<float> launch) {
  char* shared = device::shared_memory();
  const ScoringBlock block = locate_scoring_block(launch, Tile::kRows, Tile::kTargets);
  const int64_t first_row = launch.first_row + block.row;
  float* out =
      launch.out + block.row * launch.out_row_stride + block.target * launch.out_target_stride;
  const bool has_rows = device::thread_index() / 32 * Tile::kWarpRows < block.rows;
  TileSums<Tile> sums = {}, products = {};
  if (launch.add) {
    for_each_score<Tile>(sums, [&](float& sum, int row, int target) {
      if (row < block.rows && target < block.targets) {
        sum = device::load_global<float>(out + row * launch.out_row_stride +
                                         target * launch.out_target_stride);
      }
    });
  }

  ScoringFetch<Tile> fetch(launch, block, shared);
  for (int i = 0; i + 1 < Tile::kSlots; ++i) fetch.next();
  const int64_t steps = (launch.proj_dim + kStepFeatures - 1) / kStepFeatures;
  int slot = 0;
  for (int checkpoint = 0; checkpoint < launch.checkpoints; ++checkpoint) {
    const float* coefficients =
        launch.coefficients ? launch.coefficients + checkpoint * launch.num_train : nullptr;
    for (int64_t step = 0; step < steps; ++step) {
      // After this barrier the step is there for all, and nobody reads the one before any more,
      // whose slot is filled again.
      device::wait_copies<Tile::kSlots - 2>();
      device::block_barrier();
      fetch.next();
      if (has_rows) {
        multiply_step<Tile>(shared + slot * Tile::kSlotBytes, products);
        if (step % Tile::kFlushSteps == Tile::kFlushSteps - 1 || step + 1 == steps) {
          flush_products<Tile>(coefficients, first_row, block.rows, products, sums);
        }
      }
      slot = slot + 1 == Tile::kSlots ? 0 : slot + 1;
    }
  }

  for_each_score<Tile>(sums, [&](float& sum, int row, int target) {
    if (row >= block.rows || target >= block.targets) return;
    const float weight =
        launch.weights ? device::load_global<float>(launch.weights + first_row + row) : 1.0f;
    device::store_global<float>(
        out + row * launch.out_row_stride + target * launch.out_target_stride, weight * sum);
  });
}

}  // namespace trak_ext::cuda
