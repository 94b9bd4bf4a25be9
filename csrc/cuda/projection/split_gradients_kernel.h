// Gradients as bf16 parts in the order of the matrix instructions (see multiply_problem.h), made
// once for all columns of a launch. A block has eight rows of a superblock: it reads them as they
// lie, which is in whole lines whatever their strides and offset, and writes whole lines.
#pragma once

#include "../device/device.h"
#include "../device/element.h"
#include "entries.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

constexpr int kSplitGradientsThreads = 256;

struct SplitProblem {
  MultiplyProblem problem;
  int32_t tile_rows;
  int32_t quads;  // four elements at a multiple of 4 of a superblock can be read at once
};

// Whether four consecutive elements are aligned wherever a superblock begins, in every row.
inline bool has_aligned_quads(const GradientView& grad, int64_t rows) {
  const auto bytes = static_cast<uint64_t>(element_bytes(grad.dtype));
  if (grad.param_stride != 1 || grad.dtype == DType::kFloat64) return false;
  // Superblocks start at multiples of 512 in the matrix, so what counts is where its row 0 would
  // lie. The stride of a single row leads nowhere.
  uint64_t odd = reinterpret_cast<uintptr_t>(grad.data) - grad.param_offset * bytes;
  if (rows > 1) odd |= static_cast<uint64_t>(grad.row_stride) * bytes;
  return odd % (4 * bytes) == 0;
}

template <template <int> class EntriesOf, int kPasses>
class GradientSplitter {
 public:
  // Fp32, [8 rows, 512] with a pad that keeps eight rows in different banks.
  static constexpr int kPitch = kSuperblockParams + 4;
  static constexpr int kSharedBytes = kCoreRows * kPitch * 4;

  TRAK_EXT_DEVICE GradientSplitter(const SplitProblem& split, char* shared)
      : split_(split), shared_(shared) {
    const MultiplyProblem& problem = split.problem;
    row_groups_ =
        (problem.rows + split.tile_rows - 1) / split.tile_rows * split.tile_rows / kCoreRows;
    const int64_t index = device::block_index();
    const int64_t superblock = index % (problem.chunks * problem.chunk_superblocks);
    group_ = index / (problem.chunks * problem.chunk_superblocks);
    chunk_ = superblock / problem.chunk_superblocks;
    superblock_ = static_cast<int>(superblock % problem.chunk_superblocks);
    span_ = locate_chunk(problem, chunk_);
  }

  TRAK_EXT_DEVICE bool exists() const { return superblock_ < span_.num_superblocks; }

  TRAK_EXT_DEVICE void load() const {
    if (split_.quads) {
      load_quads();
    } else {
      load_elements();
    }
  }

  // A piece is what one row has in a half step: 16 bytes of each pass.
  TRAK_EXT_DEVICE void store() const {
    const MultiplyProblem& problem = split_.problem;
    const int tile_rows = split_.tile_rows;
    const int groups_a_tile = tile_rows / kCoreRows;
    const int64_t row_tiles = row_groups_ / groups_a_tile;
    const int step_bytes = operand_step_bytes(tile_rows);
    char* superblock =
        problem.operand +
        (chunk_ * row_tiles + group_ / groups_a_tile) *
            operand_chunk_bytes(tile_rows, kPasses, problem.chunk_superblocks) +
        superblock_ * kStagesPerSuperblock * operand_stage_bytes(tile_rows, kPasses) +
        group_ % groups_a_tile * kCoreBytes;
    constexpr int kHalves = 2 * kSteps;
    constexpr int kPieces = kStagesPerSuperblock * kHalves * kCoreRows;
#pragma unroll
    for (int before = 0; before < kPieces; before += kSplitGradientsThreads) {
      const int piece = before + device::thread_index();
      const int row = piece % kCoreRows;
      const int half = piece / kCoreRows % kHalves;
      const int stage = piece / kCoreRows / kHalves;
      const char* from = shared_ + row * kPitch * 4;
      uint32_t parts[4][kPasses];
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        const OperandPlace place = EntriesOf<1>::place_of(stage, half, slot);
        split_pair<kPasses>(device::load_shared<float>(from + 4 * place.lower),
                            device::load_shared<float>(from + 4 * place.upper), parts[slot]);
      }
      char* to = superblock + stage * operand_stage_bytes(tile_rows, kPasses) +
                 half / 2 * kPasses * step_bytes + half % 2 * (step_bytes / 2) + row * 16;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const Words4 words = {{parts[0][pass], parts[1][pass], parts[2][pass], parts[3][pass]}};
        device::store_global<Words4>(to + pass * step_bytes, words);
      }
    }
  }

 private:
  TRAK_EXT_DEVICE int64_t row_of(int row) const { return group_ * kCoreRows + row; }
  // Of the chunk's parameter `param`.
  TRAK_EXT_DEVICE const char* source_of(int row, int param) const {
    return reinterpret_cast<const char*>(element_address(
        split_.problem.grad, split_.problem.first_row + row_of(row), span_.first_param + param));
  }
  TRAK_EXT_DEVICE bool has_row(int row) const { return row_of(row) < split_.problem.rows; }

  TRAK_EXT_DEVICE void load_elements() const {
    constexpr int kElements = kCoreRows * kSuperblockParams;
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int before = 0; before < kElements; before += kAtOnce * kSplitGradientsThreads) {
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int element = before + i * kSplitGradientsThreads + device::thread_index();
        const int row = element / kSuperblockParams;
        const int param = superblock_ * kSuperblockParams + element % kSuperblockParams;
        const bool inside = has_row(row) && param >= span_.begin && param < span_.end;
        values[i] = inside ? load_element(source_of(row, param), split_.problem.grad.dtype) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int element = before + i * kSplitGradientsThreads + device::thread_index();
        device::store_shared<float>(
            shared_ + 4 * (element / kSuperblockParams * kPitch + element % kSuperblockParams),
            values[i]);
      }
    }
  }

  TRAK_EXT_DEVICE void load_quads() const {
    constexpr int kRowQuads = kSuperblockParams / 4;
    constexpr int kQuads = kCoreRows * kRowQuads / kSplitGradientsThreads;  // a thread
    float values[kQuads][4];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = i * kSplitGradientsThreads + device::thread_index();
      const int row = quad / kRowQuads;
      const int param = superblock_ * kSuperblockParams + quad % kRowQuads * 4;
      if (has_row(row) && param >= span_.begin && param + 4 <= span_.end) {
        load_global_quad(source_of(row, param), split_.problem.grad.dtype, values[i]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool inside = has_row(row) && param + j >= span_.begin && param + j < span_.end;
          values[i][j] =
              inside ? load_element(source_of(row, param + j), split_.problem.grad.dtype) : 0.0f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = i * kSplitGradientsThreads + device::thread_index();
      const Words4 words = {{law_bits(values[i][0]), law_bits(values[i][1]), law_bits(values[i][2]),
                             law_bits(values[i][3])}};
      device::store_shared<Words4>(shared_ + 4 * (quad / kRowQuads * kPitch + quad % kRowQuads * 4),
                                   words);
    }
  }

  const SplitProblem& split_;
  char* const shared_;
  int64_t row_groups_;
  int64_t group_;  // of eight rows
  int64_t chunk_;
  int superblock_;  // of the chunk
  ChunkSpan span_;
};

template <template <int> class EntriesOf, int kPasses>
TRAK_EXT_KERNEL(kSplitGradientsThreads, 6)
split_gradients_kernel(TRAK_EXT_KERNEL_ARGUMENT SplitProblem split) {
  const GradientSplitter<EntriesOf, kPasses> splitter(split, device::shared_memory());
  if (!splitter.exists()) return;
  splitter.load();
  device::block_barrier();
  splitter.store();
}

}  // namespace trak_ext::cuda
