// What the warpgroups of a block multiply, on its way from global memory: a ring of slots in shared
// memory, a stage of two steps a slot. Features are copied in pieces of 16 bytes by all threads;
// targets, which the tensor cores read, in one copy by one thread, counted by the slot's barrier.
//
// A stage has the features of the block's samples as they are stored, [2 steps, rows, 16 features],
// and the parts of its targets (split_operand_kernel in split_targets_kernel.h), one piece of
// memory. Stages follow one another through a tile's checkpoints and on into the block's next tile,
// so that the copies never pause.
#pragma once

#include "../device/device.h"
#include "../device/element.h"
#include "scoring_launch.h"

namespace trak_ext::cuda {

constexpr int kStageSteps = 2;
constexpr int kStageFeatures = kStageSteps * kStepFeatures;
// The features of a checkpoint are filled up with zeros to a multiple of these; a sum that they
// join does not change.
constexpr int kPeriodStages = 2;
constexpr int kPeriodFeatures = kPeriodStages * kStageFeatures;

inline int32_t count_stages(int64_t proj_dim) {
  return static_cast<int32_t>((proj_dim + kPeriodFeatures - 1) / kPeriodFeatures * kPeriodStages);
}

template <class Tile>
class ScoringStages {
 public:
  TRAK_EXT_DEVICE ScoringStages(const ScoringLaunch<float>& launch, char* shared)
      : launch_(launch), shared_(shared), tile_(static_cast<int>(device::block_index())) {
    if (launch.checkpoints == 0) tile_ = launch.tiles;
    if (tile_ < launch.tiles) begin_checkpoint();
    if (device::thread_index() == 0) {
      for (int slot = 0; slot < Tile::kSlots; ++slot) device::begin_arrivals(filled(slot), 1);
      device::publish_arrivals();
    }
  }

  TRAK_EXT_DEVICE char* slot_of(int slot) const { return shared_ + slot * Tile::kSlotBytes; }

  // Waits for the targets of a slot that is filled for an even or odd time.
  TRAK_EXT_DEVICE void wait_targets(int slot, int odd) const {
    device::wait_arrivals(filled(slot), odd);
  }

  // Starts bringing the next stage into a slot. Every call is a group of copies, so that groups can
  // be counted; past the end it is empty. kEnds: it may be the last stage of a checkpoint; the
  // number of these is even.
  template <bool kEnds = true>
  TRAK_EXT_DEVICE void next(int slot) {
    if (tile_ < launch_.tiles) {
      fetch_features(slot_of(slot));
      if (device::thread_index() == 0) fetch_targets(slot);
      ++stage_;
      if (kEnds && stage_ == launch_.stages) {
        stage_ = 0;
        if (++checkpoint_ == launch_.checkpoints) {
          checkpoint_ = 0;
          tile_ += launch_.blocks;
        }
        if (tile_ < launch_.tiles) begin_checkpoint();
      }
    }
    device::commit_copies();
  }

  // Where a lane's four features of a step are, of a sample and 4 slot .. + 3.
  TRAK_EXT_DEVICE static int quad_offset(int row, int step, int slot) {
    return step * Tile::kStepFeatureBytes + (row * kStepFeatures + 4 * slot) * Tile::kElementBytes;
  }

 private:
  static constexpr int kPieceBytes = 16;
  static constexpr int kPieceElements = kPieceBytes / Tile::kElementBytes;
  static constexpr int kPieces = kStageFeatures / kPieceElements;  // of a row
  static constexpr int kRowStep = Tile::kThreads / kPieces;
  static_assert(Tile::kRows % kRowStep == 0, "every thread copies as many pieces");

  // Registers are short: what is needed seldom is worked out anew.
  TRAK_EXT_DEVICE void begin_checkpoint() {
    const ScoringBlock block = locate_scoring_tile(launch_, tile_, Tile::kRows, Tile::kTargets);
    const FeatureRows features = launch_.features[checkpoint_];
    last_row_ = block.rows - 1;
    from_ = static_cast<const char*>(features.data) +
            (launch_.first_row + block.row) * features.row_stride * Tile::kElementBytes +
            device::thread_index() % kPieces * kPieceBytes;
    targets_ =
        launch_.packed + (block.target / Tile::kTargets * launch_.checkpoints + checkpoint_) *
                             launch_.stages * int64_t{Tile::kTargetBytes};
  }

  // Consecutive threads copy consecutive pieces of a row.
  TRAK_EXT_DEVICE void fetch_features(char* to) {
    const int piece = device::thread_index() % kPieces;
    const int first_row = device::thread_index() / kPieces;
    const int64_t row_bytes = launch_.features[checkpoint_].row_stride * Tile::kElementBytes;
    const int64_t left =
        launch_.proj_dim - stage_ * int64_t{kStageFeatures} - piece * kPieceElements;
    to += quad_offset(first_row, piece * kPieceElements / kStepFeatures, 0) +
          piece * kPieceElements % kStepFeatures * Tile::kElementBytes;
    // Samples that do not exist are the last one again; their scores go nowhere.
    if (launch_.aligned_pieces && left >= kPieceElements) {
      const auto pitch = static_cast<uint32_t>(row_bytes);
#pragma unroll
      for (int i = 0; i < Tile::kRows; i += kRowStep) {
        const auto row =
            static_cast<uint32_t>(first_row + i < last_row_ ? first_row + i : last_row_);
        device::copy_async<kPieceBytes>(to + quad_offset(i, 0, 0), from_ + uint64_t{row} * pitch);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Tile::kRows; i += kRowStep) {
        const int row = first_row + i < last_row_ ? first_row + i : last_row_;
        copy_elements(to + quad_offset(i, 0, 0), from_ + row * row_bytes, left);
      }
    }
    from_ += kStageFeatures * Tile::kElementBytes;
  }

  // The elements that exist, one by one, and zeros for the others.
  TRAK_EXT_DEVICE static void copy_elements(char* to, const char* from, int64_t count) {
#pragma unroll 1
    for (int i = 0; i < kPieceElements; ++i) {
      const bool exists = i < count;
      if constexpr (Tile::kElementBytes == 4) {
        device::store_shared<uint32_t>(
            to + 4 * i, exists ? device::load_global<uint32_t>(from + 4 * i) : uint32_t{0});
      } else {
        device::store_shared<uint16_t>(
            to + 2 * i, exists ? device::load_global<uint16_t>(from + 2 * i) : uint16_t{0});
      }
    }
  }

  // One thread.
  TRAK_EXT_DEVICE void fetch_targets(int slot) {
    device::expect_bytes(filled(slot), Tile::kTargetBytes);
    device::copy_bulk(slot_of(slot) + Tile::kFeatureBytes,
                      targets_ + stage_ * int64_t{Tile::kTargetBytes}, Tile::kTargetBytes,
                      filled(slot));
  }

  TRAK_EXT_DEVICE char* filled(int slot) const {
    return shared_ + Tile::kSlots * Tile::kSlotBytes + Tile::kScaleBytes + 8 * slot;
  }

  const ScoringLaunch<float>& launch_;
  char* const shared_;
  // The next stage's.
  int tile_;
  int checkpoint_ = 0;
  int stage_ = 0;
  int last_row_ = 0;               // of the tile
  const char* from_ = nullptr;     // this thread's piece of the tile's first row
  const char* targets_ = nullptr;  // of the tile and checkpoint
};

}  // namespace trak_ext::cuda
