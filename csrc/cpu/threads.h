// Threads for the length of a call: nothing lives on between calls, so nothing breaks after a fork
// and no second thread pool fights torch's.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace trak_ext::cpu {

// Runs work(thread, task) for every task below num_tasks; tasks are taken in ascending order.
// `work` must not throw. With fewer threads to be had than asked for, those that started do it all.
template <class Work>
void parallel_for(int64_t num_tasks, int num_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto run = [&](int thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
      work(thread, task);
    }
  };
  std::vector<std::thread> started;
  started.reserve(static_cast<size_t>(num_threads));
  for (int thread = 1; thread < num_threads && thread < num_tasks; ++thread) {
    try {
      started.emplace_back(run, thread);
    } catch (const std::exception&) {  // no thread to be had, or no memory for one
      break;
    }
  }
  run(0);
  for (std::thread& thread : started) thread.join();
}

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedBuffer = std::unique_ptr<void, FreeDeleter>;

// 64-byte aligned memory, not initialised; throws std::bad_alloc.
inline AlignedBuffer allocate_aligned(int64_t bytes) {
  const auto size = (static_cast<size_t>(bytes > 0 ? bytes : 1) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, size);
  if (!memory) throw std::bad_alloc();
  return AlignedBuffer(memory);
}

}  // namespace trak_ext::cpu
