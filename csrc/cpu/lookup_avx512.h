// The lookup projection for AVX-512F.
//
// A sum of +-g over 5 parameters takes 32 values. Two ways to look it up for 16 columns at once,
// by their 5 sign bits, in one instruction, with one more to accumulate; 80 multiply-adds in two:
//
//   whole:  the 32 values fill two vectors; vpermi2ps reads an index's low 5 bits; add.
//   folded: flipping all 5 signs negates the sum, so 16 values do: vpermps by which signs differ
//           from their neighbour's (4 bits); the first parameter's sign enters as the factor of an
//           FMA, which costs what an add costs.
//
// They take turns because they lean on different ports. Pairs a cycle measured on Zen 4, loads and
// sign handling included: whole alone 0.52 to 0.6, folded alone 0.6, in turns 0.68; vpermi2ps with
// an FMA would be 0.5.
#pragma once

#include "lookup_tables_avx512.h"

namespace trak_ext::cpu {
namespace {

struct LookupAvx512 {
  static constexpr int kGroupRows = 8;
  static constexpr int kBlocks = 1;  // a chunk's: 8 rows' tables fill 19 KiB of the L1 cache
  // As many as the registers hold, as a group's row of tables is loaded once for all of them.
  static constexpr int tile_vectors(int rows) { return rows <= 3 ? 4 : rows <= 5 ? 3 : 2; }

  // Of a word's 32 parameters, three steps take 10 each, 5 folded and 5 whole; the 2 left over at
  // its top make a lookup of 4 with the next word's 2.
  static constexpr int kSteps = 3;
  static constexpr int kStepFloats = 16 + 32;
  static constexpr int kPairFloats = 2 * kSteps * kStepFloats + 16;  // of two words
  static constexpr int kTableFloats = kBlockWords / 2 * kPairFloats;

  // First bits of the folded groups: 0, 10 and 20.
  static constexpr uint32_t kFoldedBits = 0x01E0781E;

  static void build_tables(int rows, int blocks, const float* values, float* tables);
  static VecU fold(VecU word) { return fold_bits(word, kFoldedBits); }
  template <int kRows, int kVectors>
  static void accumulate(int blocks, const float* tables, const uint32_t* signs, float* partial);
};

// values: [rows, 128] -> tables: two of [[2 words, 3 steps, rows, 16 + 32], [rows, 16]]
void LookupAvx512::build_tables(int rows, int, const float* values, float* tables) {
  const TableSums sums;
  for (int word = 0; word < kBlockWords; ++word) {
    for (int step = 0; step < kSteps; ++step) {
      for (int r = 0; r < rows; ++r, tables += kStepFloats) {
        const float* g = values + r * kBlockParams + word * 32 + step * 10;
        _mm512_store_ps(tables, sums.folded(g));
        const __m512 sum = sums.of_four(g + 5), last = _mm512_set1_ps(g[9]);
        _mm512_store_ps(tables + 16, _mm512_sub_ps(sum, last));
        _mm512_store_ps(tables + 32, _mm512_add_ps(sum, last));
      }
    }
    if (word % 2 == 0) continue;
    for (int r = 0; r < rows; ++r, tables += 16) {
      const float* g = values + r * kBlockParams + word * 32;
      const float left_over[4] = {g[-2], g[-1], g[30], g[31]};
      _mm512_store_ps(tables, sums.of_four(left_over));
    }
  }
}

// +-1 by the top bit.
inline __m512 sign_factor(__m512i bits) {
  const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1.0f));
  const __m512i top = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits, top, one, 0xEA));
}

// partial: [kVectors, kRows, 16], adds the block's sums.
template <int kRows, int kVectors>
TRAK_EXT_OUT_OF_LINE void LookupAvx512::accumulate(int, const float* tables, const uint32_t* signs,
                                                   float* partial) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
#pragma GCC unroll 1
  for (int pair = 0; pair < kBlockWords / 2; ++pair, signs += 32) {
    __m512i bits[kVectors], left_over[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) bits[v] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int word = 0; word < 2; ++word) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        left_over[v] = bits[v];
        bits[v] = _mm512_ror_epi32(_mm512_load_si512(signs + v * 64 + word * 16), 1);
      }
#pragma GCC unroll 1
      for (int step = 0; step < LookupAvx512::kSteps; ++step) {
        // A folded group's index is the low 4 bits, the first parameter's sign the top one.
        __m512 factor[kVectors];
        __m512i index[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          factor[v] = sign_factor(bits[v]);
          index[v] = _mm512_ror_epi32(bits[v], 4);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r, tables += LookupAvx512::kStepFloats) {
          __m512 folded = _mm512_load_ps(tables);
          __m512 low = _mm512_load_ps(tables + 16), high = _mm512_load_ps(tables + 32);
          keep_in_register(folded);
          keep_in_register(low);
          keep_in_register(high);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            sum[r][v] =
                _mm512_fmadd_ps(_mm512_permutexvar_ps(bits[v], folded), factor[v], sum[r][v]);
            sum[r][v] = _mm512_add_ps(sum[r][v], _mm512_permutex2var_ps(low, index[v], high));
          }
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) bits[v] = _mm512_ror_epi32(index[v], 6);
      }
    }
    // The first word's top 2 bits are bits 31 and 0 of `left_over`, the second's of `bits`.
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      bits[v] = _mm512_ternarylogic_epi32(_mm512_rol_epi32(left_over[v], 1),
                                          _mm512_rol_epi32(bits[v], 3), _mm512_set1_epi32(3), 0xE4);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, tables += 16) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] =
            _mm512_add_ps(sum[r][v], _mm512_permutexvar_ps(bits[v], _mm512_load_ps(tables)));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* p = partial + (v * kRows + r) * 16;
      _mm512_store_ps(p, _mm512_add_ps(_mm512_load_ps(p), sum[r][v]));
    }
  }
}

}  // namespace
}  // namespace trak_ext::cpu
