// How P is cut, and what one launch of a multiplying kernel is told.
//
// P is cut into superblocks of 512 parameters, aligned in the matrix and not in the tensor, and
// runs of superblocks form chunks. A chunk's sum is one fp32 number an output, made in an order
// that is the same for every tile shape; chunks are added to `out` one after another. The cut is a
// function of P and of param_offset alone, so a result depends on neither the device's size nor the
// workspace nor the batch.
#pragma once

#include <cstdint>

#include "../law/platform.h"
#include "../problem.h"

namespace trak_ext {

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

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline int64_t count_superblocks(const GradientView& grad) {
  if (grad.params == 0) return 0;
  const auto head = static_cast<int64_t>(grad.param_offset % kSuperblockParams);
  // Not head + params, which may not fit.
  return (grad.params - 1) / kSuperblockParams +
         divide_up(head + (grad.params - 1) % kSuperblockParams + 1, kSuperblockParams);
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

// How a raw stage lies in shared memory, where it comes from, and in what pieces it is copied. A
// stage's 128 parameters are four segments of 32 that follow one another in the tensor.
constexpr int kSegments = 4;
constexpr int kSegmentParams = 32;

// Empty bytes after a segment and after a row of a raw slot, a multiple of 16 each: they keep the
// eight lanes of a 16-byte access in different banks, in whatever order a tile reads.
struct SlotPads {
  int segment;
  int row;
};

struct RawLayout {
  DType dtype;          // in shared memory
  int element_bytes;    // in shared memory
  int copy_bytes;       // 16 or 4 asynchronously, or 0: element by element, as fp32
  int segment_pitch;    // bytes
  int row_pitch;        // bytes
  int64_t row_bytes;    // from one row of the tensor to the next
  int64_t param_bytes;  // from one parameter of the tensor to the next
};

TRAK_EXT_LAW int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The widest copy whose source is aligned for every segment of every row.
inline RawLayout choose_layout(const GradientView& grad, const SlotPads& pads) {
  const int bytes = element_bytes(grad.dtype);
  // Segments start at multiples of 32 in the matrix, so what counts is where its row 0 would lie.
  const uint64_t start =
      reinterpret_cast<uintptr_t>(grad.data) - grad.param_offset * static_cast<uint64_t>(bytes);
  const uint64_t odd = start | (static_cast<uint64_t>(grad.row_stride) * bytes);
  RawLayout layout = {grad.dtype, bytes, odd % 16 == 0 ? 16 : 4, 0, 0, 0, 0};
  if (grad.param_stride != 1 || grad.dtype == DType::kFloat64 || odd % 4 != 0) {
    layout = {DType::kFloat32, 4, 0, 0, 0, 0, 0};
  }
  layout.segment_pitch = kSegmentParams * layout.element_bytes + pads.segment;
  layout.row_pitch = kSegments * layout.segment_pitch + pads.row;
  layout.row_bytes = grad.row_stride * bytes;
  layout.param_bytes = grad.param_stride * bytes;
  return layout;
}

// One launch: sums of some rows, columns and chunks of one gradient tensor.
struct MultiplyProblem {
  MatrixLaw law;
  GradientView grad;
  RawLayout layout;
  int64_t first_row;
  int64_t rows;
  int64_t first_column;
  int64_t columns;
  int64_t first_chunk;
  int64_t chunks;
  int64_t chunk_superblocks;
  int64_t superblocks;  // of the whole tensor
  float* partials;      // [chunks, rows, columns]
  // Constants that the compiler must not know, see entries.h.
  uint32_t sign_mask = 0x80008000u;
  uint32_t plus_ones = 0x3F803F80u;
  uint32_t two = 2;
};

// The part of a launch that one block makes.
struct BlockTile {
  int64_t column;       // the first, of the matrix
  int32_t rows;         // that exist
  int32_t columns;      // that exist
  uint64_t superblock;  // the chunk's first, counted from the matrix's row 0
  int32_t num_superblocks;
  int32_t begin;  // parameters begin .. end - 1 of the chunk exist
  int32_t end;
  uint64_t source;  // address of the first row's parameter 0 of the chunk: not in the tensor if
                    // that is before `begin`, and then never read
  float* partials;  // the tile's first sum; rows are problem.columns apart
};

}  // namespace trak_ext
