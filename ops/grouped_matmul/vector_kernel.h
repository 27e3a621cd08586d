// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

// Internal to each ISA file that includes this: the linker must not pick one file's code for all.
namespace {

// Rows of a call: enough to use a part of a panel that came into L1 many times, few enough that
// their part stays beside it.
constexpr int kTileBlocks = 8;

// Makes the `run` of a vector kernel from a type Dot, which says what one instruction set does with
// the 4 bytes of a group:
//   Sum                    a vector of accumulators, kLanes columns
//   Weights                a vector of weights, as dot() wants them; weights(p) reads one
//   kRows x kVectors       the tile of accumulators that the registers hold
//   kTogether              vectors of weights that they hold beside it
//   kParts                 1: dot() reads a row's 4 bytes as they are; more: it wants them taken
//                          apart, and expand(from, to) turns 64 bytes into kParts times 64
//   dot(sum, x, w)         x: where the row's group is; its next part is 64 bytes further
//   zero(), load(p), store(p, sum)
template <class Dot>
class VectorKernel {
 public:
  static void run(const void*, const Tile& tile) {
    const int64_t blocks = (tile.rows + Dot::kRows - 1) / Dot::kRows;
    // A panel that is used more than once is read in parts that stay in L1, and one that is not
    // goes by from front to back.
    const bool one_pass = Dot::kParts == 1 && blocks == 1 && tile.width <= kStripColumns;
    const int64_t step = one_pass ? tile.k_chunks : kStepChunks;
    Ahead ahead(tile, blocks);
    alignas(64) char expanded[Dot::kParts == 1 ? 64 : kStepChunks * kExpandedChunk];
    for (int64_t k = 0; k < tile.k_chunks; k += step) {
      const int64_t chunks = tile.k_chunks - k < step ? tile.k_chunks - k : step;
      Strip strip;
      strip.w_row_bytes = tile.width * 4;
      strip.chunks = chunks;
      strip.accumulate = tile.accumulate || k > 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * Dot::kRows;
        const int rows =
            tile.rows - row < Dot::kRows ? static_cast<int>(tile.rows - row) : Dot::kRows;
        strip.x = tile.x + block * tile.x_block_bytes + k * kXChunk;
        if constexpr (Dot::kParts > 1) {
          expand(strip.x, rows, chunks, expanded);
          strip.x = expanded;
        }
        for (int column = 0; column < tile.width; column += kStripColumns) {
          strip.w = tile.panel + k * kChunkGroups * strip.w_row_bytes + column * 4;
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
  // 16 KiB of a panel: half of the smallest L1 there is.
  static constexpr int64_t kStepChunks = 4;

  // What one pass over the registers' tile reads and writes.
  struct Strip {
    const char* w;
    int64_t w_row_bytes;
    const char* x;
    int64_t chunks;
    char* c;
    bool accumulate;
  };

  // Where the next request to memory goes: steps of at most a line, so that none is left out.
  struct Ahead {
    Ahead(const Tile& tile, int64_t blocks) : cursor(tile.panel) {
      const int64_t strips = (tile.width + kStripColumns - 1) / kStripColumns;
      const int64_t groups = blocks * strips * tile.k_chunks * kChunkGroups;
      if (tile.prefetch == nullptr || tile.prefetch_lines <= 0) return;
      cursor = tile.prefetch;
      dense = tile.prefetch_lines > groups;
      const int64_t requests = dense ? groups * kDense : groups;
      step = (tile.prefetch_lines * 64 + requests - 1) / requests;
      if (step > 64) step = 64;
    }
    template <int Count>
    void request() {
      for (int i = 0; i < Count; ++i) {
        __builtin_prefetch(cursor, 0, 2);
        cursor += step;
      }
    }
    static constexpr int kDense = 4;  // as many lines as a group of a panel has
    const char* cursor;
    int64_t step = 0;
    bool dense = false;
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
    if (ahead.dense) return multiply_rows<Vectors, Ahead::kDense>(strip, rows, ahead);
    return multiply_rows<Vectors, 1>(strip, rows, ahead);
  }

  template <int Vectors, int Requests, int Rows = Dot::kRows>
  static void multiply_rows(const Strip& strip, int rows, Ahead& ahead) {
    if constexpr (Rows > 1) {
      if (rows < Rows) return multiply_rows<Vectors, Requests, Rows - 1>(strip, rows, ahead);
    }
    multiply<Vectors, Requests, Rows>(strip, ahead);
  }

  template <int Vectors, int Requests, int Rows>
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
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, x += kExpandedChunk) {
      for (int group = 0; group < kChunkGroups; ++group, w += strip.w_row_bytes) {
        ahead.template request<Requests>();
#pragma GCC unroll 8
        for (int first = 0; first < Vectors; first += kTogether) {
          typename Dot::Weights weights[kTogether];
#pragma GCC unroll 8
          for (int v = 0; v < kTogether; ++v) {
            if (first + v < Vectors) weights[v] = Dot::weights(w + (first + v) * Dot::kLanes * 4);
          }
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            const char* at = x + r * kChunkBytes * Dot::kParts + group * 4;
#pragma GCC unroll 8
            for (int v = 0; v < kTogether; ++v) {
              if (first + v < Vectors)
                sums[r][first + v] = Dot::dot(sums[r][first + v], at, weights[v]);
            }
          }
        }
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

#define MOEOPS_VECTOR_KERNEL(symbol, name, Dot, dtype, isa)                                        \
  extern const TileKernel symbol;                                                                  \
  const TileKernel symbol = {                                                                      \
      name,    dtype,  isa, Dot::kRows, Dot::kRows * kTileBlocks, nullptr, VectorKernel<Dot>::run, \
      nullptr, nullptr};

}  // namespace moeops::grouped_matmul_internal
