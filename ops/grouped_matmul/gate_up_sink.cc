// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/gate_up_sink.h"

#include <algorithm>

namespace moeops::grouped_matmul_internal {

GateUpSink::GateUpSink(Context& ctx, const GateUp& gate_up)
    : gate_up_(gate_up),
      epilogue_(epilogue_kernels(ctx)),
      quantise_(dynamic_quant_internal::row_kernels(ctx.isa())) {}

void GateUpSink::take(const TileResult& tile) {
  const PackedWeights& weights = gate_up_.weights;
  auto* c = static_cast<float*>(tile.c);
  alignas(64) int32_t room[kPanelColumns];
  const ColumnConstants constants =
      column_constants(weights, tile.expert, tile.panel, gate_up_.bias, room);
  if (gate_up_.x_scale != nullptr && gate_up_.x_scale_index != nullptr) {
    constexpr int kTogether = 32;
    float scales[kTogether];
    for (int r = 0; r < tile.rows; r += kTogether) {
      const int rows = std::min(tile.rows - r, kTogether);
      for (int i = 0; i < rows; ++i) {
        scales[i] = gate_up_.x_scale[gate_up_.x_scale_index[tile.row + r + i]];
      }
      epilogue_.to_values(c + r * kPanelColumns, rows, tile.width, constants, scales);
    }
  } else if (constants.sums != nullptr || constants.bias != nullptr) {
    epilogue_.to_values(c, tile.rows, tile.width, constants,
                        gate_up_.x_scale != nullptr ? gate_up_.x_scale + tile.row : nullptr);
  }
  const int64_t element = size_of(gate_up_.h_dtype);
  const int64_t h_stride = intermediate() * element;
  gate_rows(tile, 0, tile.rows, gate_up_.h + tile.row * h_stride + first_column(tile) * element,
            h_stride, gate_up_.h_dtype);
}

void GateUpSink::gate_rows(const TileResult& tile, int first_row, int rows, char* h,
                           int64_t h_stride, DType h_dtype) const {
  const int columns =
      static_cast<int>(std::min<int64_t>(intermediate() - first_column(tile), tile.width / 2));
  epilogue_.gate_up(static_cast<const float*>(tile.c) + first_row * kPanelColumns, rows, tile.width,
                    columns, gate_up_.swiglu, h, h_stride, h_dtype);
}

void GateUpSink::rows_complete(int64_t row, int64_t rows) {
  const int64_t I = intermediate();
  for (int64_t i = row; i < row + rows; ++i) {
    const auto* h = reinterpret_cast<const float*>(gate_up_.h) + i * I;
    void* q = offset(static_cast<char*>(gate_up_.q), i * gate_up_.q_stride);
    if (gate_up_.q_is_u8) {
      quantise_.u8.f32(h, nullptr, I, static_cast<uint8_t*>(q), gate_up_.scale + i);
    } else {
      quantise_.s8.f32(h, nullptr, I, static_cast<int8_t*>(q), gate_up_.scale + i);
    }
  }
}

}  // namespace moeops::grouped_matmul_internal
