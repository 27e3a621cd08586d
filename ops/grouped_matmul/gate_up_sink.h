// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/swiglu.h>

#include "ops/grouped_matmul/epilogue.h"
#include "ops/grouped_matmul/tile_driver.h"
#include "quant/dynamic_quant/kernels.h"

namespace moeops::grouped_matmul_internal {

// What becomes of the first GEMM of an expert: sums -> SwiGLU -> h, and, where it is asked for, h
// quantised, row by row, by whoever finishes a row's last panel.
struct GateUp {
  const PackedWeights& weights;  // packed as gate and up
  ConstTensorView bias;          // [E, 2I], f32 or i32; or absent
  const float* x_scale;          // s8 weights; null: 1
  const int32_t* x_scale_index;  // row i's scale is x_scale[x_scale_index[i]]; null: x_scale[i]
  const SwigluParams& swiglu;
  char* h;  // [rows, I]
  DType h_dtype;
  // Not read where h is not quantised (scale is null).
  void* q;
  int64_t q_stride;  // in bytes
  bool q_is_u8;      // s8 + 128
  float* scale;      // [rows]
};

class GateUpSink : public TileSink {
 public:
  GateUpSink(Context& ctx, const GateUp& gate_up);
  void take(const TileResult& tile) override;
  void rows_complete(int64_t row, int64_t rows) override;

 protected:
  int64_t intermediate() const { return gate_up_.weights.n() / 2; }
  // Rows of a tile, after SwiGLU, to h, which is at the tile's first column.
  void gate_rows(const TileResult& tile, int first_row, int rows, char* h, int64_t h_stride,
                 DType h_dtype) const;
  static int64_t first_column(const TileResult& tile) { return tile.panel * (kPanelColumns / 2); }

 private:
  GateUp gate_up_;
  const EpilogueKernels& epilogue_;
  const dynamic_quant_internal::RowKernels& quantise_;
};

}  // namespace moeops::grouped_matmul_internal
