// Scores without matrix instructions: fp32 for devices before sm_80, and fp64 throughout.
#pragma once

#include "../../law/arithmetic.h"
#include "../device/device.h"
#include "../device/element.h"
#include "scoring_launch.h"

namespace trak_ext::cuda {

constexpr int kPlainScoringThreads = 256;
constexpr int kPlainScoringTile = 64;  // samples and targets of a block; 4 x 4 of them a thread
constexpr int kPlainScoringPitch = kPlainScoringTile + 1;  // neighbours in different banks

template <class T>
constexpr int plain_scoring_shared_bytes() {
  return 2 * kStepFeatures * kPlainScoringPitch * static_cast<int>(sizeof(T));
}

TRAK_EXT_DEVICE float fused_multiply_add(float a, float b, float c) { return law_fma(a, b, c); }
TRAK_EXT_DEVICE double fused_multiply_add(double a, double b, double c) {
  return device::multiply_add(a, b, c);
}

template <class T>
TRAK_EXT_DEVICE T load_as(const char* address, DType dtype) {
  if (dtype == DType::kFloat64) return static_cast<T>(device::load_global<double>(address));
  return static_cast<T>(load_element(address, dtype));
}

// Stages 16 features of the block's samples and targets: staged[feature][sample], then
// staged[feature][target]. What does not exist is zero.
template <class T>
TRAK_EXT_DEVICE void stage_plain(const ScoringLaunch<T>& launch, const ScoringBlock& block,
                                 int checkpoint, int64_t first_feature, char* staged) {
  constexpr int kElements = kPlainScoringTile * kStepFeatures;
  const FeatureRows features = launch.features[checkpoint];
  const int bytes = element_bytes(launch.dtype);
  for (int i = device::thread_index(); i < 2 * kElements; i += kPlainScoringThreads) {
    const int within = i % kElements;
    const int item = within / kStepFeatures;
    const int64_t feature = first_feature + within % kStepFeatures;
    T value = 0;
    if (i < kElements) {
      if (item < block.rows && feature < launch.proj_dim) {
        const int64_t row = launch.first_row + block.row + item;
        value = load_as<T>(
            static_cast<const char*>(features.data) + (row * features.row_stride + feature) * bytes,
            launch.dtype);
      }
    } else if (item < block.targets && feature < launch.proj_dim) {
      const int64_t target = launch.first_target + block.target + item;
      value = device::load_global<T>(
          launch.solved + (checkpoint * launch.num_targets + target) * launch.proj_dim + feature);
    }
    const int cell = i / kElements * kStepFeatures * kPlainScoringPitch +
                     within % kStepFeatures * kPlainScoringPitch + item;
    device::store_shared<T>(staged + cell * static_cast<int>(sizeof(T)), value);
  }
}

// Thread (y, x) has samples y + 16 i and targets x + 16 j.
template <class T>
TRAK_EXT_KERNEL(kPlainScoringThreads, 1)
plain_scoring_kernel(TRAK_EXT_KERNEL_ARGUMENT ScoringLaunch<T> launch) {
  const ScoringBlock block = locate_scoring_block(launch, kPlainScoringTile, kPlainScoringTile);
  char* staged = device::shared_memory();
  const int y = device::thread_index() / 16, x = device::thread_index() % 16;
  const int64_t first_row = launch.first_row + block.row;
  T* out = launch.out + block.row * launch.out_row_stride + block.target * launch.out_target_stride;
  T sums[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (launch.add && y + 16 * i < block.rows && x + 16 * j < block.targets) {
        sums[i][j] = device::load_global<T>(out + (y + 16 * i) * launch.out_row_stride +
                                            (x + 16 * j) * launch.out_target_stride);
      }
    }
  }
  for (int checkpoint = 0; checkpoint < launch.checkpoints; ++checkpoint) {
    T products[4][4] = {};
    for (int64_t feature = 0; feature < launch.proj_dim; feature += kStepFeatures) {
      device::block_barrier();  // the step before has been read
      stage_plain(launch, block, checkpoint, feature, staged);
      device::block_barrier();
#pragma unroll 4
      for (int d = 0; d < kStepFeatures; ++d) {
        const char* samples = staged + d * kPlainScoringPitch * static_cast<int>(sizeof(T));
        const char* targets =
            samples + kStepFeatures * kPlainScoringPitch * static_cast<int>(sizeof(T));
        T a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = device::load_shared<T>(samples + (y + 16 * i) * static_cast<int>(sizeof(T)));
          b[i] = device::load_shared<T>(targets + (x + 16 * i) * static_cast<int>(sizeof(T)));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            products[i][j] = fused_multiply_add(a[i], b[j], products[i][j]);
          }
        }
      }
      const int64_t step = feature / kStepFeatures;
      const bool last = feature + kStepFeatures >= launch.proj_dim;
      if (step % kFlushSteps != kFlushSteps - 1 && !last) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T scale = 1;
        if (launch.coefficients && y + 16 * i < block.rows) {
          scale = device::load_global<T>(launch.coefficients + checkpoint * launch.num_train +
                                         first_row + y + 16 * i);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = fused_multiply_add(scale, products[i][j], sums[i][j]);
          products[i][j] = 0;
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = y + 16 * i;
    if (row >= block.rows) continue;
    const T weight =
        launch.weights ? device::load_global<T>(launch.weights + first_row + row) : T{1};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int target = x + 16 * j;
      if (target < block.targets) {
        device::store_global<T>(
            out + row * launch.out_row_stride + target * launch.out_target_stride,
            weight * sums[i][j]);
      }
    }
  }
}

}  // namespace trak_ext::cuda
