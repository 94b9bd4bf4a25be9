// The multiplying kernels that are built, and which of them serves a problem.
#pragma once

#include "multiply_kernel.h"
#include "plain_kernel.h"

namespace trak_ext {

// A kernel ready to launch, and the tile that one of its blocks makes.
struct Multiplier {
  int tile_rows;
  int tile_columns;
  int threads;
  int shared_bytes;
  void (*kernel)(MultiplyProblem);
};

// No tile is larger.
constexpr int kTileRowsMax = 64;
constexpr int kTileColumnsMax = 512;

template <class Tile>
Multiplier tile_multiplier() {
  static_assert(Tile::kRows <= kTileRowsMax && Tile::kColumns <= kTileColumnsMax);
  return {Tile::kRows, Tile::kColumns, Tile::kThreads, shared_bytes<Tile>(), multiply_kernel<Tile>};
}

// The smallest tile that takes the whole batch, else the largest: making entries costs the same
// however many rows they serve. Shared memory a block: 99 KiB on sm_86, 89 and 120; three parts of
// fp32 leave room for two raw stages there.
template <int kPasses>
Multiplier rademacher_tile(int64_t rows) {
  if (rows <= 8) return tile_multiplier<TileShape<RademacherEntries, kPasses, 4, 1, 4, 2>>();
  if (rows <= 16) return tile_multiplier<TileShape<RademacherEntries, kPasses, 4, 2, 3, 1>>();
  constexpr int kSlots = kPasses == 3 ? 2 : 3;
  return tile_multiplier<TileShape<RademacherEntries, kPasses, 4, 4, kSlots, 1>>();
}

// A normal entry costs some twenty times a sign, so fewer columns and more rows; the most where a
// block may have the shared memory for them.
template <int kPasses>
Multiplier normal_tile(int64_t rows, int64_t shared_limit) {
  if (rows <= 8) return tile_multiplier<TileShape<NormalEntries, kPasses, 2, 1, 4, 2>>();
  constexpr int kSlots = kPasses == 3 ? 2 : 3;
  const Multiplier most = tile_multiplier<TileShape<NormalEntries, kPasses, 2, 8, 2, 1>>();
  if (rows <= 32 || most.shared_bytes > shared_limit) {
    return tile_multiplier<TileShape<NormalEntries, kPasses, 2, 4, kSlots, 1>>();
  }
  return most;
}

// Each is compiled in a file of its own (rademacher_tiles.cu, normal_tiles.cu).
Multiplier rademacher_multiplier(int passes, int64_t rows);
Multiplier normal_multiplier(int passes, int64_t rows, int64_t shared_limit);
Multiplier plain_multiplier(Kind kind);

// shared_limit: what a block may have of shared memory, 99 KiB at least.
inline Multiplier tensor_core_multiplier(Kind kind, int passes, int64_t rows,
                                         int64_t shared_limit) {
  return kind == Kind::kRademacher ? rademacher_multiplier(passes, rows)
                                   : normal_multiplier(passes, rows, shared_limit);
}

}  // namespace trak_ext
