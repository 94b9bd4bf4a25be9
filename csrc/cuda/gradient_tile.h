// Where the gradient tile of a block comes from: global memory, through a ring of raw slots filled
// by asynchronous copies, into fragments for the matrix instruction. Which parameters meet in an
// instruction is the matrix kind's business (Entries::segment_start, Entries::unit_source).
#pragma once

#include "device.h"
#include "element.h"
#include "multiply_problem.h"

namespace trak_ext {

constexpr int kStepParams = 16;  // parameters a matrix instruction
constexpr int kSteps = kStageParams / kStepParams;

template <class Tile>
class GradientTile {
 public:
  static constexpr int kSlotBytes =
      Tile::kRows * kSegments * (kSegmentParams * 4 + kSegmentPadBytes);
  // Fragments of a step and eight rows: [kPasses / 2, 32 lanes] of 16 bytes, two passes, then if
  // the number is odd [32 lanes] of 8 bytes, the last pass. Steps and row tiles: [kSteps,
  // kRowTiles].
  static constexpr int kStepBytes = Tile::kPasses * 32 * 8;
  static constexpr int kFragmentBytes = kSteps * Tile::kRowTiles * kStepBytes;
  static constexpr int kSharedBytes = Tile::kSlots * kSlotBytes + 2 * kFragmentBytes;

  TRAK_EXT_DEVICE GradientTile(const MultiplyProblem& problem, const BlockTile* tile, char* shared)
      : dtype_(problem.grad.dtype),
        layout_(problem.layout),
        tile_(tile),
        slots_(shared),
        fragments_(shared + Tile::kSlots * kSlotBytes) {}

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

  // Turns a raw stage into fragments. A unit is eight elements of a row, for two steps. Lane
  // (g, t) makes what lane (g, t) of every warp will read, an access of all lanes at a time. In the
  // reads eight lanes have two rows g, which are 4 pads apart, and four t, which are one pad or one
  // quad apart: all banks differ. In the writes lanes follow one another.
  TRAK_EXT_DEVICE void make_fragments(int stage) const {
    char* fragments = fragments_ + stage % 2 * kFragmentBytes;
    constexpr int kUnits = kSteps / 2 * Tile::kRowTiles * 32;
#pragma unroll
    for (int before = 0; before < kUnits; before += Tile::kThreads) {
      const int unit = before + device::thread_index();
      if (before + Tile::kThreads > kUnits && unit >= kUnits) break;
      const int lane = unit % 32;
      const int row_tile = unit / 32 % Tile::kRowTiles;
      const int pair = unit / 32 / Tile::kRowTiles;
      const UnitSource from = Tile::Entries::unit_source(pair, lane % 4);
      const char* segment = slot_of(stage) + (row_tile * 8 + lane / 4) * layout_.row_pitch +
                            from.segment * layout_.segment_pitch;
      float first[4], second[4], ordered[8];
      load_quad(segment + 4 * from.first * layout_.element_bytes, layout_.dtype, first);
      load_quad(segment + 4 * from.second * layout_.element_bytes, layout_.dtype, second);
      Tile::Entries::order_unit(first, second, ordered);
      char* to = fragments + (2 * pair * Tile::kRowTiles + row_tile) * kStepBytes;
      store_step(to, lane, ordered);
      store_step(to + Tile::kRowTiles * kStepBytes, lane, ordered + 4);
    }
  }

  // The fragments of rows 8 row_tile .. + 7 for a step of a stage: b[pass][register].
  TRAK_EXT_DEVICE void load_step(int stage, int step, int row_tile,
                                 uint32_t (&b)[Tile::kPasses][2]) const {
    const char* from =
        fragments_ + stage % 2 * kFragmentBytes + (step * Tile::kRowTiles + row_tile) * kStepBytes;
    const int lane = device::thread_index() % 32;
#pragma unroll
    for (int pass = 0; pass + 1 < Tile::kPasses; pass += 2) {
      const auto words = device::load_shared<Words4>(from + pass * kPassBytes + lane * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[pass + i / 2][i % 2] = words.word[i];
    }
    if constexpr (Tile::kPasses % 2 == 1) {
      constexpr int kLast = Tile::kPasses - 1;
      const auto words = device::load_shared<Words2>(from + kLast * kPassBytes + lane * 8);
      b[kLast][0] = words.word[0];
      b[kLast][1] = words.word[1];
    }
  }

 private:
  TRAK_EXT_DEVICE const char* source_of(const BlockTile& tile, int row, int param) const {
    return reinterpret_cast<const char*>(tile.source +
                                         static_cast<uint64_t>(row * layout_.row_bytes) +
                                         static_cast<uint64_t>(param * layout_.param_bytes));
  }
  TRAK_EXT_DEVICE char* slot_of(int stage) const {
    return slots_ + static_cast<unsigned>(stage) % Tile::kSlots * kSlotBytes;
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
#pragma unroll 1
    for (int row = first_row; row < Tile::kRows; row += row_step) {
      if (row < tile.rows && inside) {
        device::copy_async<kBytes>(to, from);
      } else {
        store_piece(tile, to, row, param, elements);
      }
      from = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) + from_step);
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

  // Splits a step's four elements of a lane, in the order of register halves, and stores the parts.
  TRAK_EXT_DEVICE static void store_step(char* to, int lane, const float* elements) {
    uint32_t parts[2][Tile::kPasses];  // [register][pass]
    split_pair<Tile::kPasses>(elements[0], elements[1], parts[0]);
    split_pair<Tile::kPasses>(elements[2], elements[3], parts[1]);
#pragma unroll
    for (int pass = 0; pass + 1 < Tile::kPasses; pass += 2) {
      const Words4 words = {
          {parts[0][pass], parts[1][pass], parts[0][pass + 1], parts[1][pass + 1]}};
      device::store_shared<Words4>(to + pass * kPassBytes + lane * 16, words);
    }
    if constexpr (Tile::kPasses % 2 == 1) {
      constexpr int kLast = Tile::kPasses - 1;
      const Words2 words = {{parts[0][kLast], parts[1][kLast]}};
      device::store_shared<Words2>(to + kLast * kPassBytes + lane * 8, words);
    }
  }

  static constexpr int kPassBytes = 32 * 8;
  const DType dtype_;
  const RawLayout& layout_;
  const BlockTile* const tile_;  // in shared memory: registers are short where it is not used
  char* const slots_;
  char* const fragments_;
};

}  // namespace trak_ext
