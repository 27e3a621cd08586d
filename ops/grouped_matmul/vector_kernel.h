// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/grouped_matmul/ahead.h"
#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

// Internal to each ISA file that includes this: the linker must not pick one file's code for all.
namespace {

// Makes the `run` of a vector kernel from a type Dot, which says what one instruction set does with
// the 4 bytes of a group:
//   Sum                    a vector of accumulators, kLanes columns
//   Weights                a vector of weights, as dot() wants them; weights(p) reads one
//   kRows x kVectors       the tile of accumulators that the registers hold
//   kFewRows               rows that fit into the registers with the whole width of a panel
//   kTogether              vectors of weights that they hold beside it
//   kStepChunks            chunks of the panel that all rows meet before the next ones: the more,
//                          the less often accumulators are stored and loaded again
//   kParts                 1: dot() reads a row's 4 bytes as they are; more: it wants them taken
//                          apart, and expand(from, to) turns 64 bytes into kParts times 64
//   dot(sum, x, w)         x: where the row's group is; its next part is 64 bytes further
//   zero(), load(p), store(p, sum)
//
// Few rows read the panel from memory as fast as it comes, line after line: the processor's own
// prefetchers do that best, and requests of ours would only take their places (s8, 4 rows, two
// threads of a Zen 4 that reads 60 GB/s: 59 GB/s without, 37 with them). More rows go through
// strips of the panel, which do not lie in order, and have the time to ask for what comes next: all
// lines, spread evenly over the work (8 rows: 52 GB/s instead of 40; 12 rows: 37 instead of 31).
template <class Dot>
class VectorKernel {
 public:
  // Enough to use often what came from memory once.
  static constexpr int kTileRows = 8 * Dot::kRows;

  static void run(const void*, const Tile& tile) {
    const bool few = tile.row_block <= Dot::kFewRows;
    const int strip_columns = few ? kPanelColumns : kStripColumns;
    const int64_t blocks = (tile.rows + tile.row_block - 1) / tile.row_block;
    const int64_t strips = (tile.width + strip_columns - 1) / strip_columns;
    Strip strip;
    strip.w_row_bytes = tile.width * 4;
    strip.x_chunk_bytes = tile.row_block * kChunkBytes * Dot::kParts;
    const int64_t chunk_bytes = kChunkGroups * strip.w_row_bytes;
    alignas(64) char expanded[Dot::kParts == 1 ? 64 : kStepChunks * kExpandedChunk];
    // Steps of equal size.
    const int64_t steps = (tile.k_chunks + kStepChunks - 1) / kStepChunks;
    const int64_t step = (tile.k_chunks + steps - 1) / steps;
    for (int64_t k = 0; k < tile.k_chunks; k += step) {
      const int64_t left = tile.k_chunks - k;
      strip.chunks = left < step ? left : step;
      strip.accumulate = tile.accumulate || k > 0;
      // While a step is multiplied, the next one is on its way.
      const int64_t requests = few ? 0 : blocks * strips * strip.chunks * (kChunkGroups / kUnroll);
      const int64_t lines = step * chunk_bytes / 64;
      Ahead ahead = left > step ? Ahead(tile.panel + (k + step) * chunk_bytes, lines, requests)
                                : Ahead::next_panel(tile, lines, requests);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * tile.row_block;
        const int rows = static_cast<int>(
            tile.rows - row < tile.row_block ? tile.rows - row : int64_t{tile.row_block});
        strip.x = tile.x + block * tile.x_block_bytes + k * tile.row_block * kChunkBytes;
        if constexpr (Dot::kParts > 1) {
          expand(strip.x, tile.row_block, rows, strip.chunks, expanded);
          strip.x = expanded;
        }
        for (int column = 0; column < tile.width; column += strip_columns) {
          strip.w = tile.panel + k * chunk_bytes + column * 4;
          strip.c = static_cast<char*>(tile.c) + (row * kPanelColumns + column) * 4;
          if (few) {
            multiply_width<kPanelColumns / Dot::kLanes, Dot::kFewRows>(strip, tile.width, rows,
                                                                       ahead);
          } else {
            multiply_width<Dot::kVectors, Dot::kRows>(strip, tile.width - column, rows, ahead);
          }
        }
      }
    }
  }

 private:
  static constexpr int kStripColumns = Dot::kVectors * Dot::kLanes;
  static constexpr int64_t kExpandedChunk = int64_t{Dot::kRows} * kChunkBytes * Dot::kParts;
  static constexpr int64_t kStepChunks = Dot::kStepChunks;
  // Groups between two requests for memory; the loop's own work weighs little beside theirs.
  // (Where a group is many instructions anyway, GCC would run out of registers over more.)
  static constexpr int kUnroll = Dot::kParts == 1 ? 4 : 1;

  // What one pass over the registers' tile reads and writes.
  struct Strip {
    const char* w;
    int64_t w_row_bytes;
    const char* x;
    int64_t x_chunk_bytes;
    int64_t chunks;
    char* c;
    bool accumulate;
  };

  static void expand(const char* x, int row_block, int rows, int64_t chunks, char* to) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += row_block * kChunkBytes) {
      for (int r = 0; r < rows; ++r) {
        Dot::expand(x + r * kChunkBytes, to + r * kChunkBytes * Dot::kParts);
      }
      to += row_block * kChunkBytes * Dot::kParts;
    }
  }

  template <int Vectors, int Rows>
  static void multiply_width(const Strip& strip, int width, int rows, Ahead& ahead) {
    constexpr int kLess = Vectors - 16 / Dot::kLanes;  // widths are multiples of 16
    if constexpr (kLess > 0) {
      if (width < Vectors * Dot::kLanes) {
        return multiply_width<kLess, Rows>(strip, width, rows, ahead);
      }
    }
    multiply_rows<Vectors, Rows>(strip, rows, ahead);
  }

  template <int Vectors, int Rows>
  static void multiply_rows(const Strip& strip, int rows, Ahead& ahead) {
    if constexpr (Rows > 1) {
      if (rows < Rows) return multiply_rows<Vectors, Rows - 1>(strip, rows, ahead);
    }
    multiply<Vectors, Rows>(strip, ahead);
  }

  // The loops over constants are unrolled by order: the sums must be registers, not an array. On
  // its own, so that GCC has all registers for it: inlined, it was a sixth slower.
  template <int Vectors, int Rows>
  [[gnu::noinline]] static void multiply(const Strip& strip, Ahead& shared) {
    constexpr int kTogether = Dot::kTogether < Vectors ? Dot::kTogether : Vectors;
    typename Dot::Sum sums[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Dot::zero();
    }
    if (strip.accumulate) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          sums[r][v] = Dot::load(strip.c + (r * kPanelColumns + v * Dot::kLanes) * 4);
        }
      }
    }
    Ahead ahead = shared;
    const char* w = strip.w;
    const char* x = strip.x;
    const int64_t w_row_bytes = strip.w_row_bytes;
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, x += strip.x_chunk_bytes) {
      for (int groups = 0; groups < kChunkGroups; groups += kUnroll) {
        ahead.request();
        const char* x_groups = x + groups * 4;
#pragma GCC unroll 8
        for (int group = 0; group < kUnroll; ++group) {
#pragma GCC unroll 8
          for (int first = 0; first < Vectors; first += kTogether) {
            const char* from = w + group * w_row_bytes + first * Dot::kLanes * 4;
            typename Dot::Weights weights[kTogether];
#pragma GCC unroll 8
            for (int v = 0; v < kTogether; ++v) {
              if (first + v < Vectors) weights[v] = Dot::weights(from + v * Dot::kLanes * 4);
            }
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) {
              const char* at = x_groups + r * kChunkBytes * Dot::kParts + group * 4;
#pragma GCC unroll 8
              for (int v = 0; v < kTogether; ++v) {
                if (first + v < Vectors) {
                  sums[r][first + v] = Dot::dot(sums[r][first + v], at, weights[v]);
                }
              }
            }
          }
        }
        w += kUnroll * w_row_bytes;
      }
    }
    shared = ahead;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        Dot::store(strip.c + (r * kPanelColumns + v * Dot::kLanes) * 4, sums[r][v]);
      }
    }
  }
};

}  // namespace

#define MOEOPS_VECTOR_KERNEL(symbol, called, Dot, of_dtype, at_isa)     \
  extern const TileKernel symbol;                                       \
  const TileKernel symbol = {.name = called,                            \
                             .dtype = of_dtype,                         \
                             .isa = at_isa,                             \
                             .row_block = Dot::kRows,                   \
                             .tile_rows = VectorKernel<Dot>::kTileRows, \
                             .even_blocks = true,                       \
                             .run = VectorKernel<Dot>::run};

}  // namespace moeops::grouped_matmul_internal
