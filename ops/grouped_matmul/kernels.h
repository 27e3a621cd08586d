// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/packed_weights.h>

#include <cstdint>

namespace moeops::grouped_matmul_internal {

// Rows of a tile. On AVX-512 a tile of 6 x 64 keeps 24 accumulators, 4 registers of weights and a
// broadcast in 32 registers; it needs 2 FMA units x 4 cycles of latency = 8 chains at least.
inline constexpr int kTileRows = 6;
inline constexpr int kTileColumns = PackedWeights::kPanelColumns;

// c[r][j] += sum over k ascending of x[r][k] * panel[k][j], each element one chain of additions
// that starts from what c holds, so that a K cut into blocks gives the bits of one that was not.
struct Tile {
  const float* panel;  // [k][width]
  int width;           // 32, 48 or 64
  const float* x;      // [rows][k], rows x_stride apart
  int64_t x_stride;
  int rows;  // 1 to kTileRows
  int64_t k;
  float* c;  // [rows][kTileColumns]
};

// What the tiles of a call have in common.
struct TileForm {
  int64_t x_stride;
  int64_t k;       // of the whole problem; blocks of it are multiples of kBlockUnit, but the last
  int last_width;  // of the last panel; the others have kTileColumns
};

// K is cut in multiples of this: whole cache lines, and the unit of libxsmm's batch reduction.
inline constexpr int64_t kBlockUnit = 64;

struct TileKernel {
  const char* name;
  Isa isa;  // the least that it needs
  // Gets whatever `run` needs for such tiles, from the context's cache if it is there. False: this
  // kernel cannot do them, the next one must.
  bool (*prepare)(Context& ctx, const TileForm& form, const void** code);
  void (*run)(const void* code, const Tile& tile);
};

// Every kernel of kernels.inc, best first.
extern const TileKernel* const kTileKernels[];
extern const int kTileKernelCount;

// The best kernel that the context's ISA allows and that can be prepared.
Status choose_kernel(Context& ctx, const TileForm& form, const TileKernel** kernel,
                     const void** code);

}  // namespace moeops::grouped_matmul_internal
