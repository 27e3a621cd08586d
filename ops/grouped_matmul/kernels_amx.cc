// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include <cstdint>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

constexpr int kTileRows = 16;     // of a tile register
constexpr int kTileColumns = 16;  // of accumulators, and of groups of a panel
constexpr int kBlocks = 2;
constexpr int64_t kXChunk = int64_t{kTileRows} * kChunkBytes;
constexpr int64_t kCRowBytes = int64_t{kPanelColumns} * 4;
// 32 KiB of a panel, read once for each pair of blocks.
constexpr int64_t kStepChunks = 8;

// All eight tiles whole: rows that are not there cost nothing but their place.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig kTileConfig;

void begin() { _tile_loadconfig(&kTileConfig); }

void end() { _tile_release(); }

// What is common to all products of a pass over the panel.
struct Pass {
  const char* w;
  int64_t w_row_bytes;
  const char* x;
  int64_t x_block_bytes;
  int64_t chunks;
  char* c;
  bool accumulate;
};

#define MOEOPS_DOT(c, a, b)    \
  do {                         \
    if constexpr (kIsS8) {     \
      _tile_dpbusd(c, a, b);   \
    } else {                   \
      _tile_dpbf16ps(c, a, b); \
    }                          \
  } while (false)
#define MOEOPS_LOAD_C(tile, row, column)                                     \
  do {                                                                       \
    if (pass.accumulate) {                                                   \
      _tile_loadd(tile, pass.c + (row)*kCRowBytes + (column)*4, kCRowBytes); \
    } else {                                                                 \
      _tile_zero(tile);                                                      \
    }                                                                        \
  } while (false)
#define MOEOPS_STORE_C(tile, row, column) \
  _tile_stored(tile, pass.c + (row)*kCRowBytes + (column)*4, kCRowBytes)

// 16 rows x Columns tiles of columns.
template <bool kIsS8, int Columns>
void multiply_16(const Pass& pass) {
  MOEOPS_LOAD_C(0, 0, 0);
  if constexpr (Columns > 1) MOEOPS_LOAD_C(1, 0, 16);
  if constexpr (Columns > 2) MOEOPS_LOAD_C(2, 0, 32);
  if constexpr (Columns > 3) MOEOPS_LOAD_C(3, 0, 48);
  const char* w = pass.w;
  const char* x = pass.x;
  for (int64_t chunk = 0; chunk < pass.chunks; ++chunk) {
    _tile_loadd(4, x, kChunkBytes);
    _tile_loadd(5, w, pass.w_row_bytes);
    MOEOPS_DOT(0, 4, 5);
    if constexpr (Columns > 1) {
      _tile_loadd(6, w + 64, pass.w_row_bytes);
      MOEOPS_DOT(1, 4, 6);
    }
    if constexpr (Columns > 2) {
      _tile_loadd(7, w + 128, pass.w_row_bytes);
      MOEOPS_DOT(2, 4, 7);
    }
    if constexpr (Columns > 3) {
      _tile_loadd(5, w + 192, pass.w_row_bytes);
      MOEOPS_DOT(3, 4, 5);
    }
    x += kXChunk;
    w += kChunkGroups * pass.w_row_bytes;
  }
  MOEOPS_STORE_C(0, 0, 0);
  if constexpr (Columns > 1) MOEOPS_STORE_C(1, 0, 16);
  if constexpr (Columns > 2) MOEOPS_STORE_C(2, 0, 32);
  if constexpr (Columns > 3) MOEOPS_STORE_C(3, 0, 48);
}

// 32 rows x Columns tiles of columns, 1 or 2: each tile that is loaded is used twice.
template <bool kIsS8, int Columns>
void multiply_32(const Pass& pass) {
  MOEOPS_LOAD_C(0, 0, 0);
  MOEOPS_LOAD_C(2, 16, 0);
  if constexpr (Columns > 1) {
    MOEOPS_LOAD_C(1, 0, 16);
    MOEOPS_LOAD_C(3, 16, 16);
  }
  const char* w = pass.w;
  const char* x = pass.x;
  for (int64_t chunk = 0; chunk < pass.chunks; ++chunk) {
    _tile_loadd(4, x, kChunkBytes);
    _tile_loadd(6, w, pass.w_row_bytes);
    MOEOPS_DOT(0, 4, 6);
    _tile_loadd(5, x + pass.x_block_bytes, kChunkBytes);
    MOEOPS_DOT(2, 5, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, w + 64, pass.w_row_bytes);
      MOEOPS_DOT(1, 4, 7);
      MOEOPS_DOT(3, 5, 7);
    }
    x += kXChunk;
    w += kChunkGroups * pass.w_row_bytes;
  }
  MOEOPS_STORE_C(0, 0, 0);
  MOEOPS_STORE_C(2, 16, 0);
  if constexpr (Columns > 1) {
    MOEOPS_STORE_C(1, 0, 16);
    MOEOPS_STORE_C(3, 16, 16);
  }
}

template <bool kIsS8>
void run(const void*, const Tile& tile) {
  const bool one_block = tile.rows <= kTileRows;
  const int64_t step = one_block ? tile.k_chunks : kStepChunks;
  Pass pass;
  pass.w_row_bytes = tile.width * 4;
  pass.x_block_bytes = tile.x_block_bytes;
  for (int64_t k = 0; k < tile.k_chunks; k += step) {
    pass.w = tile.panel + k * kChunkGroups * pass.w_row_bytes;
    pass.x = tile.x + k * kXChunk;
    pass.chunks = tile.k_chunks - k < step ? tile.k_chunks - k : step;
    pass.c = static_cast<char*>(tile.c);
    pass.accumulate = tile.accumulate || k > 0;
    if (one_block) {
      if (tile.width == 64) return multiply_16<kIsS8, 4>(pass);
      if (tile.width == 48) return multiply_16<kIsS8, 3>(pass);
      return multiply_16<kIsS8, 2>(pass);
    }
    for (int column = 0; column < tile.width; column += 2 * kTileColumns) {
      if (tile.width - column == kTileColumns) {
        multiply_32<kIsS8, 1>(pass);
      } else {
        multiply_32<kIsS8, 2>(pass);
      }
      pass.w += 2 * kTileColumns * 4;
      pass.c += 2 * kTileColumns * 4;
    }
  }
}

}  // namespace

extern const TileKernel kernel_s8_amx;
const TileKernel kernel_s8_amx = {"amx",   DType::kS8, Isa::kAmx, kTileRows, kTileRows* kBlocks,
                                  nullptr, run<true>,  begin,     end};
extern const TileKernel kernel_bf16_amx;
const TileKernel kernel_bf16_amx = {"amx",   DType::kBf16, Isa::kAmx, kTileRows, kTileRows* kBlocks,
                                    nullptr, run<false>,   begin,     end};

}  // namespace moeops::grouped_matmul_internal
