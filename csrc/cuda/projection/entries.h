// How entries of the matrix are made: as fragments of the matrix instruction, in registers, each by
// the thread that multiplies it.
//
// The order of the summed index inside a matrix instruction is free, as long as both operands have
// it. Of the 16 parameters of a step, thread (g, t) holds four, for columns g and g + 8 of each
// column tile; they are chosen so that a thread needs no Philox block but its own. For both kinds
// place_of says which two parameters of a superblock meet in slot t of a half step of a stage.
// A warp has 16 columns a tile in the warp's instruction and in the warpgroup's alike.
#pragma once

#include "../../law/normal.h"
#include "../../law/philox.h"
#include "../../law/rademacher.h"
#include "../device/device.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

// The parameters of a superblock that one register of 32 bits holds.
struct OperandPlace {
  int lower;
  int upper;
};

// Slot t owns Philox block t of the superblock: parameters 128 t .. + 127. Stage w takes word w of
// it. Step s takes bits 15 - 2s and 31 - 2s, which one mask brings to the two halves of a register,
// and bits 14 - 2s and 30 - 2s, which doubling the word brings to the same place.
template <int kColumnTiles>
class RademacherEntries {
 public:
  static constexpr int kStepsUnrolled = 8;
  static constexpr int kSharedBytes = 0;

  // Half 2 s + h of a stage takes the bits that step s brings to registers 2 h and 2 h + 1.
  TRAK_EXT_DEVICE static OperandPlace place_of(int stage, int half, int slot) {
    const int lower = 128 * slot + 32 * stage + 15 - half;
    return {lower, lower + 16};
  }

  TRAK_EXT_DEVICE RademacherEntries(const MultiplyProblem& problem, int64_t column,
                                    char* /*shared*/)
      : stream_{problem.law.seed_low, problem.law.seed_high, problem.law.model_id,
                static_cast<uint32_t>(column)},
        mask_(problem.sign_mask),
        plus_ones_(problem.plus_ones),
        two_(problem.two) {}

  TRAK_EXT_DEVICE void begin_superblock(uint64_t superblock) {
    const uint64_t block = superblock * (kSuperblockParams >> kRademacherBlockLog2) +
                           static_cast<uint64_t>(device::thread_index() % 4);
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      ColumnStream stream = stream_;
      stream.column += static_cast<uint32_t>(8 * i);
      words_[i] = block_words(stream, block);
    }
  }

  // Words move down rather than being indexed: the loop over stages stays a loop, and a quarter as
  // long in the instruction cache.
  TRAK_EXT_DEVICE void begin_stage() {
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      current_[i] = words_[i].word[0];
#pragma unroll
      for (int j = 0; j < 3; ++j) words_[i].word[j] = words_[i].word[j + 1];
    }
  }

  // The next step's fragments, a[column tile].
  TRAK_EXT_DEVICE void next_step(uint32_t (&a)[kColumnTiles][4]) {
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) tile_step(i, 0, a[i]);
  }

  // The same, or one column tile's alone: every tile takes its steps in order.
  TRAK_EXT_DEVICE void tile_step(int tile, int /*step*/, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& word = current_[2 * tile + i];
      a[i] = pair_of_signs(word);
      // A product, not a shift: shifts compete with the mask for one pipe. The compiler would see
      // through a 2 that it knows.
      word *= two_;
      a[2 + i] = pair_of_signs(word);
      word *= two_;
    }
  }

  TRAK_EXT_DEVICE void end_stage() {}

 private:
  // bf16 +1 or -1 for bits 15 and 31: a sign bit is the inverse of the law's bit.
  TRAK_EXT_DEVICE uint32_t pair_of_signs(uint32_t word) const {
    return device::clear_then_set(word, mask_, plus_ones_);
  }

  const ColumnStream stream_;  // of this thread's first column
  const uint32_t mask_;
  const uint32_t plus_ones_;
  const uint32_t two_;
  PhiloxWords words_[2 * kColumnTiles];
  uint32_t current_[2 * kColumnTiles];
};

TRAK_EXT_DEVICE_TABLE float kDeviceNormalTable[kNormalRows][kNormalTerms] = {TRAK_EXT_NORMAL_TABLE};

// A step is 16 consecutive parameters: four Philox blocks, of which slot t owns block t.
template <int kColumnTiles>
class NormalEntries {
 public:
  static constexpr int kStepsUnrolled = 1;
  static constexpr int kSharedBytes = sizeof(float) * kNormalRows * kNormalTerms;

  TRAK_EXT_DEVICE static OperandPlace place_of(int stage, int half, int slot) {
    const int lower = kStageParams * stage + kStepParams * (half / 2) + 4 * slot + 2 * (half % 2);
    return {lower, lower + 1};
  }

  // The table goes to shared memory; the block's first barrier makes it visible.
  TRAK_EXT_DEVICE NormalEntries(const MultiplyProblem& problem, int64_t column, char* shared)
      : stream_{problem.law.seed_low, problem.law.seed_high, problem.law.model_id,
                static_cast<uint32_t>(column)},
        table_(shared) {
    const int i = device::thread_index();
    static_assert(kNormalRows * kNormalTerms == 256, "one constant a thread");
    if (i < kNormalRows * kNormalTerms) {
      device::store_shared<float>(shared + sizeof(float) * i,
                                  kDeviceNormalTable[i / kNormalTerms][i % kNormalTerms]);
    }
  }

  TRAK_EXT_DEVICE void begin_superblock(uint64_t superblock) {
    block_ = superblock * (kSuperblockParams >> kNormalBlockLog2) +
             static_cast<uint64_t>(device::thread_index() % 4);
  }

  TRAK_EXT_DEVICE void begin_stage() {}

  TRAK_EXT_DEVICE void next_step(uint32_t (&a)[kColumnTiles][4]) {
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) tile_step(i, 0, a[i]);
    block_ += kStepBlocks;
  }

  // One column tile's fragments, of the step-th step from where the block stands.
  TRAK_EXT_DEVICE void tile_step(int tile, int step, uint32_t (&a)[4]) const {
    const auto* table = static_cast<const float (*)[kNormalTerms]>(
        __builtin_assume_aligned(table_, sizeof(float) * kNormalTerms));
    const uint64_t block = block_ + static_cast<uint64_t>(kStepBlocks * step);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ColumnStream stream = stream_;
      stream.column += static_cast<uint32_t>(16 * tile + 8 * i);
      const PhiloxWords words = block_words(stream, block);
      float entry[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) entry[j] = normal_unrounded(words.word[j], table);
      // The law's rounding to bf16, two at a time.
      a[i] = device::pack_nearest(entry[0], entry[1]);
      a[2 + i] = device::pack_nearest(entry[2], entry[3]);
    }
  }

  // Moves on to the next stage where tile_step was called for this one.
  TRAK_EXT_DEVICE void end_stage() { block_ += kStepBlocks * kSteps; }

 private:
  static constexpr int kStepBlocks = 4;
  const ColumnStream stream_;  // of this thread's first column
  const char* const table_;
  uint64_t block_ = 0;
};

}  // namespace trak_ext::cuda
