// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

bool prepare(Context&, const TileForm&, const void** code) {
  *code = nullptr;
  return true;
}

// Rows x 16 columns: 12 accumulators, 2 registers of weights and a broadcast of the 16 there are.
template <int Rows>
void run_columns(const Tile& tile, int column) {
  __m256 acc[Rows][2];
  for (int r = 0; r < Rows; ++r) {
    acc[r][0] = _mm256_loadu_ps(tile.c + r * kTileColumns + column);
    acc[r][1] = _mm256_loadu_ps(tile.c + r * kTileColumns + column + 8);
  }
  const float* w = tile.panel + column;
  for (int64_t k = 0; k < tile.k; ++k, w += tile.width) {
    const __m256 w0 = _mm256_loadu_ps(w);
    const __m256 w1 = _mm256_loadu_ps(w + 8);
    for (int r = 0; r < Rows; ++r) {
      const __m256 x = _mm256_broadcast_ss(tile.x + r * tile.x_stride + k);
      acc[r][0] = _mm256_fmadd_ps(x, w0, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(x, w1, acc[r][1]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    _mm256_storeu_ps(tile.c + r * kTileColumns + column, acc[r][0]);
    _mm256_storeu_ps(tile.c + r * kTileColumns + column + 8, acc[r][1]);
  }
}

template <int Rows>
void run_rows(const Tile& tile) {
  for (int column = 0; column < tile.width; column += 16) run_columns<Rows>(tile, column);
}

void run(const void*, const Tile& tile) {
  static_assert(kTileRows == 6);
  switch (tile.rows) {
    case 1:
      return run_rows<1>(tile);
    case 2:
      return run_rows<2>(tile);
    case 3:
      return run_rows<3>(tile);
    case 4:
      return run_rows<4>(tile);
    case 5:
      return run_rows<5>(tile);
    default:
      return run_rows<6>(tile);
  }
}

}  // namespace

extern const TileKernel kernel_f32_avx2;
const TileKernel kernel_f32_avx2 = {"avx2", Isa::kAvx2, prepare, run};

}  // namespace moeops::grouped_matmul_internal
