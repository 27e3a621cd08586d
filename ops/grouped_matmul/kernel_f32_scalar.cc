// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

bool prepare(Context&, const TileForm&, const void** code) {
  *code = nullptr;
  return true;
}

void run(const void*, const Tile& tile) {
  for (int r = 0; r < tile.rows; ++r) {
    const float* x = tile.x + r * tile.x_stride;
    float* c = tile.c + r * kTileColumns;
    for (int64_t k = 0; k < tile.k; ++k) {
      const float* w = tile.panel + k * tile.width;
      for (int j = 0; j < tile.width; ++j) c[j] += x[k] * w[j];
    }
  }
}

}  // namespace

extern const TileKernel kernel_f32_scalar;
const TileKernel kernel_f32_scalar = {"scalar", Isa::kScalar, prepare, run};

}  // namespace moeops::grouped_matmul_internal
