// The loops of the table-lookup projection, the same for every level that has one.
//
// A level brings tables of sums of +-g over a few parameters, looked up by sign bits. Per chunk of
// Philox blocks each row group's tables are built once and used by all columns; signs are made
// once, on the first row group's way, and read back by the others.
#pragma once

#include "../law/rademacher.h"
#include "convert.h"
#include "kernel_table.h"
#include "philox_simd.h"

namespace trak_ext::cpu {
namespace {

constexpr int kBlockWords = 4;
constexpr int kSignLanes = kLanes<uint32_t>;  // columns a vector
constexpr int kBlockParams = 1 << kRademacherBlockLog2;
static_assert(kBlockParams == kChunkParams);

// A row's sum over p has three floors, so that its rounding error grows with the square root of a
// few short sums and not of P: a chunk of Level::kBlocks blocks in registers, kPartialChunks chunks
// in the workspace, then `out`. The floors are cut at fixed blocks, counted from the first; nothing
// else may move them.
constexpr int64_t kPartialChunks = 64;

// The panel of partial sums stays in the L2 cache; neither bound touches the order of summing.
constexpr int64_t kMaxPanelRows = 64;
constexpr int64_t kMaxPanelColumns = 4096;
constexpr int64_t kMaxPanelFloats = 131072;

// Row `row`'s `count` parameters from `first` on (which may lie before parameter 0 or run past the
// last) as floats; zeros, which change no sum, outside.
TRAK_EXT_INLINE void read_chunk(const GradientView& grads, int64_t row, int64_t first, int count,
                                float* values) {
  const int64_t begin = first < 0 ? -first : 0;
  const int64_t left = grads.params - first;
  const int64_t end = left < count ? left : count;
  if (begin > 0 || end < count) std::memset(values, 0, sizeof(float) * count);
  pack_as_float({grads.data, grads.dtype, grads.row_stride, grads.param_stride}, row, 1,
                first + begin, end - begin, values + begin, count);
}

// Asks for what read_chunk() will want, as no hardware prefetcher follows dozens of rows at a few
// lines a visit. One row group ahead and no more: rows a power of two apart crowd a few sets of
// the cache. Past the last parameter it asks in vain, harmlessly.
TRAK_EXT_INLINE void prefetch_chunk(const GradientView& grads, int64_t row, int64_t first,
                                    int count) {
  if (grads.param_stride != 1) return;
  const int64_t bytes = element_bytes(grads.dtype);
  const uintptr_t address = reinterpret_cast<uintptr_t>(grads.data) +
                            static_cast<uintptr_t>((row * grads.row_stride + first) * bytes);
  for (int64_t at = 0; at < count * bytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(address + static_cast<uintptr_t>(at)));
  }
}

TRAK_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The largest of the even parts of `total` that are no longer than `most`: 65 in parts of at most
// 64 is 33 + 32, not 64 + 1.
TRAK_EXT_INLINE int64_t even_part(int64_t total, int64_t most) {
  return ceil_div(total, ceil_div(total, most));
}

// How one call cuts its tile, and how large its pieces of the workspace are.
struct Panels {
  int64_t rows, columns;  // of a panel of partial sums, columns padded to whole vectors
  int64_t partial_floats, sign_words;
};

template <typename Level>
TRAK_EXT_INLINE Panels plan_panels(const OutputTile& tile) {
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t columns = round_up(tile.column_end - tile.column_begin, kSignLanes);
  Panels panels;
  panels.rows = even_part(rows, kMaxPanelRows);
  const int64_t most = smaller(kMaxPanelColumns, kMaxPanelFloats / panels.rows);
  const int64_t vectors = even_part(columns / kSignLanes, most / kSignLanes);
  panels.columns = vectors * kSignLanes;
  panels.partial_floats = panels.rows * panels.columns;
  panels.sign_words = panels.columns * Level::kBlocks * kBlockWords;
  return panels;
}

// The row groups of a panel: as few as hold `rows`, and even, so that 13 rows become 7 + 6.
struct RowGroups {
  int64_t rows, count;

  template <typename Level>
  static RowGroups of(int64_t rows) {
    return {rows, ceil_div(rows, Level::kGroupRows)};
  }
  int64_t begin(int64_t group) const { return rows * group / count; }
  int size(int64_t group) const { return static_cast<int>(begin(group + 1) - begin(group)); }
};

// Adds a panel of partial sums, [groups][vectors, rows of the group, lanes], to `out`.
template <typename Level>
void flush_panel(const OutputView& out, const OutputTile& panel, const RowGroups& groups,
                 int64_t vectors, float* partial) {
  const int64_t columns = panel.column_end - panel.column_begin;
  const int64_t stride = out.column_stride;
  for (int64_t group = 0; group < groups.count; ++group) {
    const int group_rows = groups.size(group);
    for (int r = 0; r < group_rows; ++r) {
      const int64_t row = panel.row_begin + groups.begin(group) + r;
      float* target = out.data + row * out.row_stride + panel.column_begin * stride;
      float* source = partial + r * kSignLanes;
      for (int64_t j = 0; j < columns; j += kSignLanes, source += group_rows * kSignLanes) {
        if (stride == 1 && columns - j >= kSignLanes) {
          store(target + j, load<VecF>(target + j) + load<VecF>(source));
        } else {
          const int64_t lanes = smaller(columns - j, kSignLanes);
          for (int64_t lane = 0; lane < lanes; ++lane) target[(j + lane) * stride] += source[lane];
        }
      }
    }
    partial += vectors * group_rows * kSignLanes;
  }
}

// kVectors vectors of columns -> signs: [kVectors, (kBlocks,) 4 words, columns], folded as the
// level's lookups want them.
template <typename Level, int kVectors>
TRAK_EXT_INLINE void generate_vectors(const KeySchedule& keys, const SharedRounds& shared,
                                      uint32_t column, uint32_t* signs) {
  VecU words[kBlockWords][kVectors];
  philox_columns<kVectors>(keys, shared, column, words);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < kBlockWords; ++i) {
      store(signs + (v * Level::kBlocks * kBlockWords + i) * kSignLanes, Level::fold(words[i][v]));
    }
  }
}

template <typename Level>
TRAK_EXT_OUT_OF_LINE void generate_signs(const KeySchedule& keys, const SharedRounds& shared,
                                         uint32_t column, int vectors, uint32_t* signs) {
  constexpr int kVectorWords = Level::kBlocks * kBlockWords * kSignLanes;
  int v = 0;
  for (; v + 2 <= vectors; v += 2) {
    generate_vectors<Level, 2>(keys, shared, column + v * kSignLanes, signs + v * kVectorWords);
  }
  if (v < vectors) {
    generate_vectors<Level, 1>(keys, shared, column + v * kSignLanes, signs + v * kVectorWords);
  }
}

// Adds a chunk's sums for the columns of `vectors` vectors (a whole tile's or one) to `partial`,
// [vectors, rows, columns], by the level's kernel for that many rows.
template <typename Level, int kRows = Level::kGroupRows>
TRAK_EXT_INLINE void accumulate_rows(int rows, int vectors, int blocks, const float* tables,
                                     const uint32_t* signs, float* partial) {
  if (rows == kRows) {
    return vectors == 1 ? Level::template accumulate<kRows, 1>(blocks, tables, signs, partial)
                        : Level::template accumulate<kRows, Level::tile_vectors(kRows)>(
                              blocks, tables, signs, partial);
  }
  if constexpr (kRows > 1) {
    accumulate_rows<Level, kRows - 1>(rows, vectors, blocks, tables, signs, partial);
  }
}

// One panel, all of P. Per chunk: every row group's tables are built once and used by all columns;
// the first row group makes the signs on its way and the others read them back.
template <typename Level>
void project_panel(const MatrixLaw& law, const GradientView& grads, const OutputView& out,
                   const OutputTile& panel, const Panels& panels, float* workspace) {
  constexpr int kLevelParams = Level::kBlocks * kBlockParams;
  constexpr int kVectorWords = Level::kBlocks * kBlockWords * kSignLanes;
  float* partial = workspace;
  uint32_t* signs = reinterpret_cast<uint32_t*>(partial + panels.partial_floats);
  float* tables = reinterpret_cast<float*>(signs + panels.sign_words);
  float* values = tables + Level::kGroupRows * Level::kBlocks * Level::kTableFloats;

  const KeySchedule keys = make_key_schedule(law.seed_low, law.seed_high, law.model_id);
  const RowGroups groups = RowGroups::of<Level>(panel.row_end - panel.row_begin);
  const int64_t vectors = round_up(panel.column_end - panel.column_begin, kSignLanes) / kSignLanes;

  int64_t first = -static_cast<int64_t>(grads.param_offset % kBlockParams);
  uint64_t block = grads.param_offset / kBlockParams;
  for (int64_t pending = 0; first < grads.params; block += Level::kBlocks) {
    if (pending == 0) std::memset(partial, 0, panels.partial_floats * sizeof(float));
    const int blocks = static_cast<int>(
        smaller(Level::kBlocks, round_up(grads.params - first, kBlockParams) / kBlockParams));
    SharedRounds shared[Level::kBlocks] = {};
    for (int b = 0; b < blocks; ++b) {
      shared[b] = make_shared_rounds(keys, block + static_cast<uint64_t>(b));
    }
    float* sums = partial;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int group_rows = groups.size(group);
      for (int r = 0; r < group_rows; ++r) {
        const int64_t row = panel.row_begin + groups.begin(group) + r;
        read_chunk(grads, row, first, blocks * kBlockParams, values + r * kLevelParams);
      }
      const bool last_group = group + 1 == groups.count;
      const int64_t next_group = last_group ? 0 : group + 1;
      const int64_t next_first = last_group ? first + kLevelParams : first;
      for (int r = 0; r < groups.size(next_group); ++r) {
        const int64_t row = panel.row_begin + groups.begin(next_group) + r;
        prefetch_chunk(grads, row, next_first, kLevelParams);
      }
      Level::build_tables(group_rows, blocks, values, tables);
      const int tile_vectors = Level::tile_vectors(group_rows);
      for (int64_t v = 0; v < vectors;) {
        const int width = v + tile_vectors <= vectors ? tile_vectors : 1;
        uint32_t* tile_signs = signs + v * kVectorWords;
        if (group == 0) {
          const uint32_t column = static_cast<uint32_t>(panel.column_begin + v * kSignLanes);
          for (int b = 0; b < blocks; ++b) {
            generate_signs<Level>(keys, shared[b], column, width,
                                  tile_signs + b * kBlockWords * kSignLanes);
          }
        }
        accumulate_rows<Level>(group_rows, width, blocks, tables, tile_signs, sums);
        sums += width * group_rows * kSignLanes;
        v += width;
      }
    }
    first += kLevelParams;
    if (++pending == kPartialChunks || first >= grads.params) {
      flush_panel<Level>(out, panel, groups, vectors, partial);
      pending = 0;
    }
  }
}

template <typename Level>
int64_t lookup_workspace_bytes(const OutputTile& tile) {
  const Panels panels = plan_panels<Level>(tile);
  const int64_t words = panels.partial_floats + panels.sign_words +
                        Level::kGroupRows * Level::kBlocks * (Level::kTableFloats + kBlockParams);
  return words * static_cast<int64_t>(sizeof(float));
}

template <typename Level>
void project_tile_by_lookup(const ProjectionProblem& problem, const OutputTile& tile,
                            void* workspace) {
  const Panels panels = plan_panels<Level>(tile);
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    const GradientView& grads = problem.grads[i];
    if (grads.params == 0) continue;
    for (int64_t row = tile.row_begin; row < tile.row_end; row += panels.rows) {
      for (int64_t column = tile.column_begin; column < tile.column_end; column += panels.columns) {
        const OutputTile panel = {row, smaller(row + panels.rows, tile.row_end), column,
                                  smaller(column + panels.columns, tile.column_end)};
        project_panel<Level>(problem.law, grads, problem.out, panel, panels,
                             static_cast<float*>(workspace));
      }
    }
  }
}

// A level's way to project Rademacher matrices. Any tile will do: panels are cut inside it.
template <typename Level>
constexpr ProjectionKernels lookup_kernels() {
  return {kSignLanes,
          INT64_MAX,
          INT64_MAX,
          kPartialChunks * Level::kBlocks * kBlockParams,
          lookup_workspace_bytes<Level>,
          project_tile_by_lookup<Level>};
}

}  // namespace
}  // namespace trak_ext::cpu
