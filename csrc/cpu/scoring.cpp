// One pass over the training features in blocks of samples, on threads; scores either go to a
// matrix or into a running list of the best for every target.
#include "scoring.h"

#include <algorithm>
#include <limits>

#include "kernel_table.h"
#include "threads.h"

namespace trak_ext::cpu {
namespace {

template <class T>
const ScoringKernels<T>& scoring_kernels();
template <>
const ScoringKernels<float>& scoring_kernels<float>() {
  return kernels().score_float;
}
template <>
const ScoringKernels<double>& scoring_kernels<double>() {
  return kernels().score_double;
}

// No more threads than blocks of samples: each has scratch and lists of its own.
int threads_for(int64_t num_train, int num_threads) {
  return static_cast<int>(
      std::min<int64_t>(num_threads, std::max<int64_t>(1, ceil_div(num_train, kScoreRows))));
}

// Calls consume(thread, row_begin, row_end, target_begin, target_end, scores) for every block of
// scores, [rows][kScoreTargets], rows ascending within a thread and a range of targets.
template <class T, class Consume>
void for_each_block(const ScoringProblem<T>& problem, int num_threads, const Consume& consume) {
  const ScoringKernels<T>& kernel = scoring_kernels<T>();
  const int64_t tiles = ceil_div(problem.num_targets, kernel.tile_targets);
  const int64_t packed_size =
      tiles * kernel.tile_targets * problem.num_checkpoints * problem.proj_dim;
  const AlignedBuffer packed = allocate_aligned(packed_size * static_cast<int64_t>(sizeof(T)));
  kernel.pack_targets(problem, static_cast<T*>(packed.get()));

  const int64_t block_tiles = kScoreTargets / kernel.tile_targets;
  std::vector<AlignedBuffer> scratches;
  for (int i = 0; i < num_threads; ++i) {
    scratches.push_back(allocate_aligned(sizeof(ScoreScratch<T>)));
  }
  parallel_for(ceil_div(problem.num_train, kScoreRows), num_threads, [&](int thread, int64_t task) {
    auto& scratch = *static_cast<ScoreScratch<T>*>(scratches[static_cast<size_t>(thread)].get());
    const int64_t row_begin = task * kScoreRows;
    const int64_t row_end = std::min(row_begin + kScoreRows, problem.num_train);
    for (int64_t tile = 0; tile < tiles; tile += block_tiles) {
      const int64_t tile_end = std::min(tile + block_tiles, tiles);
      kernel.score_block(problem, static_cast<const T*>(packed.get()), row_begin, row_end, tile,
                         tile_end, scratch);
      consume(thread, row_begin, row_end, tile * kernel.tile_targets,
              std::min(tile_end * kernel.tile_targets, problem.num_targets), scratch.block);
    }
  });
}

template <class T>
struct Candidate {
  T value;
  int64_t index;
};

// A total order, so the best `count` do not depend on the order in which samples were met.
template <class T>
bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The best candidates of each target that one thread has met: heaps with the worst on top.
template <class T>
class RunningTopK {
 public:
  RunningTopK(int64_t num_targets, int64_t count)
      : count_(static_cast<size_t>(count)),
        heaps_(static_cast<size_t>(num_targets)),
        bars_(static_cast<size_t>(num_targets), -std::numeric_limits<T>::infinity()) {
    for (auto& heap : heaps_) heap.reserve(count_);  // threads that offer may not throw
  }

  // False on NaN.
  bool offer(int64_t target, T value, int64_t index) {
    const auto t = static_cast<size_t>(target);
    auto& heap = heaps_[t];
    if (heap.size() == count_) {
      if (value <= bars_[t]) return true;  // rows ascend: an equal one comes later and loses
      std::pop_heap(heap.begin(), heap.end(), better<T>);
      heap.pop_back();
    }
    if (value != value) return false;
    heap.push_back({value, index});
    std::push_heap(heap.begin(), heap.end(), better<T>);
    if (heap.size() == count_) bars_[t] = heap.front().value;
    return true;
  }

  const std::vector<Candidate<T>>& candidates(int64_t target) const {
    return heaps_[static_cast<size_t>(target)];
  }

 private:
  size_t count_;
  std::vector<std::vector<Candidate<T>>> heaps_;
  std::vector<T> bars_;  // the value to beat, once a heap is full
};

}  // namespace

template <class T>
void score(const ScoringProblem<T>& problem, T* out, int num_threads) {
  num_threads = threads_for(problem.num_train, num_threads);
  for_each_block<T>(problem, num_threads,
                    [&](int, int64_t row_begin, int64_t row_end, int64_t target_begin,
                        int64_t target_end, const T(*scores)[kScoreTargets]) {
                      for (int64_t i = row_begin; i < row_end; ++i) {
                        std::copy_n(scores[i - row_begin], target_end - target_begin,
                                    out + i * problem.num_targets + target_begin);
                      }
                    });
}

template <class T>
bool top_k(const ScoringProblem<T>& problem, int64_t count, T* values, int64_t* indices,
           int num_threads) {
  if (count == 0) return true;
  num_threads = threads_for(problem.num_train, num_threads);
  std::vector<RunningTopK<T>> running;
  for (int i = 0; i < num_threads; ++i) running.emplace_back(problem.num_targets, count);
  std::atomic<bool> finite{true};
  for_each_block<T>(problem, num_threads,
                    [&](int thread, int64_t row_begin, int64_t row_end, int64_t target_begin,
                        int64_t target_end, const T(*scores)[kScoreTargets]) {
                      RunningTopK<T>& best = running[static_cast<size_t>(thread)];
                      bool good = true;
                      for (int64_t i = row_begin; i < row_end; ++i) {
                        const T* row = scores[i - row_begin];
                        for (int64_t t = target_begin; t < target_end; ++t) {
                          good &= best.offer(t, row[t - target_begin], i);
                        }
                      }
                      if (!good) finite = false;
                    });
  if (!finite) return false;

  std::vector<Candidate<T>> merged;
  for (int64_t t = 0; t < problem.num_targets; ++t) {
    merged.clear();
    for (const RunningTopK<T>& best : running) {
      merged.insert(merged.end(), best.candidates(t).begin(), best.candidates(t).end());
    }
    std::sort(merged.begin(), merged.end(), better<T>);
    for (int64_t r = 0; r < count; ++r) {
      values[t * count + r] = merged[static_cast<size_t>(r)].value;
      indices[t * count + r] = merged[static_cast<size_t>(r)].index;
    }
  }
  return true;
}

template void score<float>(const ScoringProblem<float>&, float*, int);
template void score<double>(const ScoringProblem<double>&, double*, int);
template bool top_k<float>(const ScoringProblem<float>&, int64_t, float*, int64_t*, int);
template bool top_k<double>(const ScoringProblem<double>&, int64_t, double*, int64_t*, int);

}  // namespace trak_ext::cpu
