// What the two AVX-512 lookup kernels share: sums of +-g, and the folding of sign words.
#pragma once

#include "lookup_driver.h"

namespace trak_ext::cpu {
namespace {

// GCC would rather load or compute a thing again than hold it.
inline void keep_in_register(__m512& x) { asm("" : "+v"(x)); }
inline void keep_in_register(__m512i& x) { asm("" : "+v"(x)); }

// +-1 by a bit a lane.
inline __m512 signs_of(__mmask16 plus) {
  __m512 signs = _mm512_mask_blend_ps(plus, _mm512_set1_ps(-1.0f), _mm512_set1_ps(1.0f));
  keep_in_register(signs);
  return signs;
}

// The sums of table entries. Values are multiplied by +-1 and nothing else: a zero would turn Inf
// into NaN.
struct TableSums {
  __m512 s0 = signs_of(0xAAAA), s1 = signs_of(0xCCCC), s2 = signs_of(0xF0F0), s3 = signs_of(0xFF00);
  __m512 d1 = signs_of(0x6666), d2 = signs_of(0x9696), d3 = signs_of(0x6996);

  // Of g[0..3] by a lane's bits: bit i set is +g[i].
  __m512 of_four(const float* g) const {
    __m512 sum = _mm512_mul_ps(s0, _mm512_set1_ps(g[0]));
    sum = _mm512_fmadd_ps(s1, _mm512_set1_ps(g[1]), sum);
    sum = _mm512_fmadd_ps(s2, _mm512_set1_ps(g[2]), sum);
    return _mm512_fmadd_ps(s3, _mm512_set1_ps(g[3]), sum);
  }

  // Minus the sum of g[0..4], g[0]'s sign being +: lane bit i set is "g[i + 1]'s sign differs from
  // g[i]'s". Minus, as the factor's sign bit is the sign's bit, and a set one means minus.
  __m512 folded(const float* g) const {
    __m512 sum = _mm512_mul_ps(s0, _mm512_set1_ps(g[1]));
    sum = _mm512_fmadd_ps(d1, _mm512_set1_ps(g[2]), sum);
    sum = _mm512_fmadd_ps(d2, _mm512_set1_ps(g[3]), sum);
    sum = _mm512_fmadd_ps(d3, _mm512_set1_ps(g[4]), sum);
    return _mm512_sub_ps(sum, _mm512_set1_ps(g[0]));
  }
};

// The words as the lookups want them: a bit of `folded_bits` tells whether its sign differs from
// that of the parameter before it; the others stay signs.
TRAK_EXT_INLINE VecU fold_bits(VecU word, uint32_t folded_bits) {
  return word ^ ((word << 1) & folded_bits);
}

}  // namespace
}  // namespace trak_ext::cpu
