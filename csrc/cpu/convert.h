// Gradients of any dtype and stride to packed fp32 rows.
#pragma once

#include "projection.h"
#include "simd.h"

namespace trak_ext {
namespace {

TRAK_EXT_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

TRAK_EXT_INLINE float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // Inf and NaN
    return float_from_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  }
  if (magnitude < 0x400u) {  // zero and subnormals are multiples of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

struct FromFloat64 {
  using Stored = double;
  static TRAK_EXT_INLINE float convert(double value) { return static_cast<float>(value); }
};
struct FromFloat32 {
  using Stored = float;
  static TRAK_EXT_INLINE float convert(float value) { return value; }
};
struct FromFloat16 {
  using Stored = uint16_t;
  static TRAK_EXT_INLINE float convert(uint16_t value) { return half_to_float(value); }
};
struct FromBFloat16 {
  using Stored = uint16_t;
  static TRAK_EXT_INLINE float convert(uint16_t value) {
    return float_from_bits(static_cast<uint32_t>(value) << 16);
  }
};

template <class From>
TRAK_EXT_INLINE void pack_row(const void* row, int64_t stride, int64_t begin, int64_t count,
                              float* packed) {
  const auto* source = static_cast<const typename From::Stored*>(row) + begin * stride;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) packed[i] = From::convert(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) packed[i] = From::convert(source[i * stride]);
  }
}

// packed[b][i] = g[row_begin + b, param_begin + i], rows packed_stride apart.
template <class From>
void pack_rows(const GradientView& grads, int64_t row_begin, int64_t rows, int64_t param_begin,
               int64_t params, float* packed, int64_t packed_stride) {
  const auto* data = static_cast<const typename From::Stored*>(grads.data);
  for (int64_t b = 0; b < rows; ++b) {
    pack_row<From>(data + (row_begin + b) * grads.row_stride, grads.param_stride, param_begin,
                   params, packed + b * packed_stride);
  }
}

inline void pack_gradients(const GradientView& grads, int64_t row_begin, int64_t rows,
                           int64_t param_begin, int64_t params, float* packed,
                           int64_t packed_stride) {
  const auto pack = grads.dtype == DType::kFloat64   ? pack_rows<FromFloat64>
                    : grads.dtype == DType::kFloat32 ? pack_rows<FromFloat32>
                    : grads.dtype == DType::kFloat16 ? pack_rows<FromFloat16>
                                                     : pack_rows<FromBFloat16>;
  pack(grads, row_begin, rows, param_begin, params, packed, packed_stride);
}

}  // namespace
}  // namespace trak_ext
