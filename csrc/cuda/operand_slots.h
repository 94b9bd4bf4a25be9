// The operand of a block on its way from global memory, for the warp's matrix instruction: a ring
// of stages in shared memory, filled by asynchronous copies of all threads.
#pragma once

#include "block_tile.h"
#include "device.h"
#include "multiply_problem.h"

namespace trak_ext {

template <class Tile>
class OperandSlots {
 public:
  static constexpr int kStepBytes = Tile::kPasses * 2 * Tile::kRowTiles * kCoreBytes;
  static constexpr int kStageBytes = kSteps * kStepBytes;
  static constexpr int kSharedBytes = Tile::kSlots * kStageBytes;

  TRAK_EXT_DEVICE OperandSlots(const char* operand, int num_stages, char* shared)
      : from_(operand + 16 * device::thread_index()), num_stages_(num_stages), shared_(shared) {}

  // Starts bringing a stage into its slot; past the last stage there is nothing to bring. Every
  // call is a group of copies, so that groups can be counted.
  TRAK_EXT_DEVICE void fetch(int stage) const {
    if (stage < num_stages_) {
      const char* from = from_ + static_cast<int64_t>(stage) * kStageBytes;
      char* to = slot_of(stage) + 16 * device::thread_index();
      constexpr int kPieceBytes = 16 * Tile::kThreads;
#pragma unroll
      for (int before = 0; before < kStageBytes; before += kPieceBytes) {
        if (before + kPieceBytes <= kStageBytes ||
            before + 16 * device::thread_index() < kStageBytes) {
          device::copy_async<16>(to + before, from + before);
        }
      }
    }
    device::commit_copies();
  }

  // The fragments of a step of a stage, b[pass][register][eight rows]: a core matrix a register.
  TRAK_EXT_DEVICE void load_step(int stage, int step,
                                 uint32_t (&b)[Tile::kPasses][2][Tile::kRowTiles]) const {
    const char* from = slot_of(stage) + step * kStepBytes;
    constexpr int kMatrices = Tile::kPasses * 2 * Tile::kRowTiles;
    uint32_t* registers = &b[0][0][0];
#pragma unroll
    for (int i = 0; i + 4 <= kMatrices; i += 4) {
      device::load_four_matrices(from + i * kCoreBytes, registers + i);
    }
    if constexpr (kMatrices % 4 == 2) {
      device::load_two_matrices(from + (kMatrices - 2) * kCoreBytes, registers + kMatrices - 2);
    }
  }

 private:
  TRAK_EXT_DEVICE char* slot_of(int stage) const {
    return shared_ + static_cast<unsigned>(stage) % Tile::kSlots * kStageBytes;
  }

  const char* const from_;  // this thread's first piece
  const int num_stages_;
  char* const shared_;
};

}  // namespace trak_ext
