// Values as sums of bf16 parts, for products of two split numbers.
#pragma once

#include "../../law/arithmetic.h"
#include "element.h"

namespace trak_ext::cuda {

// Two values as kParts bf16 parts each, every one the nearest to what is left (unlike split_pair,
// which truncates): part i is then at most 2^-8i of the value, and the products of parts that are
// left out stay small. Three parts are exact (unless one would be a denormal), two hold the value
// to 2^-17, one to 2^-9. What is not finite stays so: a product with it is never a finite number.
// Where there is a second part that may be what says so, and to keep the first from rounding to
// infinity is one instruction.
template <int kParts>
TRAK_EXT_DEVICE void split_nearest(float lower, float upper, uint32_t (&parts)[kParts]) {
  constexpr float kLargestBfloat16 = 0x1.FEp127f;
  if constexpr (kParts == 1) {
    parts[0] = device::pack_nearest(fit_bfloat16(lower), fit_bfloat16(upper));
  } else {
    parts[0] = device::pack_nearest(device::limit_magnitude(lower, kLargestBfloat16),
                                    device::limit_magnitude(upper, kLargestBfloat16));
  }
#pragma unroll
  for (int i = 1; i < kParts; ++i) {
    lower -= law_from_bits(parts[i - 1] << 16);
    upper -= law_from_bits(parts[i - 1] & 0xFFFF0000u);
    parts[i] = device::pack_nearest(lower, upper);
  }
}

// bf16 parts that a dtype's values consist of.
constexpr int parts_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3;
}

}  // namespace trak_ext::cuda
