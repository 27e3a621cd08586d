// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/packed_weights.h>

#include <cstdint>

namespace moeops::grouped_matmul_internal {

// All dtypes have the same geometry in bytes: a row's next 64 bytes of k (a chunk: 16 f32, 32 bf16,
// 64 s8) meet 16 rows of a panel, each of which has 4 bytes for every column.
inline constexpr int kPanelColumns = PackedWeights::kPanelColumns;
inline constexpr int kChunkBytes = PackedWeights::kChunkBytes;
inline constexpr int kChunkGroups = kChunkBytes / 4;

// Rows as kernels read them, made by pack_rows: [blocks of row_block rows][k chunk][row_block][64
// bytes], so that a block's rows of a chunk are adjacent: no two of them compete for a cache set,
// and a matrix instruction loads them with one stride. Rows that fill the last block are anything;
// k beyond K is zero (f32, bf16) or anything (u8: the weights there are zero). s8 rows become u8 =
// s8 + 128, which the dot instructions want; the driver takes 128 * (column sum) off again.
//
// c[r][j] = (accumulate ? c[r][j] : 0) + sum over k ascending of x[r][k] * panel[k][j]
//
// each element one chain of operations, so that a K cut into calls gives the bits of one that was
// not, and a row's bits do not depend on the rows beside it.
struct Tile {
  const char* panel;      // k_chunks * 16 rows of width * 4 bytes
  int width;              // 32, 48 or 64
  const char* x;          // the first block, at the first chunk of this call
  int row_block;          // rows of a block: the kernel's, or, if it takes even blocks, up to that
  int64_t x_block_bytes;  // from one block of rows to the next: all of K's chunks
  int rows;               // 1 to as many blocks as the kernel's tile_rows has
  int64_t k_chunks;       // 1 and more
  void* c;  // [whole blocks][kPanelColumns] f32, or s32 for s8; 64-byte aligned; rows beyond
            // `rows` and columns beyond `width` may be written, and mean nothing
  bool accumulate;
  // Memory that will be read after this panel: the next one, or with several tiles of rows each
  // tile's share of it. A kernel that streams its panel asks for that itself, and only at its end
  // for the beginning of this; one that has time for more spreads its requests over its run.
  const char* prefetch;    // 64-byte aligned; may be null
  int64_t prefetch_lines;  // of 64 bytes
  // Further panels of the same width, at most the kernel's: each panel_bytes after the one before,
  // its results c_bytes after the ones before. Memory gives more to several streams than to one.
  int panels = 1;
  int64_t panel_bytes = 0;
  int64_t c_bytes = 0;
  // The panels that are read next, as far apart; may be null. A kernel that streams asks for their
  // beginning when it comes to the end of these, as if there were as many.
  const char* next = nullptr;
};

struct TileForm {
  int last_width;    // of the last panel; the others have kPanelColumns
  int64_t k_chunks;  // of the whole problem
};

struct TileKernel {
  const char* name;
  DType dtype;               // of the weights: f32, bf16 or s8
  Isa isa;                   // the least that it needs
  int row_block;             // most rows of a block of x
  int tile_rows;             // most rows of a call; whole blocks
  bool even_blocks = false;  // takes blocks of fewer rows too: 7 and 7 rather than 12 and 2
  // Gets whatever `run` needs for such tiles, from the context's cache if it is there. False: this
  // kernel cannot do them, the next one must. Null: there is nothing to prepare.
  bool (*prepare)(Context& ctx, const TileForm& form, const void** code) = nullptr;
  void (*run)(const void* code, const Tile& tile);
  // Called by every worker before its first and after its last run of a call; may be null.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
  // Calls of at most stream_rows rows may have up to so many panels.
  int panels = 1;
  int stream_rows = 0;
};

// Every kernel of kernels.inc, best first.
extern const TileKernel* const kTileKernels[];
extern const int kTileKernelCount;

// The best kernel for the dtype that the context's ISA allows and that can be prepared.
Status choose_kernel(Context& ctx, DType dtype, const TileForm& form, const TileKernel** kernel,
                     const void** code);

}  // namespace moeops::grouped_matmul_internal
