// How much dynamic shared memory kernels may be launched with. No CUDA here, so that the tests run
// it with a double of the runtime.
//
// A kernel has one limit on a device for the whole process. Setting it to what each launch needs is
// a race: between a thread's call and its launch another thread, whose launch needs less, lowers
// it. So it is only ever raised, and a launch that needs no more than was allowed before, which is
// every launch but the first few, costs a look-up without a lock.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace trak_ext::cuda {

class SharedLimits {
 public:
  // Sees to it that `kernel` may be launched on `device` with `bytes`. `find` returns the limit
  // that the kernel has, and is called at its first launch on the device; `raise(bytes)` raises it.
  // What they throw goes through, and leaves things as they were.
  template <class Find, class Raise>
  void allow(const void* kernel, int device, int bytes, const Find& find, const Raise& raise) {
    std::atomic<Entry*>& first = first_of(kernel);
    const Entry* known = look_up(first, kernel, device);
    if (known != nullptr && bytes <= known->limit.load(std::memory_order_acquire)) return;

    const std::lock_guard<std::mutex> lock(mutex_);
    Entry* entry = look_up(first, kernel, device);
    if (entry == nullptr) {
      entry = new Entry{kernel, device, {find()}, first.load(std::memory_order_relaxed)};
      first.store(entry, std::memory_order_release);
    }
    if (bytes <= entry->limit.load(std::memory_order_relaxed)) return;
    raise(bytes);
    entry->limit.store(bytes, std::memory_order_release);
  }

 private:
  // Entries are never removed, so that readers need no lock: there are as many as there are kernels
  // and devices.
  struct Entry {
    const void* kernel;
    int device;
    std::atomic<int> limit;
    Entry* next;
  };
  static constexpr size_t kLists = 256;

  std::atomic<Entry*>& first_of(const void* kernel) {
    const auto address = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(kernel));
    return lists_[static_cast<size_t>(address * 0x9E3779B97F4A7C15u >> 56)];
  }
  static Entry* look_up(const std::atomic<Entry*>& first, const void* kernel, int device) {
    Entry* entry = first.load(std::memory_order_acquire);
    while (entry != nullptr && (entry->kernel != kernel || entry->device != device)) {
      entry = entry->next;
    }
    return entry;
  }

  std::array<std::atomic<Entry*>, kLists> lists_{};
  std::mutex mutex_;
};

}  // namespace trak_ext::cuda
