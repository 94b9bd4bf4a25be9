// The gradient tile of a block as fragments of the warp's matrix instruction, in shared memory.
// Which parameters meet in an instruction is the matrix kind's business (Entries::unit_source).
#pragma once

#include "device.h"
#include "element.h"
#include "gradient_slots.h"
#include "multiply_problem.h"

namespace trak_ext {

template <class Tile>
class GradientTile {
 public:
  // Fragments of a step and eight rows: [kPasses / 2, 32 lanes] of 16 bytes, two passes, then if
  // the number is odd [32 lanes] of 8 bytes, the last pass. Steps and row tiles: [kSteps,
  // kRowTiles].
  static constexpr int kStepBytes = Tile::kPasses * 32 * 8;
  static constexpr int kFragmentBytes = kSteps * Tile::kRowTiles * kStepBytes;
  static constexpr int kSharedBytes = GradientSlots<Tile>::kSharedBytes + 2 * kFragmentBytes;

  TRAK_EXT_DEVICE GradientTile(const MultiplyProblem& problem, const BlockTile* tile, char* shared)
      : slots_(problem, tile, shared), fragments_(shared + GradientSlots<Tile>::kSharedBytes) {}

  TRAK_EXT_DEVICE void fetch(int stage) const { slots_.fetch(stage); }

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
      const char* segment = slots_.slot_of(stage) +
                            (row_tile * 8 + lane / 4) * slots_.layout().row_pitch +
                            from.segment * slots_.layout().segment_pitch;
      float first[4], second[4], ordered[8];
      load_quad(segment + 4 * from.first * slots_.layout().element_bytes, slots_.layout().dtype,
                first);
      load_quad(segment + 4 * from.second * slots_.layout().element_bytes, slots_.layout().dtype,
                second);
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
  const GradientSlots<Tile> slots_;
  char* const fragments_;
};

}  // namespace trak_ext
