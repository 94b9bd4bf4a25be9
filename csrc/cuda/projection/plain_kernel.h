// The multiplication without matrix instructions, for devices before sm_80: a thread a column, fp32
// throughout, the same chunks and stages.
#pragma once

#include "../../law/normal.h"
#include "../../law/rademacher.h"
#include "../device/element.h"
#include "block_tile.h"
#include "entries.h"

namespace trak_ext::cuda {

constexpr int kPlainRows = 8;
constexpr int kPlainThreads = 256;

// Adds g * R for the 128 parameters from `param` on (counted from the matrix's row 0).
template <Kind kKind>
TRAK_EXT_DEVICE void add_plain_stage(const ColumnStream& stream, uint64_t param,
                                     const float* staged, float (&products)[kPlainRows]) {
  constexpr int kBlockLog2 = kKind == Kind::kRademacher ? kRademacherBlockLog2 : kNormalBlockLog2;
  constexpr int kPerWord = (1 << kBlockLog2) / 4;  // entries that a word makes: 32 or 1
  for (int first = 0; first < kStageParams; first += 1 << kBlockLog2) {
    const PhiloxWords words =
        block_words(stream, (param + static_cast<uint64_t>(first)) >> kBlockLog2);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      for (int bit = 0; bit < kPerWord; ++bit) {
        float entry;
        if constexpr (kKind == Kind::kRademacher) {
          entry = (words.word[w] >> bit) & 1u ? 1.0f : -1.0f;
        } else {
          entry = normal_entry(words.word[w], kDeviceNormalTable);
        }
#pragma unroll
        for (int row = 0; row < kPlainRows; ++row) {
          const float value =
              device::load_shared<float>(staged + row * kStageParams + first + w * kPerWord + bit);
          products[row] = law_fma(value, entry, products[row]);
        }
      }
    }
  }
}

template <Kind kKind>
TRAK_EXT_KERNEL(kPlainThreads, 1)
plain_kernel(TRAK_EXT_KERNEL_ARGUMENT MultiplyProblem problem) {
  const BlockTile tile = locate_tile(problem, kPlainRows, kPlainThreads, 0);
  const ChunkSpan span = locate_chunk(problem, tile.chunk);
  auto* staged = reinterpret_cast<float*>(device::shared_memory());  // [kPlainRows, kStageParams]
  const int column = device::thread_index();
  const ColumnStream stream = {problem.law.seed_low, problem.law.seed_high, problem.law.model_id,
                               static_cast<uint32_t>(tile.column + column)};
  float sums[kPlainRows] = {};
  for (int stage = 0; stage < span.num_superblocks * kStagesPerSuperblock; ++stage) {
    device::block_barrier();  // the stage before has been read
    for (int i = column; i < kPlainRows * kStageParams; i += kPlainThreads) {
      const int row = i / kStageParams;
      const int param = stage * kStageParams + i % kStageParams;
      float value = 0.0f;
      if (row < tile.rows && param >= span.begin && param < span.end) {
        const uint64_t source = element_address(problem.grad, problem.first_row + tile.row + row,
                                                span.first_param + param);
        value = load_element(reinterpret_cast<const char*>(source), problem.grad.dtype);
      }
      device::store_shared<float>(staged + i, value);
    }
    device::block_barrier();
    float products[kPlainRows] = {};
    add_plain_stage<kKind>(
        stream, span.superblock * kSuperblockParams + static_cast<uint64_t>(stage) * kStageParams,
        staged, products);
#pragma unroll
    for (int row = 0; row < kPlainRows; ++row) sums[row] += products[row];
  }
  if (column >= tile.columns) return;
#pragma unroll
  for (int row = 0; row < kPlainRows; ++row) {
    if (row < tile.rows) {
      device::store_global<float>(tile.partials + row * problem.columns + column, sums[row]);
    }
  }
}

}  // namespace trak_ext::cuda
