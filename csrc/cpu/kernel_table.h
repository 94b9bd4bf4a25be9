// What every instruction-set level offers: one table of functions a translation unit.
#pragma once

#include "../division.h"
#include "projection.h"
#include "scoring.h"
#include "sjlt.h"

namespace trak_ext::cpu {

// Sums are cut at parameter numbers that are multiples of this, whatever the offset.
constexpr int kChunkParams = 128;

// Training samples and targets of a scoring block, and the depth of the slice of packed targets
// that stays in the first cache while the block's samples pass by.
constexpr int64_t kScoreRows = 48;
constexpr int64_t kScoreTargets = 512;
constexpr int64_t kScoreDepth = 256;

// What one running thread needs.
template <class T>
struct ScoreScratch {
  alignas(64) T block[kScoreRows][kScoreTargets];    // the finished scores
  alignas(64) T partial[kScoreRows][kScoreTargets];  // one checkpoint's inner products
  alignas(64) T features[kScoreRows][kScoreDepth];   // a slice of them, packed
};

template <class T>
struct ScoringKernels {
  int64_t tile_targets;  // targets a packed tile
  void (*pack_targets)(const ScoringProblem<T>& problem, T* packed);
  void (*score_block)(const ScoringProblem<T>& problem, const T* packed, int64_t row_begin,
                      int64_t row_end, int64_t tile_begin, int64_t tile_end,
                      ScoreScratch<T>& scratch);
};

// One way to project: which tiles of the output it takes, and the function that makes one.
struct ProjectionKernels {
  int64_t tile_columns;      // columns made together
  int64_t tile_rows_max;     // rows of an output tile
  int64_t tile_columns_max;  // columns of an output tile
  int64_t span_params;       // sums go to the output every so many parameters, from the first chunk
  int64_t (*workspace_bytes)(const OutputTile& tile);
  void (*project_tile)(const ProjectionProblem& problem, const OutputTile& tile, void* workspace);
};

struct KernelTable {
  const char* name;
  ProjectionKernels rademacher;
  ProjectionKernels normal;
  int64_t matrix_columns;          // columns that fill_matrix_columns makes together
  int64_t matrix_workspace_bytes;  // what it needs
  void (*fill_matrix_columns)(const MatrixLaw& law, uint64_t param_offset, int64_t params,
                              int64_t proj_dim, int64_t column_begin, float* out, void* workspace);
  int64_t sjlt_scratch_bytes;  // what sum_sjlt_node needs
  void (*sum_sjlt_node)(const SjltProblem& problem, uint64_t node, const SjltPanel& panel,
                        void* scratch, float* sums);
  ScoringKernels<float> score_float;
  ScoringKernels<double> score_double;
};

extern const KernelTable kBaselineKernels;
#if defined(TRAK_EXT_X86_LEVELS)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
// Rademacher in fixed point, for machines of that level that also have VNNI instructions.
extern const ProjectionKernels kVnniMediumKernels;
#endif

// The table in use: the best level of this machine, or the one that TRAK_EXT_CPU_LEVEL names.
// Throws std::invalid_argument where the variable names a level that is unknown or not had here.
const KernelTable& kernels();

// The kernels for a kind and precision at the level in use.
const ProjectionKernels& projection_kernels(Kind kind, Precision precision);

// Whether precision `medium` is anything but fp32 at the level in use.
bool has_fixed_point();

// Names of the levels that this machine runs, the plainest first; a null ends the list.
const char* const* available_levels();

}  // namespace trak_ext::cpu
