// Rows of any dtype and stride to packed fp32 rows.
#pragma once

#include <type_traits>

#include "../problem.h"
#include "simd.h"

namespace trak_ext::cpu {
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

// A matrix in memory, strides in elements.
struct StridedRows {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t column_stride;
};

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
TRAK_EXT_INLINE void pack_row(const typename From::Stored* source, int64_t stride, int64_t count,
                              float* packed) {
  int64_t i = 0;
#if defined(__F16C__)
  // Compilers vectorise the other conversions by themselves.
  if constexpr (std::is_same_v<From, FromFloat16>) {
    for (; stride == 1 && i + 8 <= count; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
      _mm256_storeu_ps(packed + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  if (stride == 1) {
    for (; i < count; ++i) packed[i] = From::convert(source[i]);
  } else {
    for (; i < count; ++i) packed[i] = From::convert(source[i * stride]);
  }
}

template <class From>
void pack_rows(const StridedRows& source, int64_t row_begin, int64_t rows, int64_t column_begin,
               int64_t columns, float* packed, int64_t packed_stride) {
  const auto* data = static_cast<const typename From::Stored*>(source.data);
  data += row_begin * source.row_stride + column_begin * source.column_stride;
  for (int64_t i = 0; i < rows; ++i) {
    pack_row<From>(data + i * source.row_stride, source.column_stride, columns,
                   packed + i * packed_stride);
  }
}

// packed[i][j] = source[row_begin + i, column_begin + j], rows packed_stride apart.
inline void pack_as_float(const StridedRows& source, int64_t row_begin, int64_t rows,
                          int64_t column_begin, int64_t columns, float* packed,
                          int64_t packed_stride) {
  const auto pack = source.dtype == DType::kFloat64   ? pack_rows<FromFloat64>
                    : source.dtype == DType::kFloat32 ? pack_rows<FromFloat32>
                    : source.dtype == DType::kFloat16 ? pack_rows<FromFloat16>
                                                      : pack_rows<FromBFloat16>;
  pack(source, row_begin, rows, column_begin, columns, packed, packed_stride);
}

}  // namespace
}  // namespace trak_ext::cpu
