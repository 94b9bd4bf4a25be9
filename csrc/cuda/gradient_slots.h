// The raw gradients of a block on their way from global memory: a ring of slots in shared memory, a
// stage a slot, filled by asynchronous copies. Which parameters a stage's segments are is the
// matrix kind's business (Entries::segment_start).
#pragma once

#include "device.h"
#include "element.h"
#include "multiply_problem.h"

namespace trak_ext {

template <class Tile>
class GradientSlots {
 public:
  static constexpr int kSlotBytes =
      Tile::kRows *
      (kSegments * (kSegmentParams * 4 + Tile::kSegmentPadBytes) + Tile::kRowPadBytes);
  static constexpr int kSharedBytes = Tile::kSlots * kSlotBytes;

  TRAK_EXT_DEVICE GradientSlots(const MultiplyProblem& problem, const BlockTile* tile, char* shared)
      : dtype_(problem.grad.dtype), layout_(problem.layout), tile_(tile), slots_(shared) {}

  // Starts bringing a stage into its slot; past the last stage there is nothing to bring. Every
  // call is a group of copies, so that groups can be counted.
  TRAK_EXT_DEVICE void fetch(int stage) const {
    const auto tile = device::load_shared<BlockTile>(tile_);
    if (stage < tile.num_superblocks * kStagesPerSuperblock) {
      if (layout_.copy_bytes == 16) {
        fetch_async<16>(tile, stage);
      } else if (layout_.copy_bytes == 4) {
        fetch_async<4>(tile, stage);
      } else {
        fetch_plain(tile, stage);
      }
    }
    device::commit_copies();
  }

  // [rows, segments, elements], at the layout's pitches; there once all have waited for the copies.
  TRAK_EXT_DEVICE char* slot_of(int stage) const {
    return slots_ + static_cast<unsigned>(stage) % Tile::kSlots * kSlotBytes;
  }
  TRAK_EXT_DEVICE const RawLayout& layout() const { return layout_; }

 private:
  static constexpr int kCopiesUnrolled = Tile::kRows >= 32 ? 4 : 1;

  TRAK_EXT_DEVICE const char* source_of(const BlockTile& tile, int row, int param) const {
    return reinterpret_cast<const char*>(tile.source +
                                         static_cast<uint64_t>(row * layout_.row_bytes) +
                                         static_cast<uint64_t>(param * layout_.param_bytes));
  }
  // A segment's first parameter, counted from the chunk's first.
  TRAK_EXT_DEVICE static int segment_start(int stage, int segment) {
    return stage / kStagesPerSuperblock * kSuperblockParams +
           Tile::Entries::segment_start(stage % kStagesPerSuperblock, segment);
  }

  // Consecutive threads copy consecutive pieces of a row's segments; a thread's pieces are of the
  // same parameters in several rows.
  template <int kBytes>
  TRAK_EXT_DEVICE void fetch_async(const BlockTile& tile, int stage) const {
    // A segment is 32 elements of 4 or 2 bytes.
    const int elements = layout_.element_bytes == 4 ? kBytes / 4 : kBytes / 2;
    const int pieces_log2 = (kBytes == 16 ? 2 : 4) + (layout_.element_bytes == 4 ? 1 : 0);
    const int thread = device::thread_index();
    const int piece = thread & ((1 << pieces_log2) - 1);
    const int segment = (thread >> pieces_log2) % kSegments;
    const int first_row = (thread >> pieces_log2) / kSegments;
    const int row_step = (Tile::kThreads >> pieces_log2) / kSegments;
    const int param = segment_start(stage, segment) + piece * elements;
    const bool inside = param >= tile.begin && param + elements <= tile.end;
    const char* from = source_of(tile, first_row, param);
    const auto from_step = static_cast<uint64_t>(row_step * layout_.row_bytes);
    char* to = slot_of(stage) + first_row * layout_.row_pitch + segment * layout_.segment_pitch +
               piece * kBytes;
    int row = first_row;
#pragma unroll kCopiesUnrolled
    for (const int rows = inside ? tile.rows : 0; row < rows; row += row_step) {
      device::copy_async<kBytes>(to, from);
      from = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) + from_step);
      to += row_step * layout_.row_pitch;
    }
#pragma unroll 1
    for (; row < Tile::kRows; row += row_step) {
      store_piece(tile, to, row, param, elements);
      to += row_step * layout_.row_pitch;
    }
  }

  // A piece that reaches over the tensor's border: what is outside is zero.
  TRAK_EXT_DEVICE void store_piece(const BlockTile& tile, char* to, int row, int param,
                                   int elements) const {
#pragma unroll 1
    for (int i = 0; i < elements; ++i) {
      const bool inside = row < tile.rows && param + i >= tile.begin && param + i < tile.end;
      if (layout_.element_bytes == 4) {
        device::store_shared<uint32_t>(
            to + 4 * i,
            inside ? device::load_global<uint32_t>(source_of(tile, row, param + i)) : 0u);
      } else {
        const uint16_t zero = 0;
        device::store_shared<uint16_t>(
            to + 2 * i,
            inside ? device::load_global<uint16_t>(source_of(tile, row, param + i)) : zero);
      }
    }
  }

  TRAK_EXT_DEVICE void fetch_plain(const BlockTile& tile, int stage) const {
#pragma unroll 1
    for (int i = device::thread_index(); i < Tile::kRows * kStageParams; i += Tile::kThreads) {
      const int element = i % kSegmentParams;
      const int segment = i / kSegmentParams % kSegments;
      const int row = i / kStageParams;
      const int param = segment_start(stage, segment) + element;
      float value = 0.0f;
      if (row < tile.rows && param >= tile.begin && param < tile.end) {
        value = load_element(source_of(tile, row, param), dtype_);
      }
      device::store_shared<float>(
          slot_of(stage) + row * layout_.row_pitch + segment * layout_.segment_pitch + 4 * element,
          value);
    }
  }

  const DType dtype_;
  const RawLayout& layout_;
  const BlockTile* const tile_;  // in shared memory: registers are short where it is not used
  char* const slots_;
};

}  // namespace trak_ext
