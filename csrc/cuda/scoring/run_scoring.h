// Scores as launches: which samples, targets and checkpoints each one takes, so that what they need
// fits in the workspace. Host code without a call of the CUDA runtime, so that the tests run it as
// it is.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../../division.h"
#include "scorers.h"
#include "scoring.h"
#include "top_k_kernel.h"

namespace trak_ext::cuda {

constexpr int64_t kSlabRowsMin = 1024;  // samples whose scores wait for the running top-k
constexpr int64_t kSelectBlocksWanted = 512;
constexpr int64_t kGroupsMax = 64;
constexpr int64_t kLaunchBlocksMax = int64_t{1} << 30;

// Where scores go; strides in elements.
template <class T>
struct ScoresView {
  T* data;
  int64_t row_stride;
  int64_t target_stride;
};

// How a problem is cut. The cut changes no result.
struct ScoringPlan {
  int64_t targets;      // at a time
  int64_t checkpoints;  // a launch
  int64_t rows;         // scored before they go into the lists; top-k only
  int groups;           // lists a target; top-k only
  int64_t packed_bytes;
  int64_t list_places;  // of all targets and groups
};

template <class T>
int64_t candidate_bytes() {
  return static_cast<int64_t>(sizeof(T) + sizeof(int64_t));
}

// Bytes of the parts of one checkpoint's targets.
template <class T>
int64_t packed_bytes(const Scorer<T>& scorer, const ScoringProblem<T>& problem, int64_t targets) {
  return packed_bytes(targets, scorer.tile_targets, problem.proj_dim, scorer.feature_multiple,
                      scorer.parts);
}

// The least workspace a tile of targets needs: one checkpoint's parts, and for the best `count`
// (0: all scores are wanted) its lists and the scores of some samples.
template <class T>
int64_t tile_workspace(const Scorer<T>& scorer, const ScoringProblem<T>& problem, int64_t count,
                       int groups) {
  const int64_t tile_packed = packed_bytes(scorer, problem, scorer.tile_targets);
  if (count == 0) return tile_packed;
  return tile_packed +
         std::min<int64_t>(scorer.tile_targets, problem.num_targets) *
             (groups * count * candidate_bytes<T>() +
              std::min(kSlabRowsMin, problem.num_train) * static_cast<int64_t>(sizeof(T)));
}

// As many targets at a time as fit, since features are read anew for the next ones; then
// checkpoints and samples.
template <class T>
ScoringPlan plan_scoring(const Scorer<T>& scorer, const ScoringProblem<T>& problem, int64_t count,
                         int64_t workspace_bytes) {
  const int64_t tile = scorer.tile_targets;
  ScoringPlan plan = {};
  plan.groups = static_cast<int>(std::clamp<int64_t>(
      kSelectBlocksWanted / std::max<int64_t>(problem.num_targets, 1), 1, kGroupsMax));
  if (tile_workspace(scorer, problem, count, plan.groups) > workspace_bytes) plan.groups = 1;
  const int64_t least = tile_workspace(scorer, problem, count, plan.groups);
  if (workspace_bytes < least) {
    throw std::invalid_argument("workspace: expected at least " + std::to_string(least) +
                                " bytes, got " + std::to_string(workspace_bytes));
  }
  int64_t tiles = ceil_div(problem.num_targets, tile);
  if (least > 0) tiles = std::min(tiles, workspace_bytes / least);
  plan.targets = tiles * tile;
  int64_t left = workspace_bytes - tiles * least;

  const int64_t packed = packed_bytes(scorer, problem, plan.targets);
  plan.checkpoints = std::min<int64_t>(problem.num_checkpoints, kCheckpointsMax);
  if (packed > 0) {
    const int64_t more = (count == 0 ? left : left / 2) / packed;
    plan.checkpoints = std::min(plan.checkpoints, 1 + more);
    left -= std::max<int64_t>(plan.checkpoints - 1, 0) * packed;
  }
  plan.packed_bytes = plan.checkpoints * packed;
  if (count > 0) {
    const int64_t targets = std::min(plan.targets, problem.num_targets);
    plan.list_places = targets * plan.groups * count;
    const int64_t more = left / targets / static_cast<int64_t>(sizeof(T));
    plan.rows = std::min(problem.num_train, std::min(kSlabRowsMin, problem.num_train) + more);
  }
  return plan;
}

// What a problem can use at most.
template <class T>
int64_t wanted_workspace(const Scorer<T>& scorer, const ScoringProblem<T>& problem, int64_t count) {
  const auto all = static_cast<double>(packed_bytes(scorer, problem, problem.num_targets)) *
                       static_cast<double>(problem.num_checkpoints) +
                   (count == 0 ? 0.0
                               : static_cast<double>(problem.num_targets + scorer.tile_targets) *
                                     (static_cast<double>(kGroupsMax * count) *
                                          static_cast<double>(candidate_bytes<T>()) +
                                      static_cast<double>(problem.num_train) * sizeof(T)));
  return all < 1e18 ? static_cast<int64_t>(all) : INT64_MAX;
}

// `limit` at most, unless the least that it can do with is more.
template <class T>
int64_t scoring_workspace_bytes(const Scorer<T>& scorer, const ScoringProblem<T>& problem,
                                int64_t count, int64_t limit) {
  if (problem.num_train == 0 || problem.num_targets == 0) return 0;
  return std::max(tile_workspace(scorer, problem, count, 1),
                  std::min(limit, wanted_workspace(scorer, problem, count)));
}

// For sm_90a: the tile for so many targets, or a smaller one where the workspace is too small for
// it. As many blocks as the multiprocessors run at once make all tiles.
inline Scorer<float> choose_warpgroup_scorer(const ScoringProblem<float>& problem, int64_t count,
                                             int64_t workspace_bytes, int multiprocessors) {
  Scorer<float> scorer =
      warpgroup_scorer(problem.feature_dtype, bf16_parts(problem.precision), problem.num_targets);
  if (tile_workspace(scorer, problem, count, 1) > workspace_bytes) {
    scorer = warpgroup_scorer(problem.feature_dtype, bf16_parts(problem.precision),
                              std::min<int64_t>(problem.num_targets, kManyTargets));
  }
  scorer.blocks_max = multiprocessors * scorer.blocks_per_sm;
  return scorer;
}

// Where a launch's samples and targets are in the problem.
struct ScoringPart {
  int64_t first_row;
  int64_t rows;
  int64_t first_target;
  int64_t targets;
};

// Scores of some samples and targets. `packed_before`: the workspace holds these targets' parts,
// if all checkpoints' fit in it.
template <class T>
void run_score_part(const Scorer<T>& scorer, const ScoringProblem<T>& problem,
                    const ScoringPlan& plan, const ScoringPart& part, bool packed_before,
                    const ScoresView<T>& out, char* workspace, device::Stream stream) {
  ScoringLaunch<T> launch = {};
  launch.dtype = problem.feature_dtype;
  launch.num_train = problem.num_train;
  launch.num_targets = problem.num_targets;
  launch.proj_dim = problem.proj_dim;
  launch.first_target = part.first_target;
  launch.targets = part.targets;
  launch.packed = workspace;
  launch.out_row_stride = out.row_stride;
  launch.out_target_stride = out.target_stride;
  launch.stages = count_stages(problem.proj_dim);
  launch.steps = static_cast<int32_t>(ceil_div(problem.proj_dim, kStepFeatures));
  const int64_t target_tiles = ceil_div(part.targets, scorer.tile_targets);
  launch.target_tiles = static_cast<int32_t>(target_tiles);
  const int64_t rows_max = std::max<int64_t>(1, kLaunchBlocksMax / target_tiles) * scorer.tile_rows;
  // Without features a score is an empty sum: one launch, of no checkpoint.
  const int64_t all = problem.proj_dim == 0 ? 0 : problem.num_checkpoints;
  int64_t first = 0;
  do {
    const int64_t checkpoints = std::min(plan.checkpoints, all - first);
    launch.checkpoints = static_cast<int32_t>(checkpoints);
    launch.add = first > 0;
    launch.solved = problem.solved + first * problem.num_targets * problem.proj_dim;
    launch.coefficients =
        problem.coefficients ? problem.coefficients + first * problem.num_train : nullptr;
    launch.weights = first + checkpoints == all ? problem.weights : nullptr;
    launch.aligned_quads = true;
    launch.aligned_pieces = true;
    const int bytes = element_bytes(problem.feature_dtype);
    for (int64_t m = 0; m < checkpoints; ++m) {
      launch.features[m] = {problem.features[first + m], problem.row_strides[first + m]};
      const uint64_t odd = reinterpret_cast<uintptr_t>(launch.features[m].data) |
                           static_cast<uint64_t>(launch.features[m].row_stride * bytes);
      launch.aligned_quads &= odd % static_cast<uint64_t>(4 * bytes) == 0;
      launch.aligned_pieces &= odd % 16 == 0 && launch.features[m].row_stride <= INT32_MAX / bytes;
    }
    if (scorer.split && checkpoints > 0 && !(packed_before && checkpoints == all)) {
      const int64_t threads = packed_bytes(scorer, problem, part.targets) / 2 / scorer.parts /
                              scorer.split_features * checkpoints;
      device::launch(scorer.split, ceil_div(threads, kSplitThreads), kSplitThreads, 0, stream,
                     launch);
    }
    for (int64_t row = 0; row < part.rows; row += rows_max) {
      launch.first_row = part.first_row + row;
      launch.rows = std::min(rows_max, part.rows - row);
      launch.out = out.data + row * out.row_stride;
      launch.tiles = static_cast<int32_t>(ceil_div(launch.rows, scorer.tile_rows) * target_tiles);
      launch.blocks =
          scorer.blocks_max > 0 ? std::min(launch.tiles, scorer.blocks_max) : launch.tiles;
      device::launch(scorer.kernel, launch.blocks, scorer.threads, scorer.shared_bytes, stream,
                     launch);
    }
    first += checkpoints;
  } while (first < all);
}

// out[i, t] = score of sample i for target t.
template <class T>
void run_score(const Scorer<T>& scorer, const ScoringProblem<T>& problem, const ScoresView<T>& out,
               const ScoringWorkspace& workspace, device::Stream stream) {
  if (problem.num_train == 0 || problem.num_targets == 0) return;
  const ScoringPlan plan = plan_scoring(scorer, problem, 0, workspace.bytes);
  for (int64_t target = 0; target < problem.num_targets; target += plan.targets) {
    const ScoringPart part = {0, problem.num_train, target,
                              std::min(plan.targets, problem.num_targets - target)};
    run_score_part(scorer, problem, plan, part, false,
                   {out.data + target * out.target_stride, out.row_stride, out.target_stride},
                   workspace.data, stream);
  }
}

// values, indices [num_targets, count]: the best of the scores that run_score makes, to the bit.
// They mean nothing if *not_a_number, 0 before, becomes 1. Needs count <= num_train.
template <class T>
void run_top_k(const Scorer<T>& scorer, const ScoringProblem<T>& problem, int64_t count,
               const CandidateLists<T>& out, int32_t* not_a_number,
               const ScoringWorkspace& workspace, device::Stream stream) {
  if (count == 0 || problem.num_targets == 0) return;
  if (count > kTopKMax) {
    throw std::invalid_argument("count: expected at most " + std::to_string(kTopKMax) + ", got " +
                                std::to_string(count));
  }
  const ScoringPlan plan = plan_scoring(scorer, problem, count, workspace.bytes);
  const int places = top_k_places(static_cast<int>(count));
  const int shared_bytes = top_k_shared_bytes<T>(static_cast<int>(count));
  auto* indices = reinterpret_cast<int64_t*>(workspace.data + plan.packed_bytes);
  auto* values = reinterpret_cast<T*>(indices + plan.list_places);
  T* scores = values + plan.list_places;
  const CandidateLists<T> lists = {values, indices};
  for (int64_t target = 0; target < problem.num_targets; target += plan.targets) {
    const int64_t targets = std::min(plan.targets, problem.num_targets - target);
    for (int64_t row = 0; row < problem.num_train; row += plan.rows) {
      const int64_t rows = std::min(plan.rows, problem.num_train - row);
      run_score_part(scorer, problem, plan, {row, rows, target, targets}, row > 0,
                     {scores, 1, rows}, workspace.data, stream);
      const SelectLaunch<T> select = {
          scores, rows,     row,   plan.groups, static_cast<int32_t>(count),
          places, row == 0, lists, not_a_number};
      device::launch(select_kernel<T>, targets * plan.groups, kTopKThreads, shared_bytes, stream,
                     select);
    }
    const MergeLaunch<T> merge = {lists,
                                  {out.values + target * count, out.indices + target * count},
                                  plan.groups,
                                  static_cast<int32_t>(count),
                                  places};
    device::launch(merge_kernel<T>, targets, kTopKThreads, shared_bytes, stream, merge);
  }
}

}  // namespace trak_ext::cuda
