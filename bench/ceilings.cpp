// What one core can do at most, in loops of nothing else; compiled by ceilings.py for the level
// that it measures. Every accumulator starts from another value, or compilers would merge them.
#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kAccumulators = 24;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kAccumulators = 12;
#else
constexpr int kBytes = 16;
constexpr int kAccumulators = 12;
#endif
typedef float VecF __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;

inline VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// One table lookup by the low bits of each lane's index.
inline VecF look_up(VecF table, VecF index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)index, table);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(table, (__m256i)index);
#else
  return table + index;
#endif
}

float first_lanes(const VecF* values) {
  float total = 0;
  for (int i = 0; i < kAccumulators; ++i) total += values[i][0];
  return total;
}

}  // namespace

// Returns the floating-point operations done.
extern "C" double run_multiply_add(int64_t rounds, float seed, float* sink) {
  VecF sum[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sum[i] = VecF{} + (seed + static_cast<float>(i));
  const VecF a = VecF{} + 0.999f * seed, b = VecF{} + 0.001f * seed;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kAccumulators; ++i) sum[i] = multiply_add(sum[i], a, b);
  }
  *sink = first_lanes(sum);
  return 2.0 * kLanes * kAccumulators * static_cast<double>(rounds);
}

// Lookup and add. Returns the lookups done, lanes counted.
extern "C" double run_lookup_add(int64_t rounds, float seed, float* sink) {
  VecF sum[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sum[i] = VecF{} + (seed + static_cast<float>(i));
  VecF table = VecF{} + seed;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kAccumulators; ++i) {
      // The table stays in its register, but the compiler may not know what it holds.
      asm volatile("" : "+x"(table));
      sum[i] += look_up(table, sum[i]);
    }
  }
  *sink = first_lanes(sum);
  return static_cast<double>(kLanes) * kAccumulators * static_cast<double>(rounds);
}

// Reads memory once. Returns the bytes read.
extern "C" double run_read(const float* data, int64_t count, float* sink) {
  VecF sum[8] = {};
  for (int64_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes) {
    for (int j = 0; j < 8; ++j) {
      sum[j] += *reinterpret_cast<const VecF*>(data + i + j * kLanes);
    }
  }
  float total = 0;
  for (const VecF& value : sum) total += value[0];
  *sink = total;
  return 4.0 * static_cast<double>(count);
}
