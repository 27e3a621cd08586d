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
//   kTogether              vectors of weights that they hold beside it
//   kStepChunks            chunks of the panel that all rows meet before the next ones: the more,
//                          the less often accumulators are stored and loaded again; one with
//                          several strips wants them to stay in L1
//   kParts                 1: dot() reads a row's 4 bytes as they are; more: it wants them taken
//                          apart, and expand(from, to) turns 64 bytes into kParts times 64
//   dot(sum, x, w)         x: where the row's group is; its next part is 64 bytes further
//   zero(), load(p), store(p, sum)
template <class Dot>
class VectorKernel {
 public:
  // Enough to use often what came from memory once.
  static constexpr int kTileRows = 8 * Dot::kRows;

  static void run(const void*, const Tile& tile) {
    const int64_t blocks = (tile.rows + Dot::kRows - 1) / Dot::kRows;
    const int64_t strips = (tile.width + kStripColumns - 1) / kStripColumns;
    Strip strip;
    strip.w_row_bytes = tile.width * 4;
    const int64_t chunk_bytes = kChunkGroups * strip.w_row_bytes;
    alignas(64) char expanded[Dot::kParts == 1 ? 64 : kStepChunks * kExpandedChunk];
    for (int64_t k = 0; k < tile.k_chunks; k += strip.chunks) {
      const int64_t left = tile.k_chunks - k;
      strip.chunks = left < kStepChunks ? left : kStepChunks;
      strip.accumulate = tile.accumulate || k > 0;
      // While a step is multiplied, the next one is on its way.
      const int64_t requests = blocks * strips * strip.chunks * (kChunkGroups / kUnroll);
      const int64_t lines = strip.chunks * chunk_bytes / 64;
      const int64_t ahead_of_end = k + kStepChunks - tile.k_chunks;
      Ahead ahead = ahead_of_end < 0
                        ? Ahead(tile.panel + (k + kStepChunks) * chunk_bytes, lines, requests)
                        : Ahead::next_panel(tile, ahead_of_end * chunk_bytes, lines, requests);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * Dot::kRows;
        const int rows =
            tile.rows - row < Dot::kRows ? static_cast<int>(tile.rows - row) : Dot::kRows;
        strip.x = tile.x + block * tile.x_block_bytes + k * kXChunk;
        if constexpr (Dot::kParts > 1) {
          expand(strip.x, rows, strip.chunks, expanded);
          strip.x = expanded;
        }
        for (int column = 0; column < tile.width; column += kStripColumns) {
          strip.w = tile.panel + k * chunk_bytes + column * 4;
          strip.c = static_cast<char*>(tile.c) + (row * kPanelColumns + column) * 4;
          multiply_width(strip, tile.width - column, rows, ahead);
        }
      }
    }
  }

 private:
  static constexpr int kStripColumns = Dot::kVectors * Dot::kLanes;
  static constexpr int64_t kXChunk = int64_t{Dot::kRows} * kChunkBytes;
  static constexpr int64_t kExpandedChunk = kXChunk * Dot::kParts;
  static constexpr int64_t kStepChunks = Dot::kStepChunks;
  // Groups between two requests for memory; the loop's own work weighs little beside theirs.
  // (Where a group is many instructions anyway, GCC would run out of registers over more.)
  static constexpr int kUnroll = Dot::kParts == 1 ? 4 : 1;

  // What one pass over the registers' tile reads and writes.
  struct Strip {
    const char* w;
    int64_t w_row_bytes;
    const char* x;
    int64_t chunks;
    char* c;
    bool accumulate;
  };

  static void expand(const char* x, int rows, int64_t chunks, char* to) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kXChunk, to += kExpandedChunk) {
      for (int r = 0; r < rows; ++r) {
        Dot::expand(x + r * kChunkBytes, to + r * kChunkBytes * Dot::kParts);
      }
    }
  }

  template <int Vectors = Dot::kVectors>
  static void multiply_width(const Strip& strip, int width, int rows, Ahead& ahead) {
    if constexpr (Vectors > 32 / Dot::kLanes) {
      if (width < Vectors * Dot::kLanes) {
        return multiply_width<Vectors - 16 / Dot::kLanes>(strip, width, rows, ahead);
      }
    }
    multiply_rows<Vectors>(strip, rows, ahead);
  }

  template <int Vectors, int Rows = Dot::kRows>
  static void multiply_rows(const Strip& strip, int rows, Ahead& ahead) {
    if constexpr (Rows > 1) {
      if (rows < Rows) return multiply_rows<Vectors, Rows - 1>(strip, rows, ahead);
    }
    multiply<Vectors, Rows>(strip, ahead);
  }

  // The loops over constants are unrolled by order: the sums must be registers, not an array.
  template <int Vectors, int Rows>
  static void multiply(const Strip& strip, Ahead& shared) {
    constexpr int kTogether = Dot::kTogether < Vectors ? Dot::kTogether : Vectors;
    typename Dot::Sum sums[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Dot::zero();
    }
    if (strip.accumulate) {
#pragma GCC unroll 8
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
    // A strip of the whole panel knows how far its rows are apart.
    constexpr bool kWholePanel = kStripColumns == kPanelColumns;
    const int64_t w_row_bytes = kWholePanel ? Vectors * Dot::kLanes * 4 : strip.w_row_bytes;
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, x += kExpandedChunk) {
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
#pragma GCC unroll 8
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
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        Dot::store(strip.c + (r * kPanelColumns + v * Dot::kLanes) * 4, sums[r][v]);
      }
    }
  }
};

}  // namespace

#define MOEOPS_VECTOR_KERNEL(symbol, name, Dot, dtype, isa) \
  extern const TileKernel symbol;                           \
  const TileKernel symbol = {name,                          \
                             dtype,                         \
                             isa,                           \
                             Dot::kRows,                    \
                             VectorKernel<Dot>::kTileRows,  \
                             nullptr,                       \
                             VectorKernel<Dot>::run,        \
                             nullptr,                       \
                             nullptr};

}  // namespace moeops::grouped_matmul_internal
