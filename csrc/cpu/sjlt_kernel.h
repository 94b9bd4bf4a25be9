// A node's sums by the sparse kind, for one instruction set.
#pragma once

#include "convert.h"
#include "sjlt.h"

namespace trak_ext {
namespace {

// Row `row`'s parameters first .. first + count - 1, counted in the matrix, as floats; zeros, which
// change no sum, for those that no tensor brings.
inline void read_params(const SjltProblem& problem, int64_t row, uint64_t first, int64_t count,
                        float* values) {
  std::memset(values, 0, sizeof(float) * static_cast<size_t>(count));
  for (int64_t t = 0; t < problem.num_grads; ++t) {
    const GradientView& grads = problem.grads[t];
    const int64_t at = static_cast<int64_t>(first - grads.param_offset);
    const int64_t begin = at < 0 ? -at : 0;  // of `count`
    const int64_t end = grads.params - at < count ? grads.params - at : count;
    if (begin >= end) continue;
    pack_as_float({grads.data, grads.dtype, grads.row_stride, grads.param_stride}, row, 1,
                  at + begin, end - begin, values + begin, count);
  }
}

constexpr int64_t kSjltPiece = 1024;

// sums[row][column] of the panel = the node's sums; rows lie the panel's columns apart.
void sum_sjlt_node(const SjltProblem& problem, uint64_t node, const SjltPanel& panel, float* sums) {
  const SjltLaw& law = problem.law;
  const int64_t columns = panel.column_end - panel.column_begin;
  std::memset(sums, 0,
              sizeof(float) * static_cast<size_t>((panel.row_end - panel.row_begin) * columns));
  float values[kSjltPiece];
  for (int64_t c = 0; c < kSjltRadix; ++c) {
    const uint64_t chunk = (node << kSjltRadixLog2) + static_cast<uint64_t>(c);
    const PhiloxWords words =
        sjlt_rotation_words(law, panel.repetition, chunk >> kSjltRotationLog2);
    const uint64_t rotation = sjlt_rotation(words.word[chunk & 3], law.width);
    for (int64_t column = panel.column_begin; column < panel.column_end;) {
      uint64_t place = static_cast<uint64_t>(column) + law.width - rotation;
      if (place >= law.width) place -= law.width;
      int64_t count = panel.column_end - column;
      if (count > kSjltPiece) count = kSjltPiece;
      if (static_cast<uint64_t>(count) > law.width - place) {
        count = static_cast<int64_t>(law.width - place);
      }
      const uint64_t first = chunk * law.width + place;
      for (int64_t row = panel.row_begin; row < panel.row_end; ++row) {
        read_params(problem, row, first, count, values);
        float* target = sums + (row - panel.row_begin) * columns + (column - panel.column_begin);
        PhiloxWords signs = {};
        for (int64_t i = 0; i < count; ++i) {
          const uint64_t param = first + static_cast<uint64_t>(i);
          if (i == 0 || (param & 127) == 0) {
            signs = sjlt_sign_words(law, panel.repetition, param >> kSjltSignLog2);
          }
          const bool plus = (signs.word[(param >> 5) & 3] >> (param & 31)) & 1u;
          target[i] += plus ? values[i] : -values[i];
        }
      }
      column += count;
    }
  }
}

}  // namespace
}  // namespace trak_ext
