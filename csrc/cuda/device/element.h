// Gradient elements: read from any dtype, and split into bf16 parts.
#pragma once

#include "../../law/arithmetic.h"
#include "../../problem.h"
#include "device.h"

namespace trak_ext::cuda {

TRAK_EXT_DEVICE float bfloat16_to_float(uint16_t bits) {
  return law_from_bits(static_cast<uint32_t>(bits) << 16);
}

// fp64 is rounded to fp32 here, once.
TRAK_EXT_DEVICE float load_element(const char* address, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<float>(device::load_global<double>(address));
    case DType::kFloat32:
      return device::load_global<float>(address);
    case DType::kFloat16:
      return device::half_to_float(device::load_global<uint16_t>(address));
    default:
      return bfloat16_to_float(device::load_global<uint16_t>(address));
  }
}

// Four consecutive elements of shared memory in one access.
TRAK_EXT_DEVICE void load_quad(const char* address, DType dtype, float (&values)[4]) {
  if (dtype == DType::kFloat32) {
    const auto words = device::load_shared<Words4>(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = law_from_bits(words.word[i]);
    return;
  }
  const auto words = device::load_shared<Words2>(address);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto bits = static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)));
    values[i] = dtype == DType::kFloat16 ? device::half_to_float(bits) : bfloat16_to_float(bits);
  }
}

// Four consecutive elements of global memory in one access; not of fp64.
TRAK_EXT_DEVICE void load_global_quad(const char* address, DType dtype, float (&values)[4]) {
  if (dtype == DType::kFloat32) {
    const auto words = device::load_global<Words4>(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = law_from_bits(words.word[i]);
    return;
  }
  const auto words = device::load_global<Words2>(address);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto bits = static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)));
    values[i] = dtype == DType::kFloat16 ? device::half_to_float(bits) : bfloat16_to_float(bits);
  }
}

// A value that rounds to a finite bf16 number if it is finite: the largest floats are truncated.
TRAK_EXT_DEVICE float fit_bfloat16(float value) {
  const float magnitude = law_from_bits(law_bits(value) & 0x7FFFFFFFu);
  return magnitude >= 0x1.FEp127f ? law_from_bits(law_bits(value) & 0xFFFF0000u) : value;
}

// What a value leaves beside its truncated part. Of an infinity that is NaN; it becomes a finite
// number instead, so that the parts add up to the infinity. Of a finite number it is below 2^120;
// in the last of two parts it is kept from rounding up to that, or the largest floats would
// overflow.
template <bool kLast>
TRAK_EXT_DEVICE float remainder_of(float value, uint32_t part_bits) {
  return device::limit_magnitude(value - law_from_bits(part_bits), kLast ? 0x1.FEp119f : 0x1p120f);
}

// Two values as kPasses bf16 parts whose sum they are: exactly in three parts (unless the last
// would be a denormal), to 2^-17 in two, to 2^-9 in one. All parts but the last are truncated, so
// that none of them overflows.
template <int kPasses>
TRAK_EXT_DEVICE void split_pair(float lower, float upper, uint32_t (&parts)[kPasses]) {
  if constexpr (kPasses == 1) {
    parts[0] = device::pack_nearest(fit_bfloat16(lower), fit_bfloat16(upper));
  } else {
#pragma unroll
    for (int i = 0; i + 1 < kPasses; ++i) {
      parts[i] = device::pack_truncated(lower, upper);
      lower = remainder_of<kPasses == 2>(lower, parts[i] << 16);
      upper = remainder_of<kPasses == 2>(upper, parts[i] & 0xFFFF0000u);
    }
    parts[kPasses - 1] = device::pack_nearest(lower, upper);
  }
}

}  // namespace trak_ext::cuda
