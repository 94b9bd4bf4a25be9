// From a call to the kernel that serves it, in one file: path, kind, bf16 parts and rows go into
// choose_multiplier (the last function); the *_tile functions say which tile so many rows get, and
// make_multiplier what it is launched with. The functions between them, one a file *_tiles.cu, only
// make a number of parts a constant, so that tiles compile side by side.
#pragma once

#include "../device/path.h"
#include "multiply_kernel.h"
#include "plain_kernel.h"
#include "split_gradients_kernel.h"
#include "warpgroup_kernel.h"

namespace trak_ext::cuda {

// A kernel ready to launch, and the tile that one of its blocks makes.
struct Multiplier {
  int tile_rows;
  int tile_columns;
  int threads;
  int shared_bytes;
  int blocks_per_sm;  // that its registers and shared memory leave room for
  int passes;         // bf16 parts that it multiplies; 0: it reads the gradients themselves
  void (*kernel)(MultiplyProblem);
  void (*split)(SplitProblem);  // makes those parts; null where there are none
  int split_shared_bytes;
};

// No tile is larger.
constexpr int kTileRowsMax = 64;
constexpr int kTileColumnsMax = 512;

template <class Tile, class Operand>
Multiplier make_multiplier(void (*kernel)(MultiplyProblem)) {
  static_assert(Tile::kRows <= kTileRowsMax && Tile::kColumns <= kTileColumnsMax);
  constexpr int kSharedBytes = Operand::kSharedBytes + Tile::Entries::kSharedBytes;
  static_assert(kSharedBytes <= 227 * 1024, "no device lets a block have more");
  using Splitter = GradientSplitter<Tile::template EntriesOf, Tile::kPasses>;
  return {Tile::kRows,
          Tile::kColumns,
          Tile::kThreads,
          kSharedBytes,
          Tile::kBlocksPerSm,
          Tile::kPasses,
          kernel,
          split_gradients_kernel<Tile::template EntriesOf, Tile::kPasses>,
          Splitter::kSharedBytes};
}

template <class Tile>
Multiplier tile_multiplier() {
  return make_multiplier<Tile, OperandSlots<Tile>>(multiply_kernel<Tile>);
}
template <class Tile>
Multiplier warpgroup_multiplier() {
  return make_multiplier<Tile, OperandRing<Tile>>(warpgroup_kernel<Tile>);
}

// The smallest tile that takes the whole batch, else the largest: making entries costs the same
// however many rows they serve. Shared memory a block: 99 KiB on sm_86, 89 and 120.
template <int kPasses>
Multiplier rademacher_tile(int64_t rows) {
  if (rows <= 8) {
    // Three passes leave no register for the loop over a slot's stages.
    constexpr int kSlotStages = kPasses == 3 ? 1 : 4;
    constexpr int kSlots = kPasses == 3 ? 6 : 3;
    return tile_multiplier<TileShape<RademacherEntries, kPasses, 4, 1, kSlotStages, kSlots, 2>>();
  }
  if (rows <= 16) return tile_multiplier<TileShape<RademacherEntries, kPasses, 4, 2, 2, 3, 1>>();
  if (rows <= 32) return tile_multiplier<TileShape<RademacherEntries, kPasses, 4, 4, 1, 4, 1>>();
  // Half the columns, or its sums would not fit in a thread's registers.
  constexpr int kSlots = kPasses == 3 ? 2 : 3;
  return tile_multiplier<TileShape<RademacherEntries, kPasses, 2, 8, 1, kSlots, 1>>();
}

// A normal entry costs some twenty times a sign, so fewer columns and more rows; the most where a
// block may have the shared memory for them.
template <int kPasses>
Multiplier normal_tile(int64_t rows, int64_t shared_limit) {
  if (rows <= 8) return tile_multiplier<TileShape<NormalEntries, kPasses, 2, 1, 1, 6, 2>>();
  const Multiplier most = tile_multiplier<TileShape<NormalEntries, kPasses, 2, 8, 1, 3, 1>>();
  if (rows <= 32 || most.shared_bytes > shared_limit) {
    return tile_multiplier<TileShape<NormalEntries, kPasses, 2, 4, 1, 4, 1>>();
  }
  return most;
}

// ptxas before CUDA 12.8 needs more registers and spills without smaller tiles here: the column
// tiles of a warpgroup with 64 rows, and the blocks a multiprocessor of one with 8.
#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1208
constexpr int kColumnTilesOf64Rows = 2;
constexpr int kBlocksOf8Rows = 1;
#else
constexpr int kColumnTilesOf64Rows = 4;
constexpr int kBlocksOf8Rows = 2;
#endif

// The same for sm_90a, where a block may have 227 KiB. An instruction reaches the full rate from 32
// rows on, where sixteen warps hide the making of signs; with four column tiles of 64 rows, a
// thread's sums are half of its registers, and eight warps fill the multiprocessor.
template <int kPasses>
Multiplier rademacher_warpgroup_tile(int64_t rows) {
  if (rows <= 8)
    return warpgroup_multiplier<
        WarpgroupTile<RademacherEntries, kPasses, 2, 4, 8, 6, kBlocksOf8Rows>>();
  if (rows <= 16) {
    return warpgroup_multiplier<WarpgroupTile<RademacherEntries, kPasses, 4, 2, 16, 6, 1>>();
  }
  if (rows <= 32) {
    return warpgroup_multiplier<WarpgroupTile<RademacherEntries, kPasses, 4, 2, 32, 6, 1>>();
  }
  constexpr int kSlots = kPasses == 3 ? 4 : 6;
  return warpgroup_multiplier<
      WarpgroupTile<RademacherEntries, kPasses, 2, kColumnTilesOf64Rows, 64, kSlots, 1>>();
}

// Making normal entries takes longer than multiplying them with any number of rows that fits.
template <int kPasses>
Multiplier normal_warpgroup_tile(int64_t rows) {
  if (rows <= 8) {
    return warpgroup_multiplier<WarpgroupTile<NormalEntries, kPasses, 2, 2, 8, 6, 2>>();
  }
  if (rows <= 32) {
    constexpr int kBlocks = kPasses == 3 ? 1 : 2;  // its registers do not fit twice
    return warpgroup_multiplier<WarpgroupTile<NormalEntries, kPasses, 2, 2, 32, 4, kBlocks>>();
  }
  return warpgroup_multiplier<WarpgroupTile<NormalEntries, kPasses, 2, 2, 64, 4, 1>>();
}

// Each is compiled in a file of its own (rademacher_tiles.cu, normal_tiles.cu, ...).
Multiplier rademacher_multiplier(int passes, int64_t rows);
Multiplier normal_multiplier(int passes, int64_t rows, int64_t shared_limit);
Multiplier rademacher_warpgroup_multiplier(int passes, int64_t rows);
Multiplier normal_warpgroup_multiplier(int passes, int64_t rows);
Multiplier plain_multiplier(Kind kind);

// shared_limit: what a block may have of shared memory, 99 KiB at least.
inline Multiplier tensor_core_multiplier(Kind kind, int passes, int64_t rows,
                                         int64_t shared_limit) {
  return kind == Kind::kRademacher ? rademacher_multiplier(passes, rows)
                                   : normal_multiplier(passes, rows, shared_limit);
}

inline Multiplier warpgroup_multiplier(Kind kind, int passes, int64_t rows) {
  return kind == Kind::kRademacher ? rademacher_warpgroup_multiplier(passes, rows)
                                   : normal_warpgroup_multiplier(passes, rows);
}

// The kernel of a path for so many rows. is_rest: they are what a larger batch has beyond whole
// tiles; few of them take the warp's instruction, which is faster there, and the bits are the same.
inline Multiplier choose_multiplier(Path path, Kind kind, int passes, int64_t rows, bool is_rest,
                                    int64_t shared_limit) {
  if (path == Path::kPlain) return plain_multiplier(kind);
  if (path == Path::kMma || (is_rest && rows <= kTileRows)) {
    return tensor_core_multiplier(kind, passes, rows, shared_limit);
  }
  return warpgroup_multiplier(kind, passes, rows);
}

}  // namespace trak_ext::cuda
