// Normal entries: a 32-bit word an entry, four consecutive parameters a Philox block.
//
// An inverse distribution function, odd in the word. With w = word | 1 as a signed number,
// |w| 2^-31 is the probability of a smaller magnitude and n = 2^31 - |w| counts the tail:
//
//     x = v P(f),   v = float(w),   f = float(n),   P a cubic for each half octave of f,
//
// rounded to the nearest bf16, ties to even. Working with the two integers rather than with v and
// 1 - v keeps full relative precision at both ends: near x = 0, where v is small, and in the tail,
// where f is small. The lowest bit is set so that every w is odd: w and -w pair up, n is never 0
// and w never -2^31. No value is a denormal, so flushing them to zero changes nothing. The largest
// magnitude is 6.21875.
#pragma once

#include "arithmetic.h"
#include "normal_table.h"
#include "philox.h"

namespace trak_ext {

constexpr int kNormalBlockLog2 = 2;  // parameters a block, as a shift

// The table's row is (bits of f >> kNormalRowShift) - kNormalFirstRow: exponent and top mantissa
// bit of f, which is at least 1.
constexpr int kNormalRowShift = 22;
constexpr int kNormalFirstRow = 254;

// The nearest bf16 of a finite float, ties to even, as a float whose low 16 bits are zero.
TRAK_EXT_LAW float round_to_bf16(float value) {
  const uint32_t bits = law_bits(value);
  return law_from_bits((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

// The entry of a word, before it is rounded. `table` is kNormalTable or a copy of it nearer by.
TRAK_EXT_LAW float normal_unrounded(uint32_t word, const float (*table)[kNormalTerms]) {
  const auto w = static_cast<int32_t>(word | 1u);
  const uint32_t magnitude = w < 0 ? 0u - static_cast<uint32_t>(w) : static_cast<uint32_t>(w);
  const float f = law_to_float(static_cast<int32_t>(0x80000000u - magnitude));
  const float* c = table[static_cast<int>(law_bits(f) >> kNormalRowShift) - kNormalFirstRow];
  const float p = law_fma(law_fma(law_fma(c[3], f, c[2]), f, c[1]), f, c[0]);
  return law_multiply(law_to_float(w), p);
}

TRAK_EXT_LAW float normal_entry(uint32_t word, const float (*table)[kNormalTerms]) {
  return round_to_bf16(normal_unrounded(word, table));
}

}  // namespace trak_ext
