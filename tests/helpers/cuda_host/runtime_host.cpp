// What the CUDA part asks of the runtime and the driver, with doubles of them: csrc/cuda's
// shared_limit.h and current_device.h as they are, called by tests/cuda/test_host_runtime.py.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "current_device.h"
#include "shared_limit.h"

namespace {

using trak_ext::cuda::CurrentDevice;
using trak_ext::cuda::SharedLimits;

// --- Shared memory: kernels launched by many threads on several devices -------------------------

constexpr int kDefaultLimit = 48 * 1024;
constexpr int kSizes[] = {0, 1000, kDefaultLimit, kDefaultLimit + 1, 64 * 1024, 99 * 1024};

struct LaunchCounts {
  int64_t refused;  // launches with more than the kernel's limit, which a device refuses
  int64_t lowered;
  int64_t found;
  int64_t raised;
};

struct Kernel {
  std::atomic<int> limit{kDefaultLimit};
};

// --- Devices: the state of one thread and of the process ----------------------------------------

// A context is 0 for none, 1 + i for device i's primary one, 11 + i for another one of device i.
struct DriverState {
  int context;
  int ours;      // what this extension's runtime takes for current where no context is
  int torchs;    // the same of torch's runtime, which is another library
  int mode;      // of capture: 0 global, 1 thread-local, 2 relaxed
  int contexts;  // bit i: device i has its primary context
};

thread_local DriverState driver_state;

struct DriverDouble {
  using Context = const char*;
  using CaptureMode = int;
  static constexpr CaptureMode kRelaxed = 2;
  static constexpr char kContexts[21] = {};

  static Context context() {
    return driver_state.context == 0 ? nullptr : kContexts + driver_state.context;
  }
  static void set_context(Context context) {
    driver_state.context = context == nullptr ? 0 : static_cast<int>(context - kContexts);
  }
  static int device() {
    return driver_state.context == 0 ? driver_state.ours : (driver_state.context - 1) % 10;
  }
  static void set_device(int device) {
    driver_state.ours = device;
    driver_state.contexts |= 1 << device;
    driver_state.context = 1 + device;
  }
  static int exchange_capture_mode(int mode) {
    const int before = driver_state.mode;
    driver_state.mode = mode;
    return before;
  }
};

}  // namespace

extern "C" {

// Threads launch every kernel on every device together, twice, each with a size of its own: all
// have been allowed theirs before the first one launches.
void host_launches(int threads, int kernels, int devices, LaunchCounts* counts) {
  constexpr int kCount = sizeof(kSizes) / sizeof(kSizes[0]);
  SharedLimits limits;
  std::vector<Kernel> all(static_cast<size_t>(kernels) * devices);
  std::atomic<int64_t> refused{0}, lowered{0}, found{0}, raised{0};
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(threads));
  const auto launch = [&](int kernel, int device, int bytes) {
    std::atomic<int>& limit = all[static_cast<size_t>(device) * kernels + kernel].limit;
    const auto find = [&] {
      ++found;
      return limit.load();
    };
    const auto raise = [&](int wanted) {
      ++raised;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      if (limit.exchange(wanted) > wanted) ++lowered;
    };
    pthread_barrier_wait(&barrier);
    // A kernel is one address whatever the device.
    limits.allow(&all[static_cast<size_t>(kernel)], device, bytes, find, raise);
    pthread_barrier_wait(&barrier);
    if (limit.load() < bytes) ++refused;
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (int i = 0; i < 2 * kernels * devices; ++i) {
        launch(i / 2 % kernels, i / 2 / kernels, kSizes[(i + thread) % kCount]);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  pthread_barrier_destroy(&barrier);
  *counts = {refused, lowered, found, raised};
}

// Makes `device` current for a while: the state then, and afterwards.
void host_make_current(DriverState* state, int device, DriverState* meanwhile) {
  driver_state = *state;
  {
    const CurrentDevice<DriverDouble> current(device);
    *meanwhile = driver_state;
  }
  *state = driver_state;
}
}
