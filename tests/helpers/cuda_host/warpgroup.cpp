// The warpgroup's matrix instruction on the host, after the PTX ISA's chapter on asynchronous
// warpgroup-level matrix instructions. A device may read registers and shared memory, and write the
// sums, at any time between the start and the wait; so in between
//
//   - the sums read as NaN, and neither they nor the other registers may change;
//   - the shared memory may not be written;
//
// and what the instruction reads must have come by a copy that all its threads have waited for.
#include <stdexcept>

#include "fiber.h"
#include "runner.h"

namespace trak_ext::host_run {
namespace {

constexpr uint32_t kPoison = 0x7FEDCBA9u;  // a NaN
// Where the block's shared memory begins as the instruction sees it: not at 0, as on a device.
constexpr uint64_t kSharedBase = 1024;

void poison(float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) std::memcpy(values + i, &kPoison, sizeof(kPoison));
}

bool is_poison(const float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(values + i, &kPoison, sizeof(kPoison)) != 0) return false;
  }
  return true;
}

// Bytes of a 14-bit field of a descriptor, which leaves out the low four bits.
int64_t field(uint64_t operand, int bit) {
  return static_cast<int64_t>((operand >> bit & 0x3FFFu) << 4);
}

}  // namespace

uint64_t Runner::describe_operand(const void* shared, int summed_bytes, int row_bytes) {
  const auto at = static_cast<uint64_t>(static_cast<const char*>(shared) - shared_) + kSharedBase;
  if (at % 16 != 0 || summed_bytes % 16 != 0 || row_bytes % 16 != 0) {
    fault("a matrix descriptor of what is no multiple of 16 bytes");
  }
  if (is_planted(Planted::kWrongStride)) summed_bytes = row_bytes;
  return (at & 0x3FFFFu) >> 4 | static_cast<uint64_t>(summed_bytes >> 4) << 16 |
         static_cast<uint64_t>(row_bytes >> 4) << 32;
}

void Runner::begin_multiply(const uint32_t* a, int count, const float* d) {
  MatrixState& matrix = fibers_[static_cast<size_t>(current_)]->matrix;
  matrix.fenced_d = d;
  for (int i = 0; i < count; ++i) {
    std::memcpy(matrix.fenced_a[a + 4 * i].data(), a + 4 * i, 4 * sizeof(uint32_t));
  }
}

void Runner::multiply_async(int rows, float* d, const uint32_t* a, uint64_t operand, bool add) {
  MatrixState& matrix = fibers_[static_cast<size_t>(current_)]->matrix;
  const auto fenced = matrix.fenced_a.find(a);
  if (fenced == matrix.fenced_a.end() ||
      std::memcmp(fenced->second.data(), a, 4 * sizeof(uint32_t)) != 0) {
    fault("a matrix instruction whose first operand changed since the last fence");
  }
  const auto hidden = matrix.hidden.find(d);
  if (hidden == matrix.hidden.end() ? matrix.fenced_d != d
                                    : hidden->second.size() != static_cast<size_t>(rows / 2)) {
    fault("a matrix instruction whose sums were used since the last fence");
  }
  matrix.rows = rows;
  matrix.d = d;
  matrix.a = a;
  matrix.operand = operand;
  matrix.add = add;
  pause(kAtWarpgroup);
}

// Two bytes of the operand in shared memory.
uint16_t Runner::read_operand(int64_t at, Reading& reading) {
  const auto refuse = [&](const char* what) {
    throw std::runtime_error("block " + std::to_string(block_) + ": a matrix instruction reads " +
                             what);
  };
  if (at < 0 || at + 2 > shared_bytes_) refuse("past the end of shared memory");
  Cell& cell = cells_[static_cast<size_t>(at / 2)];
  if (cell.in_flight > 0) refuse("shared memory while a copy to it is under way");
  if (!cell.written) refuse("shared memory that nobody wrote");
  if (cell.barrier < 0) refuse("shared memory of ordinary stores, which it sees through a fence");
  if (!reading.waited(fibers_, cell.barrier, cell.phase)) {
    refuse("shared memory that a thread has not waited for");
  }
  cell.read_epoch = epoch_;
  cell.reader = kMany;
  ++cell.multiplied;
  reading.cells.push_back(static_cast<size_t>(at / 2));
  uint16_t value;
  std::memcpy(&value, shared_ + at, sizeof(value));
  return value;
}

// All threads of the warpgroup from `first` on have come to the same instruction.
void Runner::start_multiply(int first) {
  const MatrixState& leader = fibers_[static_cast<size_t>(first)]->matrix;
  const uint64_t operand = leader.operand;
  const int rows = leader.rows;
  // Swizzled operands and a base offset are not used, and not played here.
  if ((operand & ~0x00003FFF3FFF3FFFull) != 0) {
    throw std::runtime_error("a matrix descriptor with bits set that mean something else");
  }
  const int64_t start = field(operand, 0) - static_cast<int64_t>(kSharedBase);
  const int64_t summed_bytes = field(operand, 16), row_bytes = field(operand, 32);
  const auto reading = std::make_shared<Reading>();
  reading->first = first;
  std::vector<double> b(static_cast<size_t>(16 * rows));  // [16, rows]
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < rows; ++n) {
      const int64_t at = start + k / 8 * summed_bytes + n / 8 * row_bytes + n % 8 * 16 + k % 8 * 2;
      b[static_cast<size_t>(k * rows + n)] = from_bf16(read_operand(at, *reading));
    }
  }
  std::vector<double> sums(static_cast<size_t>(kWarpgroup / 2 * rows), 0.0);  // [64, rows]
  const auto sum_of = [&](int thread, size_t i) -> double& {
    const int lane = thread % kWarp;
    const size_t row = static_cast<size_t>(thread / kWarp * 16 + lane / 4) + i / 2 % 2 * 8;
    const size_t column = i / 4 * 8 + static_cast<size_t>(lane % 4 * 2) + i % 2;
    return sums[row * static_cast<size_t>(rows) + column];
  };
  const auto count = static_cast<size_t>(rows / 2);
  std::vector<double> a(64 * 16);  // [64, 16]
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    MatrixState& matrix = fibers_[static_cast<size_t>(first + thread)]->matrix;
    if (matrix.operand != operand || matrix.rows != rows || matrix.add != leader.add) {
      throw std::runtime_error("threads of a warpgroup in different matrix instructions");
    }
    const int row = thread / kWarp * 16 + thread % kWarp / 4, slot = thread % 4;
    for (int i = 0; i < 8; ++i) {  // register i / 2, half i % 2
      const int at = (row + i / 2 % 2 * 8) * 16 + 2 * slot + i / 4 * 8 + i % 2;
      const int half = i % 2 ^ static_cast<int>(is_planted(Planted::kSwappedHalves));
      a[static_cast<size_t>(at)] = from_bf16(matrix.a[i / 2] >> (16 * half));
    }
    if (!leader.add) continue;
    const auto hidden = matrix.hidden.find(matrix.d);
    const float* from = hidden == matrix.hidden.end() ? matrix.d : hidden->second.data();
    for (size_t i = 0; i < count; ++i) sum_of(thread, i) = from[i];
  }
  std::vector<float> before, after;
  std::vector<uint32_t> registers;
  if (witness_ != nullptr) {
    for (int thread = 0; thread < kWarpgroup; ++thread) {
      const MatrixState& matrix = fibers_[static_cast<size_t>(first + thread)]->matrix;
      const auto hidden = matrix.hidden.find(matrix.d);
      const float* from = hidden == matrix.hidden.end() ? matrix.d : hidden->second.data();
      before.insert(before.end(), from, from + count);
      registers.insert(registers.end(), matrix.a, matrix.a + 4);
    }
  }
  for (size_t i = 0; i < 64; ++i) {
    for (size_t k = 0; k < 16; ++k) {
      for (size_t n = 0; n < static_cast<size_t>(rows); ++n) {
        sums[i * static_cast<size_t>(rows) + n] +=
            a[i * 16 + k] * b[k * static_cast<size_t>(rows) + n];
      }
    }
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    MatrixState& matrix = fibers_[static_cast<size_t>(first + thread)]->matrix;
    std::vector<float>& hidden = matrix.hidden[matrix.d];
    hidden.resize(count);
    for (size_t i = 0; i < count; ++i) hidden[i] = truncate(sum_of(thread, i));
    if (witness_ != nullptr) after.insert(after.end(), hidden.begin(), hidden.end());
    poison(matrix.d, count);
    Product product = {matrix.d, count, matrix.a, {}, reading};
    std::memcpy(product.a_then, matrix.a, sizeof(product.a_then));
    matrix.open.push_back(product);
  }
  if (witness_ == nullptr) return;
  const MatrixInstruction shown = {
      block_,        kWarpgroup,   rows,    rows / 2, leader.add,    registers.data(), nullptr,
      before.data(), after.data(), operand, shared_,  shared_bytes_, kSharedBase};
  witness_(&shown);
}

void Runner::commit_multiplied() {
  MatrixState& matrix = fibers_[static_cast<size_t>(current_)]->matrix;
  matrix.groups.push_back(std::move(matrix.open));
  matrix.open.clear();
}

void Runner::wait_multiplied(int pending) {
  MatrixState& matrix = fibers_[static_cast<size_t>(current_)]->matrix;
  while (static_cast<int>(matrix.groups.size()) > pending) {
    const std::vector<Product> group = std::move(matrix.groups.front());
    matrix.groups.erase(matrix.groups.begin());
    for (const Product& product : group) {
      if (std::memcmp(product.a_then, product.a, sizeof(product.a_then)) != 0) {
        fault("a register of a matrix instruction changed while it was under way");
      }
      if (--product.reading->threads > 0) continue;
      for (size_t cell : product.reading->cells) --cells_[cell].multiplied;
    }
  }
  // Sums that no instruction under way has appear.
  for (auto hidden = matrix.hidden.begin(); hidden != matrix.hidden.end();) {
    bool busy = false;
    for (const auto& group : matrix.groups) {
      for (const Product& product : group) busy |= product.d == hidden->first;
    }
    for (const Product& product : matrix.open) busy |= product.d == hidden->first;
    if (busy) {
      ++hidden;
      continue;
    }
    if (!is_poison(hidden->first, hidden->second.size())) {
      fault("sums changed while a matrix instruction was under way");
    }
    std::memcpy(hidden->first, hidden->second.data(), hidden->second.size() * sizeof(float));
    if (matrix.fenced_d == hidden->first) matrix.fenced_d = nullptr;
    hidden = matrix.hidden.erase(hidden);
  }
}

void Runner::check_multiplied() {
  if (!fibers_[static_cast<size_t>(current_)]->matrix.hidden.empty()) {
    fault("a thread ended with a matrix instruction under way");
  }
}

}  // namespace trak_ext::host_run
