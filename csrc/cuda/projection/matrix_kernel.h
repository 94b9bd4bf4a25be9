// The matrix itself, for inspection: out[p, j] = R[param_offset + p, j], fp32 row-major. A thread
// makes one column of 128 parameters, aligned in the matrix, so that it runs Philox once for signs.
#pragma once

#include "../../law/normal.h"
#include "../../law/rademacher.h"
#include "../device/device.h"
#include "entries.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

constexpr int kMatrixThreads = 256;

struct MatrixProblem {
  MatrixLaw law;
  uint64_t param_offset;
  int64_t params;
  int64_t proj_dim;
  float* out;  // [params, proj_dim]
};

template <Kind kKind>
TRAK_EXT_KERNEL(kMatrixThreads, 1)
matrix_kernel(TRAK_EXT_KERNEL_ARGUMENT MatrixProblem problem) {
  constexpr int kBlockLog2 = kKind == Kind::kRademacher ? kRademacherBlockLog2 : kNormalBlockLog2;
  const int64_t column_tiles = (problem.proj_dim + kMatrixThreads - 1) / kMatrixThreads;
  const int64_t column =
      device::block_index() % column_tiles * kMatrixThreads + device::thread_index();
  if (column >= problem.proj_dim) return;
  const ColumnStream stream = {problem.law.seed_low, problem.law.seed_high, problem.law.model_id,
                               static_cast<uint32_t>(column)};
  const auto head = static_cast<int64_t>(problem.param_offset % kStageParams);
  const int64_t first = device::block_index() / column_tiles * kStageParams - head;
  PhiloxWords words = {};
  for (int i = 0; i < kStageParams; ++i) {
    const int64_t param = first + i;
    const uint64_t row = problem.param_offset + static_cast<uint64_t>(param);  // modulo 2^64
    const auto entry_of_block = static_cast<uint32_t>(row) & ((1u << kBlockLog2) - 1u);
    if (entry_of_block == 0) words = block_words(stream, row >> kBlockLog2);
    if (param < 0 || param >= problem.params) continue;
    float entry;
    if constexpr (kKind == Kind::kRademacher) {
      const uint32_t word = entry_of_block < 64
                                ? (entry_of_block < 32 ? words.word[0] : words.word[1])
                                : (entry_of_block < 96 ? words.word[2] : words.word[3]);
      entry = (word >> (entry_of_block & 31u)) & 1u ? 1.0f : -1.0f;
    } else {
      const uint32_t word = entry_of_block < 2
                                ? (entry_of_block < 1 ? words.word[0] : words.word[1])
                                : (entry_of_block < 3 ? words.word[2] : words.word[3]);
      entry = normal_entry(word, kDeviceNormalTable);
    }
    device::store_global<float>(problem.out + param * problem.proj_dim + column, entry);
  }
}

}  // namespace trak_ext::cuda
