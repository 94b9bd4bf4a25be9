// How P is cut, and what one launch of a multiplying kernel is told.
//
// P is cut into superblocks of 512 parameters, aligned in the matrix and not in the tensor, and
// runs of superblocks form chunks. A chunk's sum is one fp32 number an output, made in an order
// that is the same for every tile shape; chunks are added to `out` one after another. The cut is a
// function of P and of param_offset alone, so a result depends on neither the device's size nor the
// workspace nor the batch.
#pragma once

#include <cstdint>

#include "../../division.h"
#include "../../law/platform.h"
#include "../../problem.h"

namespace trak_ext::cuda {

// Four threads share a column in a matrix instruction, and each owns a Philox block of 128 signs.
constexpr int kSuperblockParams = 512;
// A superblock goes through shared memory in four stages; after each the matrix instructions' sums,
// which are truncated at every addition, move into ordinary fp32 additions.
constexpr int kStageParams = 128;
constexpr int kStagesPerSuperblock = kSuperblockParams / kStageParams;
constexpr int kStepParams = 16;  // parameters a matrix instruction
constexpr int kSteps = kStageParams / kStepParams;

// Chunks are short where P is small, so that there are enough of them to fill a device, and long
// where it is large, so that few partial sums are written.
constexpr int64_t kChunkSuperblocksMin = 4;
constexpr int64_t kChunkSuperblocksMax = 64;
constexpr int64_t kChunksWanted = 128;

inline int64_t count_superblocks(const GradientView& grad) {
  if (grad.params == 0) return 0;
  const auto head = static_cast<int64_t>(grad.param_offset % kSuperblockParams);
  // Not head + params, which may not fit.
  return (grad.params - 1) / kSuperblockParams +
         ceil_div(head + (grad.params - 1) % kSuperblockParams + 1, kSuperblockParams);
}

inline int64_t choose_chunk_superblocks(int64_t superblocks) {
  int64_t size = kChunkSuperblocksMin;
  while (size < kChunkSuperblocksMax && superblocks > 2 * size * kChunksWanted) size *= 2;
  return size;
}

// Passes that a dtype needs: bf16 is exact in one bf16 number, fp16 in two, fp32 in three.
inline int passes_of(DType dtype, int precision_passes) {
  if (dtype == DType::kBFloat16) return 1;
  if (dtype == DType::kFloat16) return 2;
  return precision_passes;
}

// Gradients are multiplied as bf16 parts, which a kernel of its own makes once for all columns
// (split_gradients_kernel.h) and lays out as the matrix instructions of both paths read them: core
// matrices of 8 rows and 8 places of the summed index, 16 bytes a row, 128 consecutive bytes.
// [chunks, row tiles, superblocks of a chunk, stages, steps, passes, 2, tile rows / 8, 8 rows]
// of 16 bytes, the 2 being the halves of a step's 16 places. What does not exist is zero there.
constexpr int kCoreBytes = 128;
constexpr int kCoreRows = 8;

// Of one step and pass; the two halves follow one another.
TRAK_EXT_LAW int operand_step_bytes(int tile_rows) {
  return 2 * tile_rows / kCoreRows * kCoreBytes;
}
TRAK_EXT_LAW int operand_stage_bytes(int tile_rows, int passes) {
  return kSteps * passes * operand_step_bytes(tile_rows);
}
TRAK_EXT_LAW int64_t operand_chunk_bytes(int tile_rows, int passes, int64_t chunk_superblocks) {
  return chunk_superblocks * kStagesPerSuperblock * operand_stage_bytes(tile_rows, passes);
}

// One launch: sums of some rows, columns and chunks of one gradient tensor.
struct MultiplyProblem {
  MatrixLaw law;
  GradientView grad;
  int64_t first_row;
  int64_t rows;
  int64_t first_column;
  int64_t columns;
  int64_t first_chunk;
  int64_t chunks;
  int64_t chunk_superblocks;
  int64_t superblocks;  // of the whole tensor
  char* operand;        // of this launch's rows and chunks; null for the kernel that reads `grad`
  float* partials;      // [chunks, rows, columns]
  // Constants that the compiler must not know, see entries.h.
  uint32_t sign_mask = 0x80008000u;
  uint32_t plus_ones = 0x3F803F80u;
  uint32_t two = 2;
};

// A chunk of a launch as parameters of the gradient tensor: its parameter i is first_param + i, and
// exists for begin <= i < end.
struct ChunkSpan {
  uint64_t superblock;  // the chunk's first, counted from the matrix's row 0
  int32_t num_superblocks;
  int32_t begin;
  int32_t end;
  int64_t first_param;  // before the tensor's first by the head of the first chunk
};

TRAK_EXT_LAW ChunkSpan locate_chunk(const MultiplyProblem& problem, int64_t chunk) {
  const int64_t first = (problem.first_chunk + chunk) * problem.chunk_superblocks;
  const int64_t left = problem.superblocks - first;
  const int64_t superblocks = left < problem.chunk_superblocks ? left : problem.chunk_superblocks;
  const auto head = static_cast<int64_t>(problem.grad.param_offset % kSuperblockParams);
  ChunkSpan span = {};
  span.superblock = problem.grad.param_offset / kSuperblockParams + static_cast<uint64_t>(first);
  span.num_superblocks = static_cast<int32_t>(superblocks);
  span.first_param = first * kSuperblockParams - head;
  span.begin = span.first_param < 0 ? static_cast<int32_t>(-span.first_param) : 0;
  const int64_t end = problem.grad.params - span.first_param;
  span.end = static_cast<int32_t>(
      end < superblocks * kSuperblockParams ? end : superblocks * kSuperblockParams);
  return span;
}

// Address of parameter `param` of a row; both count from the tensor's first and may lie outside it.
TRAK_EXT_LAW uint64_t element_address(const GradientView& grad, int64_t row, int64_t param) {
  return reinterpret_cast<uintptr_t>(grad.data) +
         static_cast<uint64_t>((row * grad.row_stride + param * grad.param_stride) *
                               element_bytes(grad.dtype));
}

}  // namespace trak_ext::cuda
