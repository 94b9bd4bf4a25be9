#include "runner.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "fiber.h"

int host_planted = 0;

namespace trak_ext::host_run {
namespace {

// Contexts are entered once through ucontext and left and resumed by _setjmp, which makes no system
// calls.
jmp_buf scheduler;

}  // namespace

Runner& Runner::get() {
  static Runner runner;
  return runner;
}

Runner::~Runner() {
  for (Fiber* fiber : fibers_) delete fiber;
}

void Runner::begin(uint64_t order_seed) {
  random_.seed(order_seed);
  ranges_.clear();
}

void Runner::allow(const void* address, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  ranges_.emplace_back(begin, begin + static_cast<uint64_t>(bytes));
}

bool Runner::note(const void* kernel, Launch launch) {
  if (note_ == nullptr) return false;
  Dl_info info = {};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) {
    throw std::runtime_error("a launch of a kernel without a name");
  }
  launch.kernel = info.dli_sname;
  note_(&launch);
  return true;
}

void Runner::set_workspace(const void* address, int64_t bytes) {
  allow(address, bytes);
  workspace_ = ranges_.back();
}

bool Runner::in_workspace(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  return at >= workspace_.first && at < workspace_.second;
}

void Runner::run(int64_t blocks, int threads, int shared_bytes, void (*body)(void*), void* data) {
  body_ = body;
  data_ = data;
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::shuffle(order.begin(), order.end(), random_);
  for (int64_t block : order) {
    block_ = block;
    run_block(threads, shared_bytes);
  }
}

void Runner::enter() {
  Runner& runner = get();
  runner.body_(runner.data_);
  Fiber& fiber = *runner.fibers_[static_cast<size_t>(runner.current_)];
  if (!fiber.groups.empty() || !fiber.open.empty()) {
    for (const auto& group : fiber.groups) {
      if (!group.empty()) runner.fault("a thread ended with copies under way");
    }
  }
  runner.check_multiplied();
  fiber.state = kDone;
  _longjmp(scheduler, 1);
}

void Runner::run_block(int threads, int shared_bytes) {
  while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(new Fiber);
  shared_storage_.assign(static_cast<size_t>(shared_bytes) + 16, '\xFF');
  const auto base = reinterpret_cast<uintptr_t>(shared_storage_.data());
  shared_ = shared_storage_.data() + (16 - base % 16) % 16;
  shared_bytes_ = shared_bytes;
  cells_.assign(static_cast<size_t>(shared_bytes) / 2 + 1, Cell());
  epoch_ = 0;
  arrivals_.clear();
  bulk_.clear();
  fault_.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers_[static_cast<size_t>(i)];
    fiber.state = kNew;
    fiber.groups.clear();
    fiber.open.clear();
    fiber.matrix = MatrixState();
    fiber.seen.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  std::vector<int> ready(static_cast<size_t>(threads));
  // One warpgroup may fall behind the others as far as they let it.
  const int slow = static_cast<int>(random_() % static_cast<unsigned>(threads / kWarpgroup + 1));
  while (true) {
    ready.clear();
    const bool rests = random_() % 8 != 0;
    bool others = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers_[static_cast<size_t>(i)]->state > kReady) continue;
      others |= i / kWarpgroup != slow;
      ready.push_back(i);
    }
    if (others && rests) {
      ready.erase(
          std::remove_if(ready.begin(), ready.end(), [&](int i) { return i / kWarpgroup == slow; }),
          ready.end());
    }
    if (ready.empty() && bulk_.empty()) break;
    // A round: every thread that can run, in a random order, as far as it gets.
    std::shuffle(ready.begin(), ready.end(), random_);
    for (int next : ready) {
      current_ = next;
      Fiber* fiber = fibers_[static_cast<size_t>(next)];
      if (_setjmp(scheduler) == 0) {
        if (fiber->state == kNew) setcontext(&fiber->start);
        _longjmp(fiber->resume, 1);
      }
      if (!fault_.empty()) {
        throw std::runtime_error("block " + std::to_string(block_) + ", thread " +
                                 std::to_string(current_) + ": " + fault_);
      }
    }
    land_some();
    release_arrivals();
    release(kAtBarrier, 0, threads);
    for (int warp = 0; warp < threads; warp += kWarp) {
      release(kAtMultiply, warp, kWarp);
      release(kAtBallot, warp, kWarp);
    }
    for (int first = 0; first + kWarpgroup <= threads; first += kWarpgroup) {
      release(kAtWarpgroup, first, kWarpgroup);
    }
  }
  for (int i = 0; i < threads; ++i) {
    if (fibers_[static_cast<size_t>(i)]->state != kDone) {
      throw std::runtime_error("threads wait for others that never come");
    }
  }
}

// Lets threads go on if all of them that have not ended wait at the same place.
void Runner::release(int state, int first, int count) {
  int waiting = 0;
  for (int i = first; i < first + count; ++i) {
    const int found = fibers_[static_cast<size_t>(i)]->state;
    if (found != state && found != kDone) return;
    waiting += found == state;
  }
  if (waiting == 0) return;
  if (state == kAtBarrier) ++epoch_;
  if (state == kAtWarpgroup) {
    if (waiting != kWarpgroup) {
      throw std::runtime_error("a warpgroup's matrix instruction without all its threads");
    }
    start_multiply(first);
  }
  if (state == kAtBallot) {
    if (waiting != kWarp) throw std::runtime_error("a ballot without all lanes");
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      votes |= fibers_[static_cast<size_t>(first + lane)]->vote << lane;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      fibers_[static_cast<size_t>(first + lane)]->vote = votes;
    }
  }
  if (state == kAtMultiply) {
    if (waiting != kWarp) throw std::runtime_error("a matrix instruction without all lanes");
    multiply_warp(first);
  }
  for (int i = first; i < first + count; ++i) {
    Fiber& fiber = *fibers_[static_cast<size_t>(i)];
    if (fiber.state == state) fiber.state = kReady;
  }
}

// All lanes of the warp from `first` on have come to the same instruction.
void Runner::multiply_warp(int first) {
  float before[kWarp][4], after[kWarp][4];
  uint32_t all_a[kWarp][4], all_b[kWarp][2];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fiber& fiber = *fibers_[static_cast<size_t>(first + lane)];
    std::memcpy(before[lane], fiber.d, sizeof(before[lane]));
    std::memcpy(all_a[lane], fiber.a, sizeof(all_a[lane]));
    std::memcpy(all_b[lane], fiber.b, sizeof(all_b[lane]));
  }
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fiber& fiber = *fibers_[static_cast<size_t>(first + lane)];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int bits = 16 * (half ^ static_cast<int>(is_planted(Planted::kSwappedHalves)));
      a[g][2 * t + half] = from_bf16(fiber.a[0] >> bits);
      a[g + 8][2 * t + half] = from_bf16(fiber.a[1] >> bits);
      a[g][2 * t + 8 + half] = from_bf16(fiber.a[2] >> bits);
      a[g + 8][2 * t + 8 + half] = from_bf16(fiber.a[3] >> bits);
      b[2 * t + half][g] = from_bf16(fiber.b[0] >> (16 * half));
      b[2 * t + 8 + half][g] = from_bf16(fiber.b[1] >> (16 * half));
      d[g][2 * t + half] = fiber.d[half];
      d[g + 8][2 * t + half] = fiber.d[2 + half];
    }
  }
  double sums[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) sums[i][j] = d[i][j];
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sums[i][j] += static_cast<double>(a[i][k]) * b[k][j];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fiber& fiber = *fibers_[static_cast<size_t>(first + lane)];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      fiber.d[half] = truncate(sums[g][2 * t + half]);
      fiber.d[2 + half] = truncate(sums[g + 8][2 * t + half]);
    }
  }
  if (witness_ == nullptr) return;
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(after[lane], fibers_[static_cast<size_t>(first + lane)]->d, sizeof(after[lane]));
  }
  const MatrixInstruction shown = {block_,   kWarp,         8,         4,        1,
                                   all_a[0], all_b[0],      before[0], after[0], 0,
                                   shared_,  shared_bytes_, 0};
  witness_(&shown);
}

// Leaves the current fiber until it is ready again.
void Runner::pause(int state) {
  Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

void Runner::fault(const std::string& what) {
  if (fault_.empty()) fault_ = what;
  _longjmp(scheduler, 1);
}

void Runner::block_barrier() { pause(kAtBarrier); }

void Runner::multiply_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
  fiber.d = d;
  fiber.a = a;
  fiber.b[0] = b0;
  fiber.b[1] = b1;
  pause(kAtMultiply);
}

uint32_t Runner::ballot(bool yes) {
  Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
  fiber.vote = yes;
  pause(kAtBallot);
  return fiber.vote;
}

Runner::Cell* Runner::cells_of(const void* address, int bytes, int alignment) {
  const int64_t at = static_cast<const char*>(address) - shared_;
  if (at < 0 || at + bytes > shared_bytes_) {
    fault("shared memory at byte " + std::to_string(at) + " of " + std::to_string(shared_bytes_));
  }
  if (at % alignment != 0) fault("a misaligned access to shared memory");
  return &cells_[static_cast<size_t>(at / 2)];
}

void Runner::read_shared(const void* address, int bytes, int alignment) {
  Cell* cells = cells_of(address, bytes, alignment);
  for (int i = 0; i < bytes / 2; ++i) {
    Cell& cell = cells[i];
    if (cell.in_flight > 0) fault("shared memory read while a copy to it is under way");
    if (!cell.written) fault("shared memory read that nobody wrote");
    if (cell.write_epoch == epoch_ && cell.writer != current_) {
      fault("shared memory read that another thread wrote since the last barrier");
    }
    if (cell.read_epoch == epoch_ && cell.reader != current_) {
      cell.reader = kMany;
    } else {
      cell.reader = current_;
    }
    cell.read_epoch = epoch_;
  }
}

void Runner::mark_written(Cell& cell, const char* what) {
  if ((cell.write_epoch == epoch_ && cell.writer != current_) ||
      (cell.read_epoch == epoch_ && cell.reader != current_)) {
    fault(std::string(what) + " that another thread used since the last barrier");
  }
  if (cell.multiplied > 0) fault(std::string(what) + " while a matrix instruction may read it");
  cell.write_epoch = epoch_;
  cell.writer = current_;
  cell.written = true;
  cell.barrier = -1;
}

void Runner::write_shared(const void* address, int bytes, int alignment) {
  Cell* cells = cells_of(address, bytes, alignment);
  for (int i = 0; i < bytes / 2; ++i) {
    if (cells[i].in_flight > 0) fault("shared memory written while a copy to it is under way");
    mark_written(cells[i], "shared memory written");
  }
}

void Runner::check_global(const void* address, int bytes, int alignment) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin % static_cast<uintptr_t>(alignment) != 0) {
    fault("a misaligned access to global memory");
  }
  for (const auto& [low, high] : ranges_) {
    if (begin >= low && begin + static_cast<uintptr_t>(bytes) <= high) return;
  }
  fault("global memory out of bounds");
}

void Runner::copy_async(void* shared, const void* global, int bytes) {
  check_global(global, bytes, bytes);
  Cell* cells = cells_of(shared, bytes, bytes);
  for (int i = 0; i < bytes / 2; ++i) {
    if (cells[i].in_flight > 0) fault("two copies under way to the same shared memory");
    mark_written(cells[i], "a copy to shared memory");
    ++cells[i].in_flight;
  }
  std::memset(shared, 0xFF, static_cast<size_t>(bytes));
  fibers_[static_cast<size_t>(current_)]->open.push_back(
      {static_cast<char*>(shared), global, bytes});
}

void Runner::commit_copies() {
  Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void Runner::wait_copies(int pending) {
  Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const Copy& copy : fiber.groups.front()) {
      Cell* cells = cells_of(copy.to, copy.bytes, copy.bytes);
      for (int i = 0; i < copy.bytes / 2; ++i) {
        --cells[i].in_flight;
        mark_written(cells[i], "a copy landing in shared memory");
      }
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}

}  // namespace trak_ext::host_run
