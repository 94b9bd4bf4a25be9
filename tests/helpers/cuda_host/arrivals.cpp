// Barriers in shared memory and bulk copies on the host, after the PTX ISA's chapters on mbarrier
// and cp.async.bulk. A copy lands at any time after its start, drawn at random, at the latest when
// nobody can go on without it; until then its bytes read as NaN, and touching them is an error.
#include <cstring>

#include "fiber.h"
#include "runner.h"

namespace trak_ext::host_run {

Runner::Arrivals& Runner::arrivals_at(const void* barrier) {
  const auto found = arrivals_.find(static_cast<const char*>(barrier) - shared_);
  if (found == arrivals_.end()) fault("a barrier in shared memory that was not begun");
  Arrivals& arrivals = found->second;
  if (arrivals.beginner != current_ && arrivals.epoch == epoch_) {
    fault("a barrier in shared memory that another thread began since the last barrier");
  }
  return arrivals;
}

void Runner::begin_arrivals(const void* barrier, int arrivals) {
  cells_of(barrier, 8, 8);
  if (arrivals < 1) fault("a barrier in shared memory without arrivals");
  Arrivals begun;
  begun.count = begun.pending = arrivals;
  begun.epoch = epoch_;
  begun.beginner = current_;
  arrivals_[static_cast<const char*>(barrier) - shared_] = begun;
}

void Runner::publish_arrivals() {
  for (auto& [place, arrivals] : arrivals_) arrivals.published |= arrivals.beginner == current_;
}

void Runner::count_arrivals(Arrivals& arrivals) {
  if (arrivals.pending > 0 || arrivals.bytes != 0) return;
  ++arrivals.phase;
  arrivals.pending = arrivals.count;
}

void Runner::arrive(const void* barrier) {
  Arrivals& arrivals = arrivals_at(barrier);
  if (arrivals.pending == 0) fault("an arrival that a barrier does not expect");
  --arrivals.pending;
  count_arrivals(arrivals);
}

void Runner::expect_bytes(const void* barrier, int bytes) {
  arrivals_at(barrier).bytes += bytes;
  arrive(barrier);
}

void Runner::copy_bulk(void* shared, const void* global, int bytes, const void* barrier) {
  if (bytes % 16 != 0) fault("a bulk copy of what is no multiple of 16 bytes");
  check_global(global, bytes, 16);
  const Arrivals& arrivals = arrivals_at(barrier);
  if (!arrivals.published) fault("a copy for a barrier in shared memory that was not published");
  Cell* cells = cells_of(shared, bytes, 16);
  for (int i = 0; i < bytes / 2; ++i) {
    if (cells[i].in_flight > 0) fault("two copies under way to the same shared memory");
    if (cells[i].multiplied > 0) {
      fault("a copy to shared memory while a matrix instruction may read it");
    }
    cells[i].written = true;
    ++cells[i].in_flight;
  }
  std::memset(shared, 0xFF, static_cast<size_t>(bytes));
  bulk_.push_back({static_cast<char*>(shared), global, bytes,
                   static_cast<const char*>(barrier) - shared_, arrivals.phase});
}

void Runner::land(size_t index) {
  const BulkCopy copy = bulk_[index];
  bulk_.erase(bulk_.begin() + static_cast<std::ptrdiff_t>(index));
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  Cell* cells = &cells_[static_cast<size_t>((copy.to - shared_) / 2)];
  for (int i = 0; i < copy.bytes / 2; ++i) {
    --cells[i].in_flight;
    cells[i].barrier = copy.barrier;
    cells[i].phase = copy.phase;
  }
  Arrivals& arrivals = arrivals_.at(copy.barrier);
  arrivals.bytes -= copy.bytes;
  count_arrivals(arrivals);
}

void Runner::land_some() {
  bool waiting = true;  // for copies alone
  for (const Fiber* fiber : fibers_) waiting &= fiber->state > kReady;
  const size_t before = bulk_.size();
  for (size_t i = bulk_.size(); i-- > 0;) {
    if (random_() % 4 == 0) land(i);
  }
  if (waiting && before > 0 && bulk_.size() == before) land(random_() % bulk_.size());
}

void Runner::wait_arrivals(const void* barrier, int odd) {
  (void)arrivals_at(barrier);
  Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
  fiber.barrier = static_cast<const char*>(barrier) - shared_;
  fiber.odd = odd;
  pause(kAtArrivals);
}

void Runner::release_arrivals() {
  for (Fiber* fiber : fibers_) {
    if (fiber->state != kAtArrivals) continue;
    const Arrivals& arrivals = arrivals_.at(fiber->barrier);
    if (arrivals.phase % 2 == fiber->odd) continue;
    fiber->seen[fiber->barrier] = arrivals.phase;
    fiber->state = kReady;
  }
}

}  // namespace trak_ext::host_run
