// A thread of the block that runs, for the parts of the runner.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

namespace trak_ext::host_run {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

enum State : int {
  kNew,
  kReady,
  kAtBarrier,
  kAtMultiply,
  kAtBallot,
  kAtWarpgroup,
  kAtArrivals,
  kDone
};

struct Fiber;

struct Copy {
  char* to;
  const void* from;
  int bytes;
};

// The shared memory that a warpgroup's instruction reads, until all its threads know it is done.
struct Reading {
  std::vector<size_t> cells;
  int threads = kWarpgroup;
  int first = 0;  // of the threads
  // The phase that was last asked for.
  int64_t barrier = -1;
  int64_t phase = -1;

  // Whether all threads of the warpgroup have seen the end of a phase of a barrier.
  bool waited(const std::vector<Fiber*>& fibers, int64_t of, int64_t at);
};

// A thread's part in an instruction under way.
struct Product {
  float* d;
  size_t count;
  const uint32_t* a;
  uint32_t a_then[4];
  std::shared_ptr<Reading> reading;
};

// A thread's dealings with the warpgroup's matrix instruction.
struct MatrixState {
  // Operands of the one it waits to start.
  float* d = nullptr;
  const uint32_t* a = nullptr;
  uint64_t operand = 0;
  int rows = 0;
  bool add = false;
  // What the last fences of registers saw.
  const float* fenced_d = nullptr;
  std::map<const uint32_t*, std::array<uint32_t, 4>> fenced_a;  // values by where they are
  // Sums that the thread may not see yet, by where they will be.
  std::map<float*, std::vector<float>> hidden;
  std::vector<std::vector<Product>> groups;  // committed, the oldest first
  std::vector<Product> open;
};

struct Fiber {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  ucontext_t start;
  jmp_buf resume;
  int state = kNew;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
  // Operands of the matrix instruction it waits in.
  float* d = nullptr;
  const uint32_t* a = nullptr;
  uint32_t b[2] = {};
  uint32_t vote = 0;  // its own before the ballot, the warp's after it
  MatrixState matrix;
  // The phase it waits for, and phases that it has seen to end, by the barriers' places.
  int64_t barrier = 0;
  int odd = 0;
  std::map<int64_t, int64_t> seen;
};

inline bool Reading::waited(const std::vector<Fiber*>& fibers, int64_t of, int64_t at) {
  if (of == barrier && at == phase) return true;
  for (int i = first; i < first + kWarpgroup; ++i) {
    const auto& seen = fibers[static_cast<size_t>(i)]->seen;
    const auto found = seen.find(of);
    if (found == seen.end() || found->second <= at) return false;
  }
  barrier = of;
  phase = at;
  return true;
}

inline float from_bf16(uint32_t bits) {
  bits = (bits & 0xFFFFu) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// fp64 to fp32 towards zero, as matrix instructions are known to cut their sums; infinities stay.
inline float truncate(double value) {
  const auto nearest = static_cast<float>(value);
  if (!std::isfinite(nearest)) return nearest;
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f)
                                                                    : nearest;
}

}  // namespace trak_ext::host_run
