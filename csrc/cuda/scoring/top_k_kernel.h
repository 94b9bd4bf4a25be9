// The running best k of every target. Samples are cut into groups, a block keeps one group's list
// of one target through all launches, and at the end a block a target makes one list of the
// groups'.
//
// Candidates are in a total order, by value descending and then by index ascending, so the best k
// are the same set whatever came first and however samples were cut. A block compares many at a
// time with the k-th best that it has, which soon leaves none, collects those that are better, and
// sorts when they are so many that the k-th best would be much better, or have no room.
#pragma once

#include "../device/device.h"

namespace trak_ext::cuda {

constexpr int kTopKThreads = 256;
constexpr int kTopKWarps = kTopKThreads / 32;
constexpr int64_t kNoIndex = INT64_MAX;  // of an empty place, which is worse than any candidate

template <class T>
struct Candidate {
  T value;
  int64_t index;
};

template <class T>
TRAK_EXT_DEVICE bool is_better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Lists in memory: [targets, groups, count], the best first.
template <class T>
struct CandidateLists {
  T* values;
  int64_t* indices;
};

// Places of a block's list and of what it has collected: a power of two, room for two rounds at
// least.
inline int top_k_places(int count) {
  int places = 2 * kTopKThreads;
  while (places < count + 2 * kTopKThreads) places *= 2;
  return places;
}

template <class T>
int top_k_shared_bytes(int count) {
  return top_k_places(count) * static_cast<int>(sizeof(int64_t) + sizeof(T)) +
         2 * kTopKWarps * static_cast<int>(sizeof(int32_t));
}

// In shared memory: places [0, count) hold the list, the next `pending_` what was collected.
template <class T>
class RunningTopK {
 public:
  TRAK_EXT_DEVICE RunningTopK(char* shared, int count, int places)
      : indices_(shared),
        values_(shared + places * static_cast<int>(sizeof(int64_t))),
        votes_(values_ + places * static_cast<int>(sizeof(T))),
        count_(count),
        places_(places) {}

  // Takes over a list, or `count` empty places; followed by a barrier.
  TRAK_EXT_DEVICE void load(const CandidateLists<T>& list, bool empty) {
    for (int i = device::thread_index(); i < count_; i += kTopKThreads) {
      put(i, empty ? none()
                   : Candidate<T>{device::load_global<T>(list.values + i),
                                  device::load_global<int64_t>(list.indices + i)});
    }
    device::block_barrier();
  }

  // Offers kMany candidates of every thread, candidate_of(i) where bit i of `has` is set; called by
  // all threads together.
  template <int kMany, class CandidateOf>
  TRAK_EXT_DEVICE void offer(uint32_t has, const CandidateOf& candidate_of) {
    static_assert(kMany <= 32, "a bit each");
    const Candidate<T> worst = get(count_ - 1);
    uint32_t taken = 0;
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      const bool better = (has >> i & 1u) != 0 && is_better(candidate_of(i), worst);
      taken |= better ? 1u << i : 0u;
    }
    // Most warps have none.
    const bool any = device::ballot(taken != 0) != 0;
    int of_warp = 0;
    if (any) {
#pragma unroll
      for (int i = 0; i < kMany; ++i) {
        of_warp += device::count_bits(device::ballot((taken >> i & 1u) != 0));
      }
    }
    int before = 0, all = 0;
    add_up(of_warp, before, all);
    if (all == 0) return;
    if (count_ + pending_ + all <= places_) {
      int place = count_ + pending_ + before;
      if (any) {
#pragma unroll
        for (int i = 0; i < kMany; ++i) {
          const bool mine = (taken >> i & 1u) != 0;
          const uint32_t vote = device::ballot(mine);
          if (mine) put(place + rank_in(vote), candidate_of(i));
          place += device::count_bits(vote);
        }
      }
      pending_ += all;
    } else {
#pragma unroll 1
      for (int i = 0; i < kMany; ++i) {
        if (count_ + pending_ + kTopKThreads > places_) sort();
        // Registers have no index.
        Candidate<T> candidate = candidate_of(0);
#pragma unroll
        for (int j = 1; j < kMany; ++j) {
          if (j == i) candidate = candidate_of(j);
        }
        offer_one((taken >> i & 1u) != 0, candidate);
      }
    }
    if (2 * pending_ >= count_) sort();
  }

  // Sorts what was collected into the list.
  TRAK_EXT_DEVICE void sort() {
    if (pending_ == 0) return;
    int size = 2;
    while (size < count_ + pending_) size *= 2;
    for (int i = count_ + pending_ + device::thread_index(); i < size; i += kTopKThreads) {
      put(i, none());
    }
    device::block_barrier();
    // A bitonic network: sorted runs of `run`, every second one upside down.
    for (int run = 2; run <= size; run *= 2) {
      for (int gap = run / 2; gap > 0; gap /= 2) {
        for (int pair = device::thread_index(); pair < size / 2; pair += kTopKThreads) {
          const int low = pair / gap * 2 * gap + pair % gap;
          const Candidate<T> a = get(low), b = get(low + gap);
          if ((low & run) == 0 ? is_better(b, a) : is_better(a, b)) {
            put(low, b);
            put(low + gap, a);
          }
        }
        device::block_barrier();
      }
    }
    pending_ = 0;
  }

  TRAK_EXT_DEVICE void store(const CandidateLists<T>& list) const {
    for (int i = device::thread_index(); i < count_; i += kTopKThreads) {
      const Candidate<T> candidate = get(i);
      device::store_global<T>(list.values + i, candidate.value);
      device::store_global<int64_t>(list.indices + i, candidate.index);
    }
  }

 private:
  // Takes a candidate of every thread that has one, if it is better than the k-th best now. Needs
  // room for as many.
  TRAK_EXT_DEVICE void offer_one(bool has, const Candidate<T>& candidate) {
    const bool taken = has && is_better(candidate, get(count_ - 1));
    const uint32_t vote = device::ballot(taken);
    int before = 0, all = 0;
    add_up(device::count_bits(vote), before, all);
    if (taken) put(count_ + pending_ + before + rank_in(vote), candidate);
    pending_ += all;
  }

  // Adds up a number of every warp: of the warps before this one, and of all.
  TRAK_EXT_DEVICE void add_up(int of_warp, int& before_warp, int& of_all) {
    const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
    // Two sets of numbers take turns, so that one barrier a round is enough.
    char* votes = votes_ + round_ * kTopKWarps * static_cast<int>(sizeof(int32_t));
    round_ ^= 1;
    if (lane == 0) {
      device::store_shared<int32_t>(votes + warp * static_cast<int>(sizeof(int32_t)), of_warp);
    }
    device::block_barrier();
    int before = 0, all = 0;
#pragma unroll
    for (int i = 0; i < kTopKWarps; ++i) {
      const int votes_of_warp =
          device::load_shared<int32_t>(votes + i * static_cast<int>(sizeof(int32_t)));
      before += i < warp ? votes_of_warp : 0;
      all += votes_of_warp;
    }
    before_warp = before;
    of_all = all;
  }
  TRAK_EXT_DEVICE static int rank_in(uint32_t vote) {
    return device::count_bits(vote & ((1u << device::thread_index() % 32) - 1u));
  }

  TRAK_EXT_DEVICE static Candidate<T> none() { return {-device::infinity<T>(), kNoIndex}; }
  TRAK_EXT_DEVICE Candidate<T> get(int place) const {
    return {device::load_shared<T>(values_ + place * static_cast<int>(sizeof(T))),
            device::load_shared<int64_t>(indices_ + place * static_cast<int>(sizeof(int64_t)))};
  }
  TRAK_EXT_DEVICE void put(int place, const Candidate<T>& candidate) {
    device::store_shared<T>(values_ + place * static_cast<int>(sizeof(T)), candidate.value);
    device::store_shared<int64_t>(indices_ + place * static_cast<int>(sizeof(int64_t)),
                                  candidate.index);
  }

  char* const indices_;
  char* const values_;
  char* const votes_;
  const int count_;
  const int places_;
  int pending_ = 0;
  int round_ = 0;
};

template <class T>
struct SelectLaunch {
  const T* scores;  // [targets, rows]
  int64_t rows;
  int64_t first_index;  // of the first of these samples
  int32_t groups;
  int32_t count;
  int32_t places;
  bool first;               // lists start empty
  CandidateLists<T> lists;  // [targets, groups, count]
  int32_t* not_a_number;    // becomes 1 if a score is NaN, when the lists mean nothing
};

// Of a thread, some 64 bytes; one score more and ptxas spills on sm_75 and sm_80.
template <class T>
constexpr int kScoresAtOnce = sizeof(T) == 4 ? 15 : 8;
// Candidates of fp64 take more registers.
template <class T>
constexpr int kSelectBlocksPerSm = sizeof(T) == 4 ? 3 : 2;

// A block a target and group.
template <class T>
TRAK_EXT_KERNEL(kTopKThreads, kSelectBlocksPerSm<T>)
select_kernel(TRAK_EXT_KERNEL_ARGUMENT SelectLaunch<T> launch) {
  const int64_t target = device::block_index() / launch.groups;
  const int64_t group = device::block_index() % launch.groups;
  const int64_t share = (launch.rows + launch.groups - 1) / launch.groups;
  const int64_t begin = group * share;
  const int64_t end = begin + share < launch.rows ? begin + share : launch.rows;
  const int64_t place = device::block_index() * launch.count;
  const CandidateLists<T> list = {launch.lists.values + place, launch.lists.indices + place};
  RunningTopK<T> best(device::shared_memory(), launch.count, launch.places);
  best.load(list, launch.first);
  // The next scores are on their way while some are compared.
  constexpr int kMany = kScoresAtOnce<T>;
  const T* scores = launch.scores + target * launch.rows + device::thread_index();
  T next[kMany];
  const auto fetch = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      const int64_t row = first + i * kTopKThreads;
      next[i] = T{0};
      if (row + device::thread_index() < end) next[i] = device::load_global<T>(scores + row);
    }
  };
  bool not_a_number = false;
  fetch(begin);
  for (int64_t first = begin; first < end; first += kMany * kTopKThreads) {
    T values[kMany];
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      values[i] = next[i];
      not_a_number |= values[i] != values[i];
    }
    fetch(first + kMany * kTopKThreads);
    const int64_t left = end - first - device::thread_index();  // of this thread and later ones
    const int64_t mine = (left + kTopKThreads - 1) / kTopKThreads;
    const uint32_t has = left <= 0 ? 0u : mine >= kMany ? ~0u : (1u << mine) - 1u;
    const int64_t index = launch.first_index + first + device::thread_index();
    best.template offer<kMany>(
        has, [&](int i) { return Candidate<T>{values[i], index + i * kTopKThreads}; });
  }
  if (not_a_number) device::store_global<int32_t>(launch.not_a_number, 1);
  best.sort();
  best.store(list);
}

template <class T>
struct MergeLaunch {
  CandidateLists<T> lists;  // [targets, groups, count]
  CandidateLists<T> out;    // [targets, count]
  int32_t groups;
  int32_t count;
  int32_t places;
};

// A block a target.
template <class T>
TRAK_EXT_KERNEL(kTopKThreads, 1)
merge_kernel(TRAK_EXT_KERNEL_ARGUMENT MergeLaunch<T> launch) {
  const int64_t target = device::block_index();
  const int64_t candidates = int64_t{launch.groups} * launch.count;
  RunningTopK<T> best(device::shared_memory(), launch.count, launch.places);
  best.load(launch.lists, true);
  for (int64_t first = 0; first < candidates; first += kTopKThreads) {
    const int64_t i = first + device::thread_index();
    Candidate<T> candidate = {T{0}, kNoIndex};
    if (i < candidates) {
      candidate = {device::load_global<T>(launch.lists.values + target * candidates + i),
                   device::load_global<int64_t>(launch.lists.indices + target * candidates + i)};
    }
    best.template offer<1>(i < candidates, [&](int) { return candidate; });
  }
  best.sort();
  best.store(
      {launch.out.values + target * launch.count, launch.out.indices + target * launch.count});
}

}  // namespace trak_ext::cuda
