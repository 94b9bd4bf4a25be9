// The lookup projection for AVX2, FMA and F16C.
//
// A sum of +-g over 4 parameters takes 16 values, but flipping all 4 signs negates it: 8 values
// do, which fill a vector. `vpermps` looks up 8 columns at once by which signs differ from their
// neighbour's (3 bits); the last parameter's sign enters as the factor of the FMA that accumulates,
// which costs what an add costs: 32 multiply-adds in two instructions.
#pragma once

#include "lookup_driver.h"

namespace trak_ext::cpu {
namespace {

// The words as the lookups want them: a bit tells whether its sign differs from that of the next
// parameter, but for every fourth, which stays the sign.
TRAK_EXT_INLINE VecU fold_bits(VecU word) { return word ^ ((word >> 1) & 0x77777777u); }

struct LookupAvx2 {
  static constexpr int kGroupRows = 12;
  static constexpr int kBlocks = 2;  // a chunk's: 12 rows' tables fill 24 KiB of the L1 cache
  // As many as the registers hold; from six rows on the sums of one fill them.
  static constexpr int tile_vectors(int rows) {
    return rows == 1 ? 4 : rows == 2 ? 3 : rows <= 5 ? 2 : 1;
  }

  static constexpr int kWordLookups = 8;
  static constexpr int kTableSize = 8;
  static constexpr int kTableFloats = kBlockWords * kWordLookups * kTableSize;

  static void build_tables(int rows, int blocks, const float* values, float* tables);
  static VecU fold(VecU word) { return fold_bits(word); }
  template <int kRows, int kVectors>
  static void accumulate(int blocks, const float* tables, const uint32_t* signs, float* partial);
};

// values: [rows, kBlocks * 128] -> tables: [blocks * 32 lookups, rows, 8]
//
// Minus the sum of g[0..3], g[3]'s sign being +: lane bit i set is "g[i]'s sign differs from
// g[i + 1]'s". Minus, as the factor's sign bit is the sign's bit, and a set one means minus. Values
// are multiplied by +-1 and nothing else: a zero would turn Inf into NaN.
void LookupAvx2::build_tables(int rows, int blocks, const float* values, float* tables) {
  const __m256 s0 = _mm256_setr_ps(-1, 1, 1, -1, 1, -1, -1, 1);
  const __m256 s1 = _mm256_setr_ps(-1, -1, 1, 1, 1, 1, -1, -1);
  const __m256 s2 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1);
  for (int lookup = 0; lookup < blocks * kBlockWords * kWordLookups; ++lookup) {
    for (int r = 0; r < rows; ++r, tables += kTableSize) {
      const float* g = values + r * kBlocks * kBlockParams + lookup * 4;
      __m256 sum = _mm256_mul_ps(s0, _mm256_broadcast_ss(g));
      sum = _mm256_fmadd_ps(s1, _mm256_broadcast_ss(g + 1), sum);
      sum = _mm256_fmadd_ps(s2, _mm256_broadcast_ss(g + 2), sum);
      _mm256_store_ps(tables, _mm256_sub_ps(sum, _mm256_broadcast_ss(g + 3)));
    }
  }
}

// +-1 by bit 3.
inline __m256 sign_factor(__m256i bits) {
  const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28));
  return _mm256_or_ps(_mm256_and_ps(top, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
}

// partial: [kVectors, kRows, 8], adds the chunk's sums.
template <int kRows, int kVectors>
TRAK_EXT_OUT_OF_LINE void LookupAvx2::accumulate(int blocks, const float* tables,
                                                 const uint32_t* signs, float* partial) {
  __m256 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_setzero_ps();
  }
#pragma GCC unroll 1
  for (int word = 0; word < blocks * kBlockWords; ++word, signs += kSignLanes) {
    __m256i bits[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* source = signs + v * LookupAvx2::kBlocks * kBlockWords * kSignLanes;
      bits[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(source));
    }
#pragma GCC unroll 1
    for (int i = 0; i < LookupAvx2::kWordLookups; ++i, tables += kRows * LookupAvx2::kTableSize) {
      __m256 factor[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) factor[v] = sign_factor(bits[v]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m256 table = _mm256_load_ps(tables + r * LookupAvx2::kTableSize);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const __m256 value = _mm256_permutevar8x32_ps(table, bits[v]);
          sum[r][v] = _mm256_fmadd_ps(value, factor[v], sum[r][v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) bits[v] = _mm256_srli_epi32(bits[v], 4);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* p = partial + (v * kRows + r) * kSignLanes;
      _mm256_store_ps(p, _mm256_add_ps(_mm256_load_ps(p), sum[r][v]));
    }
  }
}

}  // namespace
}  // namespace trak_ext::cpu
