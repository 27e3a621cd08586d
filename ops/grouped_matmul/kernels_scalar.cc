// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/core/dtype.h>

#include <cstring>

#include "ops/grouped_matmul/kernels.h"

namespace moeops::grouped_matmul_internal {

namespace {

// A group of each dtype: `sum` plus x times w, k ascending, each operation rounded.
struct F32 {
  using Sum = float;
  static constexpr int kElements = 1;
  using Element = float;
  static Sum add(Sum sum, Element x, Element w) { return sum + x * w; }
};
struct Bf16 {
  using Sum = float;
  static constexpr int kElements = 2;
  using Element = bf16;
  static Sum add(Sum sum, Element x, Element w) { return sum + to_f32(x) * to_f32(w); }
};
struct S8 {
  using Sum = int32_t;
  static constexpr int kElements = 4;
  using Element = int8_t;
  static Sum add(Sum sum, Element x, Element w) { return sum + static_cast<uint8_t>(x) * w; }
};

template <class Dot>
void run(const void*, const Tile& tile) {
  using Element = typename Dot::Element;
  auto* c = static_cast<typename Dot::Sum*>(tile.c);
  for (int r = 0; r < tile.rows; ++r, c += kPanelColumns) {
    if (!tile.accumulate) std::memset(c, 0, static_cast<size_t>(tile.width) * sizeof(*c));
    const auto* w = reinterpret_cast<const Element*>(tile.panel);
    const auto* x = reinterpret_cast<const Element*>(tile.x + r * tile.x_block_bytes);
    for (int64_t k = 0; k < tile.k_chunks * kChunkGroups; ++k, x += Dot::kElements) {
      for (int j = 0; j < tile.width; ++j, w += Dot::kElements) {
        for (int i = 0; i < Dot::kElements; ++i) c[j] = Dot::add(c[j], x[i], w[i]);
      }
    }
  }
}

}  // namespace

#define MOEOPS_SCALAR_KERNEL(symbol, Dot, of_dtype) \
  extern const TileKernel symbol;                   \
  const TileKernel symbol = {.name = "scalar",      \
                             .dtype = of_dtype,     \
                             .isa = Isa::kScalar,   \
                             .row_block = 1,        \
                             .tile_rows = 8,        \
                             .run = run<Dot>};

MOEOPS_SCALAR_KERNEL(kernel_f32_scalar, F32, DType::kF32)
MOEOPS_SCALAR_KERNEL(kernel_bf16_scalar, Bf16, DType::kBf16)
MOEOPS_SCALAR_KERNEL(kernel_s8_scalar, S8, DType::kS8)

}  // namespace moeops::grouped_matmul_internal
