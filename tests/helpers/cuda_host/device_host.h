// The device's operations on the host (see csrc/cuda/device/device.h), strict where a device is
// lenient:
//
//   - every thread of a block is a fiber; which one runs next is drawn at random;
//   - shared memory starts as NaN, and reading what nobody wrote is an error;
//   - two threads that touch the same shared bytes between two barriers, one of them writing, are
//   an error, whatever order they happened to run in;
//   - asynchronous copies land when they are waited for, not before;
//   - what a warpgroup's matrix instruction uses may not be touched before it is waited for
//   (warpgroup.cpp);
//   - bulk copies land at a random time, and what they bring may be read by who waited for it
//   (arrivals.cpp);
//   - every access is checked against the memory that the caller named.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runner.h"

#define TRAK_EXT_DEVICE inline
#define TRAK_EXT_KERNEL(threads, blocks_per_sm) inline void
#define TRAK_EXT_KERNEL_ARGUMENT const
#define TRAK_EXT_DEVICE_TABLE static const

namespace trak_ext::cuda::device {

using Stream = void*;
using host_run::is_planted;
using host_run::Planted;
using host_run::Runner;

inline int thread_index() { return Runner::get().thread(); }
inline int64_t block_index() { return Runner::get().block(); }
inline void block_barrier() { Runner::get().block_barrier(); }
inline char* shared_memory() { return Runner::get().shared(); }

template <class T>
T load_shared(const void* address) {
  Runner::get().read_shared(address, sizeof(T), alignof(T));
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
void store_shared(void* address, T value) {
  Runner::get().write_shared(address, sizeof(T), alignof(T));
  if constexpr (std::is_floating_point_v<T>) {
    if (is_planted(Planted::kWrongSign) && thread_index() == 5) value = -value;
  }
  std::memcpy(address, &value, sizeof(T));
}
template <class T>
T load_global(const void* address) {
  Runner::get().check_global(address, sizeof(T), alignof(T));
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
void store_global(void* address, T value) {
  Runner::get().check_global(address, sizeof(T), alignof(T));
  if (is_planted(Planted::kStaleWorkspace) && Runner::get().in_workspace(address)) {
    if constexpr (std::is_floating_point_v<T>) {
      T before;
      std::memcpy(&before, address, sizeof(T));
      value += before;
    } else {
      return;
    }
  }
  std::memcpy(address, &value, sizeof(T));
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  Runner::get().copy_async(shared, global, kBytes);
}
inline void commit_copies() { Runner::get().commit_copies(); }
template <int kPending>
void wait_copies() {
  Runner::get().wait_copies(kPending);
}

inline void warp_barrier() {}  // nothing goes through shared memory between lanes

// Register i gets four bytes of row g of matrix i, half i % 2 of pair i / 2.
inline void load_four_matrices(const char* shared, int half_bytes, int pair_bytes,
                               uint32_t* registers) {
  for (int i = 0; i < 4; ++i) {
    registers[i] = load_shared<uint32_t>(shared + i % 2 * half_bytes + i / 2 * pair_bytes +
                                         thread_index() % 32 * 4);
  }
}
inline void load_two_matrices(const char* shared, int half_bytes, uint32_t* registers) {
  for (int i = 0; i < 2; ++i) {
    registers[i] = load_shared<uint32_t>(shared + i * half_bytes + thread_index() % 32 * 4);
  }
}

inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Runner::get().multiply_bf16(d, a, b0, b1);
}

constexpr bool kHasWarpgroups = true;
inline void never_called() {}
inline int warpgroup_index() { return thread_index() / 128; }
inline void begin_arrivals(char* barrier, int arrivals) {
  Runner::get().begin_arrivals(barrier, arrivals);
}
inline void publish_arrivals() { Runner::get().publish_arrivals(); }
inline void arrive(char* barrier) { Runner::get().arrive(barrier); }
inline void expect_bytes(char* barrier, int bytes) { Runner::get().expect_bytes(barrier, bytes); }
inline void copy_bulk(char* shared, const char* global, int bytes, char* barrier) {
  Runner::get().copy_bulk(shared, global, bytes, barrier);
}
inline void wait_arrivals(char* barrier, int odd) { Runner::get().wait_arrivals(barrier, odd); }
inline uint64_t describe_operand(const void* shared, int summed_bytes, int row_bytes) {
  return Runner::get().describe_operand(shared, summed_bytes, row_bytes);
}
inline uint64_t move_operand(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes >> 4);
}
template <int kCount, int kRowTiles>
void begin_multiply(uint32_t (&a)[kCount][4], float (&d)[kRowTiles][4]) {
  Runner::get().begin_multiply(a[0], kCount, d[0]);
}
template <int kRows>
void multiply_async(float (&d)[kRows / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  Runner::get().multiply_async(kRows, d[0], a, b, add);
}
inline void commit_multiplied() { Runner::get().commit_multiplied(); }
template <int kPending>
void wait_multiplied() {
  Runner::get().wait_multiplied(kPending);
}
template <int kRowTiles>
void finish_multiply(float (& /*d*/)[kRowTiles][4]) {
  wait_multiplied<0>();
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint32_t to_bf16(float value, bool nearest) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7FFFu;
  return (nearest ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits) >> 16;
}
inline uint32_t pack_nearest(float lower, float upper) {
  if (is_planted(Planted::kWrongSign) && thread_index() == 5) lower = -lower;
  return to_bf16(lower, true) | to_bf16(upper, true) << 16;
}
inline uint32_t pack_truncated(float lower, float upper) {
  return to_bf16(lower, false) | to_bf16(upper, false) << 16;
}

inline float limit_magnitude(float value, float limit) {
  return std::fmax(std::fmin(value, limit), -limit);
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa + 1024),
                               (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return bits >> 15 ? -magnitude : magnitude;
}

inline uint32_t clear_then_set(uint32_t word, uint32_t mask, uint32_t one) {
  if (is_planted(Planted::kWrongSign) && thread_index() == 5) word ^= mask & (0u - mask);
  return (~word & mask) | one;
}

inline uint32_t ballot(bool yes) { return Runner::get().ballot(yes); }
inline int count_bits(uint32_t word) { return __builtin_popcount(word); }

inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

template <class T>
T infinity() {
  return static_cast<T>(INFINITY);
}

template <class Argument>
void launch(void (*kernel)(Argument), int64_t blocks, int threads, int shared_bytes,
            Stream /*stream*/, Argument argument) {
  if (Runner::get().note(reinterpret_cast<const void*>(kernel),
                         {nullptr, &argument, sizeof(argument), blocks, threads, shared_bytes})) {
    return;
  }
  struct Call {
    void (*kernel)(Argument);
    const Argument* argument;
  };
  Call call = {kernel, &argument};
  Runner::get().run(
      blocks, threads, shared_bytes,
      [](void* data) {
        const Call& call = *static_cast<Call*>(data);
        call.kernel(*call.argument);
      },
      &call);
}

}  // namespace trak_ext::cuda::device
