// The register-tiled inner product that projection and scoring share:
// acc[i][j] += sum_d left[i][d] * right[d][j] for a few rows and two vectors of columns.
#pragma once

#include "simd.h"

namespace trak_ext::cpu {
namespace {

// Rows a tile: two accumulators a row, two registers of `right` and one of `left` must fit.
constexpr int kMicroRows = kVectorRegisters == 32 ? 12 : 6;
template <class T>
constexpr int kMicroColumns = 2 * kLanes<T>;

template <class T, int kRows>
TRAK_EXT_OUT_OF_LINE void multiply_tile(const T* left, int64_t left_stride, const T* right,
                                        int64_t depth, T* acc, int64_t acc_stride) {
  using V = Vec<T>;
  V sum[kRows][2] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const V right0 = load<V>(right + d * kMicroColumns<T>);
    const V right1 = load<V>(right + d * kMicroColumns<T> + kLanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const V scale = broadcast(left[i * left_stride + d]);
      sum[i][0] = multiply_add(scale, right0, sum[i][0]);
      sum[i][1] = multiply_add(scale, right1, sum[i][1]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    T* row = acc + i * acc_stride;
    store(row, load<V>(row) + sum[i][0]);
    store(row + kLanes<T>, load<V>(row + kLanes<T>) + sum[i][1]);
  }
}

// Any number of rows. A row's sum runs over d in order, whichever tile it falls into, so its bits
// do not depend on its neighbours.
template <class T>
void multiply_rows(const T* left, int64_t left_stride, int64_t rows, const T* right, int64_t depth,
                   T* acc, int64_t acc_stride) {
  int64_t i = 0;
  for (; i + kMicroRows <= rows; i += kMicroRows) {
    multiply_tile<T, kMicroRows>(left + i * left_stride, left_stride, right, depth,
                                 acc + i * acc_stride, acc_stride);
  }
  const T* rest = left + i * left_stride;
  T* rest_acc = acc + i * acc_stride;
  switch (rows - i) {
#define TRAK_EXT_REST(N)                                                          \
  case N:                                                                         \
    if constexpr (N < kMicroRows) {                                               \
      multiply_tile<T, N>(rest, left_stride, right, depth, rest_acc, acc_stride); \
    }                                                                             \
    break;
    TRAK_EXT_REST(1)
    TRAK_EXT_REST(2)
    TRAK_EXT_REST(3)
    TRAK_EXT_REST(4)
    TRAK_EXT_REST(5)
    TRAK_EXT_REST(6)
    TRAK_EXT_REST(7)
    TRAK_EXT_REST(8)
    TRAK_EXT_REST(9)
    TRAK_EXT_REST(10)
    TRAK_EXT_REST(11)
#undef TRAK_EXT_REST
    default:
      break;
  }
}

}  // namespace
}  // namespace trak_ext::cpu
