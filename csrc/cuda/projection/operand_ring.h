// The operand of a block on its way from global memory, for the warpgroup's matrix instruction: a
// ring of stages in shared memory. One thread starts a copy of a whole stage; a stage is there when
// its barrier in shared memory says so, and its slot is free when every warp that multiplies has
// said so at another. No barrier of the block is needed, so warpgroups go on at their own pace.
#pragma once

#include "../device/device.h"
#include "block_tile.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

template <class Tile>
class OperandRing {
 public:
  static constexpr int kHalfBytes = Tile::kRowTiles * kCoreBytes;
  static constexpr int kStepBytes = 2 * kHalfBytes;  // of one pass
  static constexpr int kStageBytes = kSteps * Tile::kPasses * kStepBytes;
  static constexpr int kSlotBytes = Tile::kSlots * kStageBytes;
  static constexpr int kSharedBytes = kSlotBytes + 2 * Tile::kSlots * 8;

  TRAK_EXT_DEVICE OperandRing(const char* operand, int num_stages, char* shared)
      : operand_(operand), num_stages_(num_stages), shared_(shared) {}

  // One thread, before a barrier of the block. Warps: those that will multiply.
  TRAK_EXT_DEVICE void begin(int warps) const {
    for (int slot = 0; slot < Tile::kSlots; ++slot) {
      device::begin_arrivals(filled(slot), 1);
      device::begin_arrivals(emptied(slot), warps);
    }
    device::publish_arrivals();
  }

  // One thread. The slot was never used, or is empty.
  TRAK_EXT_DEVICE void fill(int stage) const {
    if (stage >= num_stages_) return;
    const int slot = stage % Tile::kSlots;
    device::expect_bytes(filled(slot), kStageBytes);
    device::copy_bulk(shared_ + slot * kStageBytes,
                      operand_ + static_cast<int64_t>(stage) * kStageBytes, kStageBytes,
                      filled(slot));
  }

  TRAK_EXT_DEVICE void wait_filled(int stage) const {
    device::wait_arrivals(filled(stage % Tile::kSlots), stage / Tile::kSlots % 2);
  }

  // One thread of a warp that has multiplied the stage.
  TRAK_EXT_DEVICE void release(int stage) const { device::arrive(emptied(stage % Tile::kSlots)); }
  // One thread: waits until all warps have released the stage, and fills its slot with a later one.
  TRAK_EXT_DEVICE void refill(int stage) const {
    if (stage + Tile::kSlots >= num_stages_) return;
    device::wait_arrivals(emptied(stage % Tile::kSlots), stage / Tile::kSlots % 2);
    fill(stage + Tile::kSlots);
  }

  // What the matrix instruction is told of a stage's first step and pass; others lie further on.
  TRAK_EXT_DEVICE uint64_t describe(int stage) const {
    return device::describe_operand(shared_ + stage % Tile::kSlots * kStageBytes, kHalfBytes,
                                    kCoreBytes);
  }
  TRAK_EXT_DEVICE static uint64_t step_of(uint64_t operand, int step, int pass) {
    return device::move_operand(operand, (step * Tile::kPasses + pass) * kStepBytes);
  }

 private:
  TRAK_EXT_DEVICE char* filled(int slot) const { return shared_ + kSlotBytes + 8 * slot; }
  TRAK_EXT_DEVICE char* emptied(int slot) const { return filled(Tile::kSlots + slot); }

  const char* const operand_;
  const int num_stages_;
  char* const shared_;
};

}  // namespace trak_ext::cuda
