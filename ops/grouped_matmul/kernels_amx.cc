// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include <cstdint>

#include "ops/grouped_matmul/ahead.h"
#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

constexpr int kRegisterRows = 16;
constexpr int kRegisterColumns = 16;  // of accumulators, and of groups of a panel
constexpr int kTileRows = 8 * kRegisterRows;
// Panels that are streamed side by side. Two threads read 26 GB/s on a Granite Rapids with one,
// 31 with four, 24 with eight.
constexpr int kStreams = 4;
constexpr int64_t kXChunk = int64_t{kRegisterRows} * kChunkBytes;
constexpr int64_t kCRowBytes = int64_t{kPanelColumns} * 4;
// 32 KiB of a panel, for all rows of the tile: more would leave L1 before the next rows come, less
// would have to bring the accumulators back more often.
constexpr int64_t kStepChunks = 8;
// A single block of rows streams its panel; it asks for what lies 16 KiB ahead.
constexpr int64_t kAheadChunks = 4;

// All eight tile registers whole: rows that are not there cost nothing but their place.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Not a local: GCC 12 believes that the instruction reads 8 bytes of it.
constexpr TileConfig kTileConfig;

void begin() { _tile_loadconfig(&kTileConfig); }

void end() { _tile_release(); }

// What one pass over the registers reads and writes.
struct Pass {
  const char* w;
  int64_t w_row_bytes;
  const char* x;
  int64_t x_block_bytes;
  int64_t chunks;
  char* c;
  bool accumulate;
};

// Tile registers have numbers, not names, and the numbers are literals: hence macros.
#define MOEOPS_DOT(c, a, b)    \
  do {                         \
    if constexpr (kIsS8) {     \
      _tile_dpbusd(c, a, b);   \
    } else {                   \
      _tile_dpbf16ps(c, a, b); \
    }                          \
    ahead.request();           \
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

// 16 rows x Columns registers of columns: the panel goes by from front to back, once.
template <bool kIsS8, int Columns>
void multiply_16(const Pass& pass, Ahead& shared) {
  Ahead ahead = shared;
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
  shared = ahead;
}

template <bool kIsS8>
void multiply_16(const Pass& pass, int width, Ahead& ahead) {
  if (width == 64) return multiply_16<kIsS8, 4>(pass, ahead);
  if (width == 48) return multiply_16<kIsS8, 3>(pass, ahead);
  multiply_16<kIsS8, 2>(pass, ahead);
}

// 32 rows x Columns registers of columns, 1 or 2: what is loaded is used twice. kBeside: the first
// to read this part of the panel fetches the columns beside it too. Memory delivers whole pages in
// order half again as fast as every other pair of lines.
template <bool kIsS8, int Columns, bool kBeside>
void multiply_32(const Pass& pass, Ahead& shared) {
  Ahead ahead = shared;
  MOEOPS_LOAD_C(0, 0, 0);
  MOEOPS_LOAD_C(2, 16, 0);
  if constexpr (Columns > 1) {
    MOEOPS_LOAD_C(1, 0, 16);
    MOEOPS_LOAD_C(3, 16, 16);
  }
  const char* w = pass.w;
  const char* x = pass.x;
  const auto fetch_beside = [&w, &pass](int first) {
    for (int i = first; i < first + kChunkGroups / 2; ++i) {
      __builtin_prefetch(w + i * pass.w_row_bytes + 128, 0, 3);
      __builtin_prefetch(w + i * pass.w_row_bytes + 192, 0, 3);
    }
  };
  for (int64_t chunk = 0; chunk < pass.chunks; ++chunk) {
    // x passes L1 by (a hint), which keeps the panel.
    _tile_stream_loadd(4, x, kChunkBytes);
    _tile_loadd(6, w, pass.w_row_bytes);
    if constexpr (kBeside) fetch_beside(0);
    MOEOPS_DOT(0, 4, 6);
    _tile_stream_loadd(5, x + pass.x_block_bytes, kChunkBytes);
    MOEOPS_DOT(2, 5, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, w + 64, pass.w_row_bytes);
      if constexpr (kBeside) fetch_beside(kChunkGroups / 2);
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
  shared = ahead;
}

template <bool kIsS8>
void multiply_32(Pass pass, int width, bool first, Ahead& ahead) {
  if (width == 64 && first) {
    multiply_32<kIsS8, 2, true>(pass, ahead);
  } else {
    multiply_32<kIsS8, 2, false>(pass, ahead);
  }
  pass.w += 2 * kRegisterColumns * 4;
  pass.c += 2 * kRegisterColumns * 4;
  if (width == 64) {
    multiply_32<kIsS8, 2, false>(pass, ahead);
  } else if (width == 48) {
    multiply_32<kIsS8, 1, false>(pass, ahead);
  }
}

template <bool kIsS8>
void run_one_block(const Tile& tile, Pass pass) {
  const int64_t tail = tile.k_chunks < kAheadChunks ? tile.k_chunks : kAheadChunks;
  const int dots_per_chunk = tile.width / kRegisterColumns;
  pass.w = tile.panel;
  pass.x = tile.x;
  pass.c = static_cast<char*>(tile.c);
  pass.accumulate = tile.accumulate;
  pass.chunks = tile.k_chunks - tail;
  if (pass.chunks > 0) {
    Ahead ahead(tile.panel + tail * kChunkGroups * pass.w_row_bytes, pass.chunks * tile.width,
                pass.chunks * dots_per_chunk);
    multiply_16<kIsS8>(pass, tile.width, ahead);
    pass.w += pass.chunks * kChunkGroups * pass.w_row_bytes;
    pass.x += pass.chunks * kXChunk;
    pass.accumulate = true;
  }
  pass.chunks = tail;
  Ahead ahead = Ahead::next_panel(tile, tail * tile.width, tail * dots_per_chunk);
  multiply_16<kIsS8>(pass, tile.width, ahead);
}

// Few rows, several panels: a page of each in turn, which keeps the prefetchers of as many streams
// busy, and the page after it asked for. The sums go in and out of the tile registers with every
// page; waiting for memory takes longer.
template <bool kIsS8>
void run_streams(const Tile& tile, Pass pass, int64_t blocks) {
  const int64_t page = int64_t{kChunkGroups} * tile.width * 4;
  pass.chunks = 1;
  for (int64_t k = 0; k < tile.k_chunks; ++k) {
    pass.accumulate = tile.accumulate || k > 0;
    pass.x = tile.x + k * kXChunk;
    for (int panel = 0; panel < tile.panels; ++panel) {
      pass.w = tile.panel + panel * tile.panel_bytes + k * page;
      pass.c = static_cast<char*>(tile.c) + panel * tile.c_bytes;
      const char* following = pass.w + page;
      if (k + 1 == tile.k_chunks) {
        following = tile.next == nullptr ? nullptr : tile.next + panel * tile.panel_bytes;
      }
      Ahead ahead(following, tile.width, blocks * (tile.width / kRegisterColumns));
      if (blocks == 1) {
        multiply_16<kIsS8>(pass, tile.width, ahead);
      } else {
        multiply_32<kIsS8>(pass, tile.width, false, ahead);
      }
    }
  }
}

template <bool kIsS8>
void run(const void*, const Tile& tile) {
  const int64_t blocks = (tile.rows + kRegisterRows - 1) / kRegisterRows;
  Pass pass;
  pass.w_row_bytes = tile.width * 4;
  pass.x_block_bytes = tile.x_block_bytes;
  if (tile.panels > 1) return run_streams<kIsS8>(tile, pass, blocks);
  if (blocks == 1) return run_one_block<kIsS8>(tile, pass);

  Ahead ahead(tile.prefetch, tile.prefetch_lines,
              blocks * (tile.width / kRegisterColumns) * tile.k_chunks, 1);
  for (int64_t k = 0; k < tile.k_chunks; k += kStepChunks) {
    const int64_t left = tile.k_chunks - k;
    pass.chunks = left < kStepChunks ? left : kStepChunks;
    pass.accumulate = tile.accumulate || k > 0;
    for (int64_t block = 0; block < blocks; block += 2) {
      pass.w = tile.panel + k * kChunkGroups * pass.w_row_bytes;
      pass.x = tile.x + block * tile.x_block_bytes + k * kXChunk;
      pass.c = static_cast<char*>(tile.c) + block * kRegisterRows * kCRowBytes;
      if (block + 1 < blocks) {
        multiply_32<kIsS8>(pass, tile.width, block == 0, ahead);
      } else {
        multiply_16<kIsS8>(pass, tile.width, ahead);
      }
    }
  }
}

#undef MOEOPS_DOT
#undef MOEOPS_LOAD_C
#undef MOEOPS_STORE_C

template <bool kIsS8>
constexpr TileKernel kernel() {
  return {.name = "amx",
          .dtype = kIsS8 ? DType::kS8 : DType::kBf16,
          .isa = Isa::kAmx,
          .row_block = kRegisterRows,
          .tile_rows = kTileRows,
          .run = run<kIsS8>,
          .begin = begin,
          .end = end,
          .panels = kStreams,
          .stream_rows = 2 * kRegisterRows};
}

}  // namespace

extern const TileKernel kernel_s8_amx;
const TileKernel kernel_s8_amx = kernel<true>();
extern const TileKernel kernel_bf16_amx;
const TileKernel kernel_bf16_amx = kernel<false>();

}  // namespace moeops::grouped_matmul_internal
