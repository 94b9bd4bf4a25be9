// The operand of a block on its way from global memory, for the warp's matrix instruction: a ring
// in shared memory, of slots of one or more stages, filled by asynchronous copies of all threads.
#pragma once

#include "../device/device.h"
#include "block_tile.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

template <class Tile>
class OperandSlots {
 public:
  static constexpr int kStepBytes = Tile::kPasses * 2 * Tile::kRowTiles * kCoreBytes;
  static constexpr int kStageBytes = kSteps * kStepBytes;
  static constexpr int kSlotBytes = Tile::kSlotStages * kStageBytes;
  static constexpr int kSharedBytes = Tile::kSlots * kSlotBytes;
  static_assert(kStagesPerSuperblock % Tile::kSlotStages == 0, "a chunk is a number of slots");

  TRAK_EXT_DEVICE OperandSlots(const char* operand, int num_slots, char* shared)
      : from_(operand + 16 * device::thread_index()), num_slots_(num_slots), shared_(shared) {}

  // Starts filling a slot of the chunk; past the last there is nothing to bring. Every call is a
  // group of copies, so that groups can be counted.
  TRAK_EXT_DEVICE void fetch(int slot) const {
    if (slot < num_slots_) {
      const char* from = from_ + static_cast<int64_t>(slot) * kSlotBytes;
      char* to = at(slot, 0) + 16 * device::thread_index();
      constexpr int kPieceBytes = 16 * Tile::kThreads;
#pragma unroll
      for (int before = 0; before < kSlotBytes; before += kPieceBytes) {
        if (before + kPieceBytes <= kSlotBytes ||
            before + 16 * device::thread_index() < kSlotBytes) {
          device::copy_async<16>(to + before, from + before);
        }
      }
    }
    device::commit_copies();
  }

  // Where a stage of a slot of the chunk is.
  TRAK_EXT_DEVICE char* at(int slot, int stage) const {
    return shared_ + static_cast<unsigned>(slot) % Tile::kSlots * kSlotBytes + stage * kStageBytes;
  }

  // Passes whose fragments are loaded together: pairs of core matrices come one or two at a time.
  static constexpr int kPassesAtOnce = Tile::kRowTiles == 1 && Tile::kPasses == 2 ? 2 : 1;

  // The fragments of a step of a stage from pass `first` on, b[pass][eight rows][register]: a core
  // matrix a register. The registers of an instruction follow one another, or it would need moves.
  TRAK_EXT_DEVICE static void load_passes(const char* stage, int step, int first,
                                          uint32_t (&b)[kPassesAtOnce][Tile::kRowTiles][2]) {
    constexpr int kHalfBytes = Tile::kRowTiles * kCoreBytes;
    constexpr int kPairs = kPassesAtOnce * Tile::kRowTiles;
    constexpr int kPairBytes = Tile::kRowTiles == 1 ? 2 * kHalfBytes : kCoreBytes;
    const char* from = stage + step * kStepBytes + first * 2 * kHalfBytes;
    uint32_t* registers = &b[0][0][0];
#pragma unroll
    for (int i = 0; i + 2 <= kPairs; i += 2) {
      device::load_four_matrices(from + i * kPairBytes, kHalfBytes, kPairBytes, registers + 2 * i);
    }
    if constexpr (kPairs == 1) device::load_two_matrices(from, kHalfBytes, registers);
  }

 private:
  const char* const from_;  // this thread's first piece
  const int num_slots_;
  char* const shared_;
};

}  // namespace trak_ext::cuda
