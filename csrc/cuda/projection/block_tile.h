// Where a block's tile of a launch begins, and where its sums go.
#pragma once

#include "../device/device.h"
#include "multiply_problem.h"

namespace trak_ext::cuda {

constexpr int kTileColumns = 16;  // columns of the matrix a warp and instruction
constexpr int kTileRows = 8;      // rows of the gradients a column of fragments

// The part of a launch that one block makes.
struct BlockTile {
  int64_t chunk;        // of the launch
  int64_t row;          // the first, of the launch
  int64_t column;       // the first, of the matrix
  int32_t rows;         // that exist
  int32_t columns;      // that exist
  const char* operand;  // the chunk's gradients of the tile's rows, as bf16 parts
  float* partials;      // the tile's first sum; rows are problem.columns apart
};

// Tiles of one chunk follow one another, so that blocks that run together read the same gradients.
TRAK_EXT_DEVICE BlockTile locate_tile(const MultiplyProblem& problem, int tile_rows,
                                      int tile_columns, int passes) {
  const int64_t column_tiles = (problem.columns + tile_columns - 1) / tile_columns;
  const int64_t row_tiles = (problem.rows + tile_rows - 1) / tile_rows;
  const int64_t index = device::block_index();
  const int64_t column = index % column_tiles * tile_columns;
  const int64_t row_tile = index / column_tiles % row_tiles;
  const int64_t rows_left = problem.rows - row_tile * tile_rows;
  const int64_t columns_left = problem.columns - column;
  BlockTile tile = {};
  tile.chunk = index / column_tiles / row_tiles;
  tile.row = row_tile * tile_rows;
  tile.column = problem.first_column + column;
  tile.rows = static_cast<int32_t>(rows_left < tile_rows ? rows_left : tile_rows);
  tile.columns = static_cast<int32_t>(columns_left < tile_columns ? columns_left : tile_columns);
  tile.operand =
      problem.operand + (tile.chunk * row_tiles + row_tile) *
                            operand_chunk_bytes(tile_rows, passes, problem.chunk_superblocks);
  tile.partials =
      problem.partials + (tile.chunk * problem.rows + tile.row) * problem.columns + column;
  return tile;
}

// Writes a warp's sums; lane (g, t) has columns g, g + 8 and rows 2t, 2t + 1 of every tile.
template <class Tile>
TRAK_EXT_DEVICE void store_sums(const BlockTile& tile, int64_t pitch, int warp_column,
                                const float (&sums)[Tile::kColumnTiles][Tile::kRowTiles][4]) {
  const int lane = device::thread_index() % 32;
#pragma unroll
  for (int n = 0; n < Tile::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * kTileRows + lane % 4 * 2 + i;
      if (row >= tile.rows) continue;
#pragma unroll
      for (int m = 0; m < 2 * Tile::kColumnTiles; ++m) {
        const int column = warp_column + 8 * m + lane / 4;
        if (column < tile.columns) {
          device::store_global<float>(tile.partials + row * pitch + column,
                                      sums[m / 2][n][m % 2 * 2 + i]);
        }
      }
    }
  }
}

}  // namespace trak_ext::cuda
