// Vectors as wide as the translation unit's instruction set, on the compiler's vector extensions.
// Everything here has internal linkage: this header means another thing in every unit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace trak_ext::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecQ __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecHalfU __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VecF;
};
template <>
struct VectorOf<double> {
  using type = VecD;
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

#define TRAK_EXT_INLINE inline __attribute__((always_inline))
// For loops that need every register for themselves.
#define TRAK_EXT_OUT_OF_LINE __attribute__((noinline))

template <class V>
TRAK_EXT_INLINE V load(const void* address) {
  V value;
  std::memcpy(&value, address, sizeof(V));
  return value;
}

template <class V>
TRAK_EXT_INLINE void store(void* address, V value) {
  std::memcpy(address, &value, sizeof(V));
}

// x - 0 is x for every x, which compilers know; x + 0 is not (-0), and costs an add.
template <class T>
TRAK_EXT_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// For sums, where levels may differ in the last bit: fused where the machine fuses.
TRAK_EXT_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

TRAK_EXT_INLINE VecD multiply_add(VecD a, VecD b, VecD c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The product of the low 32 bits of every 64-bit lane; the high halves are ignored.
TRAK_EXT_INLINE VecQ multiply_low_halves(VecQ a, VecQ b) {
#if defined(__AVX512F__)
  return (VecQ)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VecQ)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecQ)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The low 32 bits of the lanes of two vectors, in the order that packed_order() tells.
TRAK_EXT_INLINE VecU pack_low_halves(VecQ first, VecQ second) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return (VecU)_mm512_permutex2var_epi32((__m512i)first, even, (__m512i)second);
#elif defined(__AVX2__)
  return (VecU)_mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);
#else
  const VecHalfU halves[2] = {__builtin_convertvector(first, VecHalfU),
                              __builtin_convertvector(second, VecHalfU)};
  VecU packed;
  std::memcpy(&packed, halves, sizeof(packed));
  return packed;
#endif
}

// The places, in what pack_low_halves() returns, of the lanes of its argument 0 or 1.
TRAK_EXT_INLINE VecQ packed_order(int argument) {
#if defined(__AVX512F__)
  const VecQ lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return lanes + static_cast<uint64_t>(8 * argument);
#elif defined(__AVX2__)
  const VecQ lanes = {0, 1, 4, 5};
  return lanes + static_cast<uint64_t>(2 * argument);
#else
  const VecQ lanes = {0, 1};
  return lanes + static_cast<uint64_t>(2 * argument);
#endif
}

}  // namespace
}  // namespace trak_ext::cpu
