// The lookup projection in 16-bit fixed point, for AVX-512BW and VNNI.
//
// The two halves of a 32-bit lane look up two groups of 5 parameters, folded to 16 values each, in
// one table of 32 (`vpermw`); `vpdpwssd` multiplies both by their first parameter's sign and adds
// them to the lane's sum: 160 multiply-adds in two instructions, exact in int32.
//
// Rounding happens once, where sums become table entries. Per row and chunk of 384 parameters the
// unit is a power of two such that entries take up to 15 bits and a sign; a sum of 78 entries then
// errs by about 2^-13 of the chunk's L2 norm, whatever the scale of other chunks.
#pragma once

#include "lookup_tables_avx512.h"

namespace trak_ext::cpu {
namespace {

struct LookupMedium {
  static constexpr int kGroupRows = 12;
  static constexpr int kBlocks = 3;  // a chunk's: 12 rows' tables fill 30 KiB of the L1 cache
  static constexpr int tile_vectors(int rows) { return rows <= 4 ? 4 : rows <= 8 ? 2 : 1; }

  // Either half of a word, 16 parameters, is three folded groups and its top bit; the top bits of
  // the block's eight halves make one more lookup, of 4 and 4 parameters.
  static constexpr int kSteps = 3;
  static constexpr int kLookups = kBlockWords * kSteps + 1;
  static constexpr int kTableFloats = (kLookups + 1) * 16;  // 32 entries of 16 bits; room for units
  static constexpr int kUnitFloats = 16;
  static constexpr uint32_t kFoldedBits = 0x7BDE7BDE;

  static void build_tables(int rows, int blocks, const float* values, float* tables);
  static VecU fold(VecU word) { return fold_bits(word, kFoldedBits); }
  template <int kRows, int kVectors>
  static void accumulate(int blocks, const float* tables, const uint32_t* signs, float* partial);
  static_assert(kGroupRows <= kUnitFloats);
};

// Bounds are worked out a thousand times too small, so that no sum of 384 finite values overflows.
constexpr int kBoundScaleLog2 = 10;

// No entry of these blocks' tables is larger than 2^kBoundScaleLog2 times this; not finite if one
// of the values is not. A lane is a place in a half: 0-4, 5-9 and 10-14 are groups, 15 is the
// left-over. A group is bounded by the largest at each of its places, which is at most 5 times too
// much, and with gradients of one scale costs a fraction of a bit.
inline float largest_entry(const float* values, int blocks) {
  const __m512 scale = _mm512_set1_ps(1.0f / (1 << kBoundScaleLog2));
  __m512 largest = _mm512_setzero_ps(), total = largest, left_over = largest;
  for (int block = 0; block < blocks; ++block) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int word = 0; word < kBlockWords; ++word, values += 32) {
      const __m512 a = _mm512_mul_ps(_mm512_abs_ps(_mm512_loadu_ps(values)), scale);
      const __m512 b = _mm512_mul_ps(_mm512_abs_ps(_mm512_loadu_ps(values + 16)), scale);
      largest = _mm512_max_ps(largest, _mm512_max_ps(a, b));
      low = _mm512_add_ps(low, a);
      high = _mm512_add_ps(high, b);
    }
    left_over = _mm512_max_ps(left_over, _mm512_max_ps(low, high));
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
  }
  const __m512i lanes = _mm512_castps_si512(largest);
  const __m512 next = _mm512_castsi512_ps(_mm512_alignr_epi32(lanes, lanes, 1));
  const __m512 pairs = _mm512_add_ps(largest, next);
  const __m512i pair_lanes = _mm512_castps_si512(pairs);
  const __m512 after = _mm512_castsi512_ps(_mm512_alignr_epi32(pair_lanes, pair_lanes, 2));
  const __m512 fifth = _mm512_castsi512_ps(_mm512_alignr_epi32(lanes, lanes, 4));
  const __m512 groups = _mm512_add_ps(_mm512_add_ps(pairs, after), fifth);
  const __m512 entries = _mm512_mask_mov_ps(_mm512_maskz_mov_ps(0x0421, groups), 0x8000, left_over);
  const float sum = _mm512_reduce_add_ps(total);
  return sum - sum == 0 ? _mm512_reduce_max_ps(entries) : sum;
}

inline float power_of_two(int biased_exponent) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(biased_exponent << 23)));
}

// Scales values so that no table entry passes 2^15 and returns the unit they are in: a power of
// two, NaN where the values are not finite.
inline float to_fixed_point(const float* values, int blocks, float* scaled) {
  const float bound = largest_entry(values, blocks) * 1.0001f;  // a hair off 2^15, for the rounding
  const __m128i bits = _mm_castps_si128(_mm_set_ss(bound));
  int exponent = _mm_cvtsi128_si32(_mm_srli_epi32(bits, 23)) & 0xFF;
  const bool finite = exponent < 255;
  // Below 2^-112 the unit would leave float's range: what is smaller keeps fewer bits.
  exponent += kBoundScaleLog2;
  if (exponent < 15) exponent = 15;
  const __m512 factor = _mm512_set1_ps(finite ? power_of_two(127 + 14 + 127 - exponent) : 0.0f);
  for (int p = 0; p < blocks * kBlockParams; p += 16) {
    _mm512_store_ps(scaled + p, _mm512_mul_ps(_mm512_loadu_ps(values + p), factor));
  }
  return finite ? power_of_two(exponent - 14) : __builtin_nanf("");
}

// A table of the sums for low halves, at even entries, and for high halves, at odd ones.
inline void store_table(__m512 low, __m512 high, __m512i even_odd, float* table) {
  const __m512i even = _mm512_cvtps_epi32(low), odd = _mm512_cvtps_epi32(high);
  _mm512_store_si512(table, _mm512_permutex2var_epi16(even, even_odd, odd));
}

// values: [rows, kBlocks * 128] -> units: [16, the first `rows` used], then
// tables: [blocks * 13 lookups, rows, 32 of 16 bits]
void LookupMedium::build_tables(int rows, int blocks, const float* values, float* tables) {
  const TableSums sums;
  // Word 2i is the even entry's low word, word 2i + 1 the odd one's.
  const __m512i words = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd_words = _mm512_slli_epi32(_mm512_add_epi32(words, _mm512_set1_epi32(32)), 16);
  const __m512i even_odd = _mm512_or_si512(words, odd_words);
  alignas(64) float scaled[kBlocks * kBlockParams];
  for (int r = 0; r < rows; ++r, values += kBlocks * kBlockParams) {
    tables[r] = to_fixed_point(values, blocks, scaled);
    float* table = tables + kUnitFloats + r * 16;
    const float* g = scaled;
    for (int block = 0; block < blocks; ++block, g += kBlockParams) {
      for (int word = 0; word < kBlockWords; ++word) {
        for (int step = 0; step < kSteps; ++step, table += rows * 16) {
          const float* group = g + word * 32 + step * 5;
          store_table(sums.folded(group), sums.folded(group + 16), even_odd, table);
        }
      }
      const float low[4] = {g[15], g[47], g[79], g[111]}, high[4] = {g[31], g[63], g[95], g[127]};
      store_table(sums.of_four(low), sums.of_four(high), even_odd, table);
      table += rows * 16;
    }
  }
}

// An index is a half's low 5 bits: which half, then the 4 of the folded group (whose first bit, the
// sign, gives up its place).
inline __m512i table_index(__m512i bits) {
  const __m512i first = _mm512_set1_epi32(0x00010001), half = _mm512_set1_epi32(0x00010000);
  return _mm512_ternarylogic_epi32(bits, first, half, 0xBA);
}

// The index into the left-overs' table: the top bits of the four words' halves.
inline __m512i left_over_index(const uint32_t* signs) {
  __m512i index = _mm512_set1_epi32(0x00010000);
#pragma GCC unroll 4
  for (int word = 0; word < kBlockWords; ++word) {
    const __m512i bits = _mm512_load_si512(signs + word * 16);
    const __m512i place = _mm512_set1_epi32(0x00020002 << word);
    index = _mm512_ternarylogic_epi32(index, _mm512_srli_epi16(bits, 14 - word), place, 0xF8);
  }
  return index;
}

// GCC 12 copies every sum twice around its own intrinsic.
inline void add_products(__m512i& sum, __m512i entries, __m512i factors) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(entries), "v"(factors));
}

// sum[r][v] += the entries that index[v] picks of row r's table, by their factors.
template <int kRows, int kVectors>
__attribute__((always_inline)) inline void look_up(__m512i (&sum)[kRows][kVectors],
                                                   const float* tables,
                                                   const __m512i (&index)[kVectors],
                                                   const __m512i (&factor)[kVectors]) {
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    __m512i table = _mm512_load_si512(tables + r * 16);
    if (kVectors > 1) keep_in_register(table);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512i entries = _mm512_permutexvar_epi16(index[v], table);
      add_products(sum[r][v], entries, factor[v]);
    }
  }
}

// partial: [kVectors, kRows, 16], adds the chunk's sums.
template <int kRows, int kVectors>
TRAK_EXT_OUT_OF_LINE void LookupMedium::accumulate(int blocks, const float* tables,
                                                   const uint32_t* signs, float* partial) {
  constexpr int kVectorWords = LookupMedium::kBlocks * kBlockWords * 16;
  const float* units = tables;
  tables += LookupMedium::kUnitFloats;
  // -1 where the index's first bit is set: the folded sums are negated.
  const __m512i factors = _mm512_set1_epi32(static_cast<int>(0xFFFF0001u));
  __m512i sum[kRows][kVectors], index[kVectors], factor[kVectors];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_si512();
  }
#pragma GCC unroll 1
  for (int block = 0; block < blocks; ++block, signs += kBlockWords * 16) {
#pragma GCC unroll 1
    for (int word = 0; word < kBlockWords; ++word) {
      __m512i bits[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        bits[v] = _mm512_load_si512(signs + v * kVectorWords + word * 16);
      }
#pragma GCC unroll 1
      for (int step = 0; step < LookupMedium::kSteps; ++step, tables += kRows * 16) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          index[v] = table_index(bits[v]);
          factor[v] = _mm512_permutexvar_epi16(bits[v], factors);
          bits[v] = _mm512_srli_epi16(bits[v], 5);
        }
        look_up<kRows, kVectors>(sum, tables, index, factor);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      index[v] = left_over_index(signs + v * kVectorWords);
      factor[v] = _mm512_set1_epi16(1);
    }
    look_up<kRows, kVectors>(sum, tables, index, factor);
    tables += kRows * 16;
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    const __m512 unit = _mm512_set1_ps(units[r]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* p = partial + (v * kRows + r) * 16;
      const __m512 value = _mm512_cvtepi32_ps(sum[r][v]);
      _mm512_store_ps(p, _mm512_fmadd_ps(value, unit, _mm512_load_ps(p)));
    }
  }
}

}  // namespace
}  // namespace trak_ext::cpu
