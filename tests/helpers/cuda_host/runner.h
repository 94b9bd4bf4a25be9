// Runs kernels on the host, a fiber a thread, a block after the other (see device_host.h).
#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

// Which of the faults below is planted; 0: none. For the tests to set.
extern "C" int host_planted;

namespace trak_ext::host_run {

// Faults of the device that is played, or of kernels on it, that give wrong results and no error.
enum class Planted : int {
  kSwappedHalves = 1,     // of a matrix instruction's first operand
  kWrongStride = 2,       // in a warpgroup's matrix descriptor
  kMissingTail = 3,       // the last parameter, or the last sample
  kWrongSign = 4,         // where thread 5 makes or stages a number
  kDroppedLastChunk = 5,  // of several
  kStaleWorkspace = 6,    // what is written to the workspace is added to what was there
};

inline bool is_planted(Planted fault) { return host_planted == static_cast<int>(fault); }

struct Fiber;
struct Reading;

// A matrix instruction as its threads' registers and shared memory have it, before and after, for a
// witness that knows the layouts from elsewhere (tests/helpers/cuda_host/witness.py).
struct MatrixInstruction {
  int64_t block;
  int threads;           // that take part, 32 or 128
  int rows;              // of the second operand, 8 for a warp's
  int sums;              // registers of `before` and `after` a thread
  int add;               // 0: `before` is not added to
  const uint32_t* a;     // [threads, 4]
  const uint32_t* b;     // [threads, 2], a warp's
  const float* before;   // [threads, sums]
  const float* after;    // [threads, sums]
  uint64_t operand;      // the descriptor of a warpgroup's second operand
  const char* shared;    // [shared_bytes]
  int64_t shared_bytes;  // of the block
  uint64_t shared_base;  // the address of `shared` as a descriptor has it
};
using Witness = void (*)(const MatrixInstruction*);

// A launch that is noted instead of run: which kernel (its mangled name) with what.
struct Launch {
  const char* kernel;
  const void* argument;
  int64_t argument_bytes;
  int64_t blocks;
  int threads;
  int shared_bytes;
};
using LaunchNote = void (*)(const Launch*);

class Runner {
 public:
  static Runner& get();
  ~Runner();

  // For the next launches: what decides the order of threads and blocks, and which memory there is.
  void begin(uint64_t order_seed);
  void allow(const void* address, int64_t bytes);
  void set_workspace(const void* address, int64_t bytes);
  bool in_workspace(const void* address) const;

  // Is shown every matrix instruction from now on; null: nobody is.
  void show_to(Witness witness) { witness_ = witness; }

  // Launches are noted rather than run from now on; null: they run.
  void note_launches(LaunchNote note) { note_ = note; }
  bool note(const void* kernel, Launch launch);

  // Runs body(data) in every thread of every block. Throws std::runtime_error with the first fault.
  void run(int64_t blocks, int threads, int shared_bytes, void (*body)(void*), void* data);

  int thread() const { return current_; }
  int64_t block() const { return block_; }
  char* shared() { return shared_; }

  void block_barrier();
  void read_shared(const void* address, int bytes, int alignment);
  void write_shared(const void* address, int bytes, int alignment);
  void check_global(const void* address, int bytes, int alignment);
  void copy_async(void* shared, const void* global, int bytes);
  void commit_copies();
  void wait_copies(int pending);
  void multiply_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
  uint32_t ballot(bool yes);

  // The warpgroup's matrix instruction (warpgroup.cpp).
  uint64_t describe_operand(const void* shared, int summed_bytes, int row_bytes);
  void begin_multiply(const uint32_t* a, int count, const float* d);
  void multiply_async(int rows, float* d, const uint32_t* a, uint64_t operand, bool add);
  void commit_multiplied();
  void wait_multiplied(int pending);

  // Barriers in shared memory and the copies that they count (arrivals.cpp).
  void begin_arrivals(const void* barrier, int arrivals);
  void publish_arrivals();
  void arrive(const void* barrier);
  void expect_bytes(const void* barrier, int bytes);
  void copy_bulk(void* shared, const void* global, int bytes, const void* barrier);
  void wait_arrivals(const void* barrier, int odd);

 private:
  // Two bytes of shared memory: who touched them last, and between which barriers.
  struct Cell {
    int64_t write_epoch = -1;
    int64_t read_epoch = -1;
    int writer = -1;
    int reader = -1;  // kMany if several
    bool written = false;
    int in_flight = 0;
    int multiplied = 0;  // matrix instructions under way that read it
    // What a bulk copy that landed here counted for.
    int64_t barrier = -1;
    int64_t phase = -1;
  };
  static constexpr int kMany = -2;

  // A barrier in shared memory.
  struct Arrivals {
    int count = 0;    // a phase
    int pending = 0;  // of this phase
    int64_t bytes = 0;
    int64_t phase = 0;
    int64_t epoch = 0;  // when it began
    int beginner = 0;
    bool published = false;
  };
  struct BulkCopy {
    char* to;
    const void* from;
    int bytes;
    int64_t barrier;
    int64_t phase;
  };

  Runner() = default;
  void run_block(int threads, int shared_bytes);
  void pause(int state);
  void release(int state, int first, int count);
  void multiply_warp(int first);
  void fault(const std::string& what);
  Cell* cells_of(const void* address, int bytes, int alignment);
  void mark_written(Cell& cell, const char* what);
  void start_multiply(int first);
  uint16_t read_operand(int64_t at, Reading& reading);
  void check_multiplied();
  static void enter();
  Arrivals& arrivals_at(const void* barrier);
  void count_arrivals(Arrivals& arrivals);
  void land(size_t index);
  void land_some();
  void release_arrivals();

  std::mt19937_64 random_{0};
  Witness witness_ = nullptr;
  LaunchNote note_ = nullptr;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges_;
  std::pair<uintptr_t, uintptr_t> workspace_{0, 0};
  std::vector<Fiber*> fibers_;
  std::vector<char> shared_storage_;
  std::vector<Cell> cells_;
  std::map<int64_t, Arrivals> arrivals_;  // by their place in shared memory
  std::vector<BulkCopy> bulk_;            // under way
  char* shared_ = nullptr;
  int shared_bytes_ = 0;
  int64_t block_ = 0;
  int64_t epoch_ = 0;
  int current_ = 0;
  void (*body_)(void*) = nullptr;
  void* data_ = nullptr;
  std::string fault_;
};

}  // namespace trak_ext::host_run
