// The projection of one output tile, for one instruction set. Entries are made a chunk at a time,
// used by every row of the tile, and forgotten.
#pragma once

#include "convert.h"
#include "entries.h"
#include "kernel_table.h"
#include "microkernel.h"

namespace trak_ext::cpu {
namespace {

constexpr int64_t kTileRowsMax = 128;
constexpr int64_t kTileColumnsMax = 256;
static_assert(kTileColumnsMax % kTileColumns == 0);
static_assert(kMicroColumns<float> == kTileColumns);

// Sums go to the output every 64 chunks, so rounding grows with P / 8192, not P / 128.
constexpr int64_t kChunksPerSpan = 64;

// About 0.2 MiB, whatever P, B and k: one for each running thread.
struct ProjectionWorkspace {
  EntryTile entries;
  alignas(64) float packed[kTileRowsMax][kChunkParams];   // gradients of one chunk
  alignas(64) float span[kTileRowsMax][kTileColumnsMax];  // sums over the chunks of a span
};

// Adds the span's sums to the output and clears them.
TRAK_EXT_INLINE void flush_span(const OutputView& out, const OutputTile& tile,
                                ProjectionWorkspace& work) {
  const int64_t columns = tile.column_end - tile.column_begin;
  for (int64_t row = tile.row_begin; row < tile.row_end; ++row) {
    float* target = out.data + row * out.row_stride + tile.column_begin * out.column_stride;
    float* sums = work.span[row - tile.row_begin];
    for (int64_t j = 0; j < columns; ++j) target[j * out.column_stride] += sums[j];
    std::memset(sums, 0, sizeof(work.span[0]));
  }
}

TRAK_EXT_INLINE void project_tensor(const ProjectionProblem& problem, const KeySchedule& keys,
                                    const GradientView& grads, const OutputTile& tile,
                                    ProjectionWorkspace& work) {
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t columns = tile.column_end - tile.column_begin;
  const int64_t padded_columns = round_up(columns, kTileColumns);
  std::memset(work.span, 0, sizeof(work.span[0]) * rows);

  const uint64_t first_param = grads.param_offset;
  const uint64_t last_param = first_param + static_cast<uint64_t>(grads.params) - 1;
  const uint64_t first_chunk = first_param / kChunkParams;
  const uint64_t last_chunk = last_param / kChunkParams;
  for (uint64_t chunk = first_chunk; chunk <= last_chunk; ++chunk) {
    // The part of this chunk that the tensor covers, within the chunk.
    const int begin = chunk == first_chunk ? static_cast<int>(first_param % kChunkParams) : 0;
    const int end =
        chunk == last_chunk ? static_cast<int>(last_param % kChunkParams) + 1 : kChunkParams;
    const int64_t param_begin =
        static_cast<int64_t>(chunk * kChunkParams + static_cast<uint64_t>(begin) - first_param);
    pack_as_float({grads.data, grads.dtype, grads.row_stride, grads.param_stride}, tile.row_begin,
                  rows, param_begin, end - begin, work.packed[0], kChunkParams);
    for (int64_t j = 0; j < padded_columns; j += kTileColumns) {
      fill_entries(problem.law.kind, keys, chunk, begin, end,
                   static_cast<uint32_t>(tile.column_begin + j), work.entries);
      multiply_rows<float>(work.packed[0], kChunkParams, rows, work.entries.value[begin],
                           end - begin, &work.span[0][j], kTileColumnsMax);
    }
    if (static_cast<int64_t>((chunk - first_chunk) % kChunksPerSpan) == kChunksPerSpan - 1) {
      flush_span(problem.out, tile, work);
    }
  }
  flush_span(problem.out, tile, work);
}

void project_tile(const ProjectionProblem& problem, const OutputTile& tile, void* workspace) {
  const KeySchedule keys =
      make_key_schedule(problem.law.seed_low, problem.law.seed_high, problem.law.model_id);
  auto& work = *static_cast<ProjectionWorkspace*>(workspace);
  for (int64_t i = 0; i < problem.num_grads; ++i) {
    if (problem.grads[i].params > 0) project_tensor(problem, keys, problem.grads[i], tile, work);
  }
}

// A level's way to project any kind: entries as floats, multiplied by the gradients.
constexpr ProjectionKernels product_kernels() {
  return {kTileColumns,
          kTileRowsMax,
          kTileColumnsMax,
          kChunksPerSpan * kChunkParams,
          [](const OutputTile&) -> int64_t { return sizeof(ProjectionWorkspace); },
          project_tile};
}

// Columns [column_begin, column_begin + kTileColumns) of fill_matrix.
void fill_matrix_columns(const MatrixLaw& law, uint64_t param_offset, int64_t params,
                         int64_t proj_dim, int64_t column_begin, float* out, void* workspace) {
  const KeySchedule keys = make_key_schedule(law.seed_low, law.seed_high, law.model_id);
  EntryTile& tile = *static_cast<EntryTile*>(workspace);
  const int64_t left = proj_dim - column_begin;
  const int64_t columns = left < kTileColumns ? left : int64_t{kTileColumns};
  for (int64_t p = 0; p < params;) {
    const uint64_t param = param_offset + static_cast<uint64_t>(p);
    const int begin = static_cast<int>(param % kChunkParams);
    const int64_t end = params - p < kChunkParams - begin ? begin + (params - p) : kChunkParams;
    fill_entries(law.kind, keys, param / kChunkParams, begin, static_cast<int>(end),
                 static_cast<uint32_t>(column_begin), tile);
    for (int64_t i = begin; i < end; ++i, ++p) {
      std::memcpy(out + p * proj_dim + column_begin, tile.value[i], sizeof(float) * columns);
    }
  }
}

}  // namespace
}  // namespace trak_ext::cpu
