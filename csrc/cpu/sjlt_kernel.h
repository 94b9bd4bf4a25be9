// A node's sums by the sparse kind, for one instruction set.
//
// Eight chunks at a time: each column's eight terms are added to its sum in registers, in their
// order, while the next eight chunks are asked for. What is not fp32 in one piece of memory is
// copied to it first, in the order of the columns; so are narrow chunks.
#pragma once

#include "convert.h"
#include "sjlt_signs.h"

namespace trak_ext::cpu {
namespace {

constexpr int kSjltGroup = 8;     // chunks in registers
constexpr int kSjltColumns = 16;  // whose signs are one 16-bit word

struct SjltScratch {
  alignas(64) float packed[kSjltGroup][kSjltPanelColumns];
  alignas(64) float piece[kSjltGroup][kSjltColumns];
  // [groups, columns / 16 (even), kSjltGroup]
  uint16_t flips[kSjltRadix * (kSjltPanelColumns / kSjltColumns + 2)];
  uint32_t words[2 * room_for_signs(kSjltPanelColumns) + 1];
};

// Row `row`'s parameters first .. first + count - 1, counted in the matrix, as floats; zeros, which
// change no sum, for those that no tensor brings.
TRAK_EXT_INLINE void read_params(const SjltProblem& problem, int64_t row, uint64_t first,
                                 int64_t count, float* values) {
  int64_t done = 0;
  for (int64_t t = sjlt_tensor_behind(problem, first); t < problem.num_grads && done < count; ++t) {
    const GradientView& grads = problem.grads[t];
    auto at = static_cast<int64_t>(first + static_cast<uint64_t>(done) - grads.param_offset);
    if (at < 0) {  // a gap before the tensor
      const int64_t absent = -at < count - done ? -at : count - done;
      std::memset(values + done, 0, sizeof(float) * static_cast<size_t>(absent));
      done += absent;
      at = 0;
    }
    const int64_t own = grads.params - at < count - done ? grads.params - at : count - done;
    pack_as_float({grads.data, grads.dtype, grads.row_stride, grads.param_stride}, row, 1, at, own,
                  values + done, own);
    done += own;
  }
  std::memset(values + done, 0, sizeof(float) * static_cast<size_t>(count - done));
}

// kSjltColumns floats with some of their signs flipped, added to as many.
#if defined(__AVX512F__)
TRAK_EXT_INLINE void add_signed(__m512& sums, const float* values, uint16_t flips) {
  const __m512 value = _mm512_loadu_ps(values);
  const __m512 minus = _mm512_set1_ps(-0.0f);
  sums = _mm512_add_ps(sums, _mm512_mask_xor_ps(value, flips, value, minus));
}
struct SixteenSums {
  __m512 sums;
  TRAK_EXT_INLINE void add(const float* values, uint16_t flips) { add_signed(sums, values, flips); }
};
#else
struct SixteenSums {
  static constexpr int kVectors = kSjltColumns / kLanes<float>;
  VecF sums[kVectors];
  TRAK_EXT_INLINE void add(const float* values, uint16_t flips) {
    const VecU word = VecU{} + uint32_t{flips};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const VecU value = load<VecU>(values + v * kLanes<float>);
#if defined(__AVX2__)
      const VecU up = {31, 30, 29, 28, 27, 26, 25, 24};
      const VecU minus = (word << (up - static_cast<uint32_t>(v * 8))) & 0x80000000u;
#else
      const VecU bit = {1u << (4 * v), 2u << (4 * v), 4u << (4 * v), 8u << (4 * v)};
      const VecU minus = reinterpret_cast<VecU>((word & bit) == bit) & 0x80000000u;
#endif
      sums[v] += reinterpret_cast<VecF>(value ^ minus);
    }
  }
};
#endif

// Eight chunks' values for the columns of a panel: source[g][j] for column j, up to left[g], and
// source[g][j - width] from there on, where the rotation has wrapped around. What follows is
// `ahead[g]` floats on.
struct GroupSource {
  const float* source[kSjltGroup];
  int64_t left[kSjltGroup];
  int64_t ahead[kSjltGroup];
};

// sums[j] += a group's terms for columns 16 begin .. 16 end - 1, as long as none wraps around.
template <bool kPrefetch>
TRAK_EXT_INLINE void add_group(int64_t begin, int64_t end, const GroupSource& group,
                               const uint16_t* flips, float* sums) {
  const float* from[kSjltGroup];
  const float* next[kSjltGroup];
#pragma GCC unroll 8
  for (int g = 0; g < kSjltGroup; ++g) {
    from[g] = group.source[g];
    next[g] = group.source[g] + group.ahead[g];
  }
  for (int64_t v = begin; v < end; ++v) {
    auto own = load<SixteenSums>(sums + v * kSjltColumns);
#pragma GCC unroll 8
    for (int g = 0; g < kSjltGroup; ++g) {
      if (kPrefetch) __builtin_prefetch(next[g] + v * kSjltColumns, 0, 2);
      own.add(from[g] + v * kSjltColumns, flips[v * kSjltGroup + g]);
    }
    store(sums + v * kSjltColumns, own);
  }
}

// The same for all columns of a panel, wherever the chunks wrap around.
TRAK_EXT_OUT_OF_LINE void add_rotated_group(int64_t columns, int64_t width, GroupSource& group,
                                            const uint16_t* flips, SjltScratch& scratch,
                                            float* sums) {
  const int64_t whole = columns / kSjltColumns;
  const int64_t vectors = ceil_div(columns, kSjltColumns);
  for (int64_t v = 0; v < vectors;) {
    // To the next vector that one of the runs ends in or before, or that is not whole.
    int64_t next = whole;
    for (int g = 0; g < kSjltGroup; ++g) {
      const int64_t at = group.left[g] / kSjltColumns;
      if (group.left[g] >= 0 && at < next) next = at;
    }
    if (next > v) {
      add_group<true>(v, next, group, flips, sums);
      v = next;
    }
    if (v == vectors) break;
    const int64_t first = v * kSjltColumns;
    const int64_t count = columns - first < kSjltColumns ? columns - first : kSjltColumns;
    GroupSource pieces = {};
    for (int g = 0; g < kSjltGroup; ++g) {
      const float* before = group.source[g] + first;
      const int64_t own = group.left[g] < 0 ? count : group.left[g] - first;
      float* piece = scratch.piece[g];
      pieces.source[g] = own < count || count < kSjltColumns ? piece : before;
      if (pieces.source[g] == before) continue;
      for (int64_t i = 0; i < kSjltColumns; ++i) {
        piece[i] = i >= count ? 0.0f : i < own ? before[i] : before[i - width];
      }
      if (own < count) {
        group.source[g] -= width;
        group.left[g] = -1;
      }
    }
    add_group<false>(0, 1, pieces, flips + v * kSjltGroup, sums + first);
    ++v;
  }
}

// The fp32 tensor, parameters side by side, that has all of [begin, end), or null.
TRAK_EXT_INLINE const GradientView* tensor_of(const SjltProblem& problem, uint64_t begin,
                                              uint64_t end) {
  const int64_t t = sjlt_tensor_behind(problem, begin);
  if (t == problem.num_grads) return nullptr;
  const GradientView& grads = problem.grads[t];
  const bool whole = grads.param_offset <= begin &&
                     end <= grads.param_offset + static_cast<uint64_t>(grads.params);
  return whole && grads.dtype == DType::kFloat32 && grads.param_stride == 1 ? &grads : nullptr;
}

// Whether there is a gap between tensors in [begin, end).
TRAK_EXT_INLINE bool has_gap(const SjltProblem& problem, uint64_t begin, uint64_t end) {
  uint64_t covered = begin;
  for (int64_t t = sjlt_tensor_behind(problem, begin); t < problem.num_grads; ++t) {
    const GradientView& grads = problem.grads[t];
    if (grads.param_offset >= end) break;
    if (grads.param_offset > covered && covered > problem.grads[0].param_offset) return true;
    covered = grads.param_offset + static_cast<uint64_t>(grads.params);
  }
  return covered < end && covered < sjlt_range(problem).end;
}

// sums[first + i] += values[i], with the signs of the columns, for count places.
TRAK_EXT_INLINE void add_piece(const float* values, int64_t first, int64_t count,
                               const uint16_t* flips, float* sums) {
  for (int64_t done = 0; done < count;) {
    const int64_t v = (first + done) / kSjltColumns;
    const int64_t from = first + done - v * kSjltColumns;
    const int64_t own = kSjltColumns - from < count - done ? kSjltColumns - from : count - done;
    auto all = load<SixteenSums>(sums + v * kSjltColumns);
    if (own == kSjltColumns) {
      all.add(values + done, flips[v * kSjltGroup]);
    } else {
      alignas(64) float some[kSjltColumns] = {};
      std::memcpy(some + from, values + done, sizeof(float) * static_cast<size_t>(own));
      all.add(some, flips[v * kSjltGroup]);
    }
    store(sums + v * kSjltColumns, all);
    done += own;
  }
}

// sums[column] += the row's terms of parameters [first, first + count), which meet the columns from
// `column` on, as far as tensors bring them.
TRAK_EXT_INLINE void add_run(const SjltProblem& problem, int64_t row, uint64_t first, int64_t count,
                             int64_t column, const uint16_t* flips, float* packed, float* sums) {
  const uint64_t end = first + static_cast<uint64_t>(count);
  for (int64_t t = sjlt_tensor_behind(problem, first); t < problem.num_grads; ++t) {
    const GradientView& grads = problem.grads[t];
    if (grads.param_offset >= end) return;
    const uint64_t begin = grads.param_offset < first ? first : grads.param_offset;
    const uint64_t behind = grads.param_offset + static_cast<uint64_t>(grads.params);
    const auto at = static_cast<int64_t>(begin - grads.param_offset);
    const auto own = static_cast<int64_t>((behind < end ? behind : end) - begin);
    const float* values = packed;
    if (grads.dtype == DType::kFloat32 && grads.param_stride == 1) {
      values = static_cast<const float*>(grads.data) + row * grads.row_stride + at;
    } else {
      pack_as_float({grads.data, grads.dtype, grads.row_stride, grads.param_stride}, row, 1, at,
                    own, packed, own);
    }
    add_piece(values, column + static_cast<int64_t>(begin - first), own, flips, sums);
  }
}

// Chunks of at least this many columns are read where they lie.
constexpr uint64_t kSjltDirectWidth = 128;

TRAK_EXT_INLINE void sum_wide_node(const SjltProblem& problem, uint64_t node,
                                   const SjltPanel& panel, int64_t pitch, SjltScratch& scratch,
                                   float* sums) {
  const SjltLaw& law = problem.law;
  const int64_t columns = panel.column_end - panel.column_begin;
  const int64_t vectors = (columns + 31) / 32 * 2;
  const auto width = static_cast<int64_t>(law.width);
  ChunkRuns chunks[kSjltRadix];
  locate_chunks(law, node, panel, chunks);
  bool present[kSjltRadix];
  for (int c = 0; c < kSjltRadix; ++c) {
    present[c] = sjlt_touches(problem, chunks[c].chunk_first, chunks[c].chunk_first + law.width);
    if (present[c]) {
      lay_out_signs(law, panel.repetition, chunks[c], columns, kSjltGroup, scratch.words,
                    scratch.flips + c / kSjltGroup * vectors * kSjltGroup + c % kSjltGroup);
    }
  }
  constexpr int kGroups = kSjltRadix / kSjltGroup;
  const GradientView* tensors[kGroups];
  bool gaps[kGroups];
  for (int group = 0; group < kGroups; ++group) {
    const uint64_t first = chunks[group * kSjltGroup].chunk_first;
    tensors[group] = law.width < kSjltDirectWidth
                         ? nullptr
                         : tensor_of(problem, first, first + kSjltGroup * law.width);
    gaps[group] = has_gap(problem, first, first + kSjltGroup * law.width);
  }
  for (int64_t row = panel.row_begin; row < panel.row_end; ++row) {
    float* own = sums + (row - panel.row_begin) * pitch;
    for (int group = 0; group < kGroups; ++group) {
      const ChunkRuns* runs = chunks + group * kSjltGroup;
      const uint16_t* flips = scratch.flips + group * vectors * kSjltGroup;
      GroupSource source = {};
      if (const GradientView* grads = tensors[group]) {
        const float* data = static_cast<const float*>(grads->data) + row * grads->row_stride;
        for (int g = 0; g < kSjltGroup; ++g) {
          source.source[g] = data + static_cast<int64_t>(runs[g].first - grads->param_offset);
          source.left[g] = runs[g].left;
          // The next group of this row, which is read in about the same order if a panel has all
          // columns; then the first group of the next row, then of the next node.
          const bool last = row + 1 == panel.row_end;
          source.ahead[g] =
              group + 1 == kGroups
                  ? (last ? kSjltGroup * width + (panel.row_begin - row) * grads->row_stride
                          : grads->row_stride - (kGroups - 1) * kSjltGroup * width)
              : columns == width ? kSjltGroup * width
                                 : static_cast<int64_t>(runs[g + kSjltGroup].first - runs[g].first);
        }
        add_rotated_group(columns, width, source, flips, scratch, own);
        continue;
      }
      bool any = false;
      for (int g = 0; g < kSjltGroup; ++g) any = any || present[group * kSjltGroup + g];
      if (!any) continue;
      if (gaps[group]) {
        for (int g = 0; g < kSjltGroup; ++g) {
          if (!present[group * kSjltGroup + g]) continue;
          float* packed = scratch.packed[0];
          add_run(problem, row, runs[g].first, runs[g].left, 0, flips + g, packed, own);
          add_run(problem, row, runs[g].chunk_first, columns - runs[g].left, runs[g].left,
                  flips + g, packed, own);
        }
        continue;
      }
      for (int g = 0; g < kSjltGroup; ++g) {
        float* packed = scratch.packed[g];
        source.source[g] = packed;
        if (present[group * kSjltGroup + g]) {
          read_params(problem, row, runs[g].first, runs[g].left, packed);
          if (runs[g].left < columns) {
            read_params(problem, row, runs[g].chunk_first, columns - runs[g].left,
                        packed + runs[g].left);
          }
          for (int64_t i = columns; i < pitch; ++i) packed[i] = 0.0f;
        } else {
          std::memset(packed, 0, sizeof(float) * static_cast<size_t>(pitch));
        }
      }
      add_group<false>(0, pitch / kSjltColumns, source, flips, own);
    }
  }
}

// Chunks below this many columns go through a buffer in the order of the parameters.
constexpr uint64_t kSjltNarrowWidth = 64;

TRAK_EXT_INLINE void sum_narrow_node(const SjltProblem& problem, uint64_t node,
                                     const SjltPanel& panel, int64_t pitch, SjltScratch& scratch,
                                     float* sums) {
  const SjltLaw& law = problem.law;
  const SjltRange range = sjlt_range(problem);
  const uint64_t begin = (node << kSjltRadixLog2) * law.width;
  const uint64_t low = begin < range.begin ? range.begin : begin;
  const uint64_t high =
      begin + kSjltRadix * law.width < range.end ? begin + kSjltRadix * law.width : range.end;
  const auto count = static_cast<int64_t>(high - low);
  const auto width = static_cast<int64_t>(law.width);
  const SjltPanel whole = {0, 0, panel.repetition, 0, width};
  ChunkRuns chunks[kSjltRadix];
  locate_chunks(law, node, whole, chunks);
  read_signs(law, panel.repetition, low, count, scratch.words);
  float* values = scratch.packed[0];
  for (int64_t row = panel.row_begin; row < panel.row_end; ++row) {
    read_params(problem, row, low, count, values);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t minus = (~scratch.words[i / 32] >> (i % 32)) << 31;
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      values[i] = float_from_bits(bits ^ minus);
    }
    float* own = sums + (row - panel.row_begin) * pitch;
    for (int c = 0; c < kSjltRadix; ++c) {
      const int64_t wrap = chunks[c].left;  // columns before the one that meets the chunk's first
      const auto first = static_cast<int64_t>(chunks[c].chunk_first - low);  // of `values`
      const int64_t from = first < 0 ? -first : 0;
      const int64_t to = count - first < width ? count - first : width;
      // Place i goes to column wrap + i, or to wrap + i - width.
      for (int64_t i = from; i < to && i < width - wrap; ++i) own[wrap + i] += values[first + i];
      for (int64_t i = from > width - wrap ? from : width - wrap; i < to; ++i) {
        own[wrap + i - width] += values[first + i];
      }
    }
  }
}

// sums[row][column] of the panel = the node's sums; rows lie sjlt_pitch() apart.
void sum_sjlt_node(const SjltProblem& problem, uint64_t node, const SjltPanel& panel, void* scratch,
                   float* sums) {
  const int64_t pitch = sjlt_pitch(panel);
  std::memset(sums, 0,
              sizeof(float) * static_cast<size_t>((panel.row_end - panel.row_begin) * pitch));
  auto& own = *static_cast<SjltScratch*>(scratch);
  if (problem.law.width < kSjltNarrowWidth) {
    sum_narrow_node(problem, node, panel, pitch, own, sums);
  } else {
    sum_wide_node(problem, node, panel, pitch, own, sums);
  }
}

}  // namespace
}  // namespace trak_ext::cpu
