// Normal entries for whole vectors of columns; the same bits as law/normal.h.
//
// Permute instructions look up only the rows of the table that serve the commonest arguments; a
// rare branch takes the words of a vector one by one. Index bits above what a permute reads are
// ignored, so rows stand where the float's own exponent bits point and no offset is subtracted.
#pragma once

#include "../law/normal.h"
#include "simd.h"

namespace trak_ext::cpu {
namespace {

TRAK_EXT_OUT_OF_LINE VecF normal_one_by_one(VecU word) {
  VecF entry;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    entry[lane] = normal_entry(word[lane], kNormalTable);
  }
  return entry;
}

#if defined(__AVX2__)

#if defined(__AVX512F__)
constexpr int kWindowRows = 32;  // rows 32 to 63 serve n from 2^16: all words but one in 2^15
#else
constexpr int kWindowRows = 16;  // rows 48 to 63 serve n from 2^24: all words but one in 2^7
#endif
constexpr int32_t kWindowStart = 1 << ((kNormalRows - kWindowRows) / 2);

// The last rows of the table, term by term.
struct NormalWindow {
  alignas(64) float term[kNormalTerms][kWindowRows];

  constexpr NormalWindow() : term{} {
    for (int row = kNormalRows - kWindowRows; row < kNormalRows; ++row) {
      for (int k = 0; k < kNormalTerms; ++k) {
        term[k][(row + kNormalFirstRow) % kWindowRows] = kNormalTable[row][k];
      }
    }
  }
};
alignas(64) constexpr NormalWindow kNormalWindow;

TRAK_EXT_INLINE VecI absolute(VecI value) {
#if defined(__AVX512F__)
  return (VecI)_mm512_abs_epi32((__m512i)value);
#else
  return (VecI)_mm256_abs_epi32((__m256i)value);
#endif
}

TRAK_EXT_INLINE bool any_below(VecI value, int32_t bound) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)value, _mm512_set1_epi32(bound)) != 0;
#else
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), (__m256i)value);
  return !_mm256_testz_si256(below, below);
#endif
}

// Term k of the rows that f's bits point to.
TRAK_EXT_INLINE VecF window_term(int k, VecU bits_of_f) {
  const float* term = kNormalWindow.term[k];
  const VecU row = bits_of_f >> kNormalRowShift;
#if defined(__AVX512F__)
  return _mm512_permutex2var_ps(_mm512_load_ps(term), (__m512i)row, _mm512_load_ps(term + 16));
#else
  // The index's fourth bit, moved to the sign, chooses between the two permutes.
  const __m256 upper = (__m256)(bits_of_f << (31 - kNormalRowShift - 3));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(term), (__m256i)row),
                          _mm256_permutevar8x32_ps(_mm256_load_ps(term + 8), (__m256i)row), upper);
#endif
}

TRAK_EXT_INLINE VecF normal_from_word(VecU word) {
  const VecI w = (VecI)(word | 1u);
  const VecI n = (VecI)(0x80000000u - (VecU)absolute(w));
  if (__builtin_expect(any_below(n, kWindowStart), 0)) return normal_one_by_one(word);
  const VecF f = __builtin_convertvector(n, VecF);
  const VecU bits = (VecU)f;
  VecF p = multiply_add(window_term(3, bits), f, window_term(2, bits));
  p = multiply_add(p, f, window_term(1, bits));
  p = multiply_add(p, f, window_term(0, bits));
  const VecF x = __builtin_convertvector(w, VecF) * p;
  // To the nearest bf16 by Veltkamp's splitting, which keeps 8 bits and equals round_to_bf16 on
  // every mantissa, ties included: the sum that decides a tie rounds to even itself.
  const VecF c = x * 65537.0f;
  return c - (c - x);
}

#else

TRAK_EXT_INLINE VecF normal_from_word(VecU word) { return normal_one_by_one(word); }

#endif

}  // namespace
}  // namespace trak_ext::cpu
