// The gradient tile of a block as the operand that a warpgroup's matrix instruction reads from
// shared memory. Which parameters meet in an instruction is the matrix kind's business
// (Entries::unit_source): the order of the summed index is free, so the parameter that a thread's
// register holds goes where the instruction multiplies that register with it.
#pragma once

#include "device.h"
#include "element.h"
#include "gradient_slots.h"
#include "multiply_problem.h"

namespace trak_ext {

template <class Tile>
class SharedOperand {
 public:
  // Core matrices of 8 rows and 8 places of the summed index, 16 bytes a row: [kPasses, kSteps, 2,
  // kRowTiles, 8 rows] of 16 bytes, the 2 being the halves of a step's 16 places.
  static constexpr int kCoreBytes = 128;
  static constexpr int kHalfBytes = Tile::kRowTiles * kCoreBytes;
  static constexpr int kStepBytes = 2 * kHalfBytes;
  static constexpr int kPassBytes = kSteps * kStepBytes;
  static constexpr int kStageBytes = Tile::kPasses * kPassBytes;
  static constexpr int kSharedBytes = GradientSlots<Tile>::kSharedBytes + 2 * kStageBytes;

  TRAK_EXT_DEVICE SharedOperand(const MultiplyProblem& problem, const BlockTile* tile, char* shared)
      : slots_(problem, tile, shared), operand_(shared + GradientSlots<Tile>::kSharedBytes) {}

  TRAK_EXT_DEVICE void fetch(int stage) const { slots_.fetch(stage); }

  // Turns a raw stage into the operand. In a half step's row, register pair t of the other operand
  // meets bytes 4 t to 4 t + 3; the four t have their parameters from four places. A unit is a row
  // and two steps, for kSlotsAUnit of the four, so that a batch of any size has a unit for a
  // thread. Eight lanes in a row read and write eight rows: all banks differ.
  TRAK_EXT_DEVICE void make_operand(int stage) const {
    switch (slots_.layout().dtype) {
      case DType::kFloat32:
        return make_operand_from<DType::kFloat32>(stage);
      case DType::kFloat16:
        return make_operand_from<DType::kFloat16>(stage);
      default:
        return make_operand_from<DType::kBFloat16>(stage);
    }
  }

  // What the matrix instruction is told of a stage's first step and pass; others lie further on.
  TRAK_EXT_DEVICE uint64_t describe(int stage) const {
    return device::describe_operand(operand_ + stage % 2 * kStageBytes, kHalfBytes, kCoreBytes);
  }
  TRAK_EXT_DEVICE static uint64_t step_of(uint64_t operand, int step, int pass) {
    return device::move_operand(operand, step * kStepBytes + pass * kPassBytes);
  }

 private:
  static constexpr int kSlotsAUnit = Tile::kRows >= 64 ? 4 : Tile::kRows == 32 ? 2 : 1;

  template <DType kDType>
  TRAK_EXT_DEVICE void make_operand_from(int stage) const {
    constexpr int kBytes = kDType == DType::kFloat32 ? 4 : 2;
    char* operand = operand_ + stage % 2 * kStageBytes;
    constexpr int kUnits = kSteps / 2 * 8 * Tile::kRowTiles * (4 / kSlotsAUnit);
#pragma unroll 1
    for (int unit = device::thread_index(); unit < kUnits; unit += Tile::kThreads) {
      const int row = unit % 8;
      const int pair = unit / 8 % 4;
      const int row_tile = unit / 32 % Tile::kRowTiles;
      const int first_slot = unit / 32 / Tile::kRowTiles * kSlotsAUnit;
      const RawLayout& layout = slots_.layout();
      const char* raw = slots_.slot_of(stage) + (8 * row_tile + row) * layout.row_pitch;
      float ordered[kSlotsAUnit][8];
#pragma unroll
      for (int i = 0; i < kSlotsAUnit; ++i) {
        const UnitSource from = Tile::Entries::unit_source(pair, first_slot + i);
        const char* segment = raw + from.segment * layout.segment_pitch;
        float first[4], second[4];
        load_quad(segment + 4 * from.first * kBytes, kDType, first);
        load_quad(segment + 4 * from.second * kBytes, kDType, second);
        Tile::Entries::order_unit(first, second, ordered[i]);
      }
      char* to =
          operand + 2 * pair * kStepBytes + row_tile * kCoreBytes + row * 16 + 4 * first_slot;
#pragma unroll
      for (int half = 0; half < 4; ++half) store_half(to + half * kHalfBytes, ordered, 2 * half);
    }
  }

  // Splits elements [slot][at] and [slot][at + 1] and stores the parts side by side.
  TRAK_EXT_DEVICE static void store_half(char* to, const float (&elements)[kSlotsAUnit][8],
                                         int at) {
    uint32_t parts[kSlotsAUnit][Tile::kPasses];
#pragma unroll
    for (int i = 0; i < kSlotsAUnit; ++i) {
      split_pair<Tile::kPasses>(elements[i][at], elements[i][at + 1], parts[i]);
    }
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      if constexpr (kSlotsAUnit == 4) {
        const Words4 words = {{parts[0][pass], parts[1][pass], parts[2][pass], parts[3][pass]}};
        device::store_shared<Words4>(to + pass * kPassBytes, words);
      } else if constexpr (kSlotsAUnit == 2) {
        const Words2 words = {{parts[0][pass], parts[1][pass]}};
        device::store_shared<Words2>(to + pass * kPassBytes, words);
      } else {
        device::store_shared<uint32_t>(to + pass * kPassBytes, parts[0][pass]);
      }
    }
  }

  const GradientSlots<Tile> slots_;
  char* const operand_;
};

}  // namespace trak_ext
