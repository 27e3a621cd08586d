// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_matmul/gate_up_sink.h"

#include <algorithm>

namespace moeops::grouped_matmul_internal {

GateUpSink::GateUpSink(Context& ctx, const GateUp& gate_up)
    : gate_up_(gate_up),
      epilogue_(epilogue_kernels(ctx)),
      quantise_(dynamic_quant_internal::row_kernels(ctx.isa())) {}

void GateUpSink::take(const TileResult& tile) {
  const int64_t h_stride = intermediate() * size_of(gate_up_.h_dtype);
  char* h = gate_up_.h + tile.row * h_stride + first_column(tile) * size_of(gate_up_.h_dtype);
  gate_rows(tile, 0, tile.rows, h, h_stride, gate_up_.h_dtype);
}

void GateUpSink::gate_rows(const TileResult& tile, int first_row, int rows, char* h,
                           int64_t h_stride, DType h_dtype) const {
  alignas(64) int32_t room[kPanelColumns];
  const ColumnConstants constants =
      column_constants(gate_up_.weights, tile.expert, tile.panel, gate_up_.bias, room);
  const int columns =
      static_cast<int>(std::min<int64_t>(intermediate() - first_column(tile), tile.width / 2));
  const bool gathered = gate_up_.x_scale != nullptr && gate_up_.x_scale_index != nullptr;
  constexpr int kTogether = 128;
  float scales[kTogether];
  for (int r = first_row; r < first_row + rows;) {
    const int64_t row = tile.row + r;
    const int together = gathered ? std::min(first_row + rows - r, kTogether) : rows;
    const float* x_scale = gate_up_.x_scale != nullptr ? gate_up_.x_scale + row : nullptr;
    if (gathered) {
      for (int i = 0; i < together; ++i) {
        scales[i] = gate_up_.x_scale[gate_up_.x_scale_index[row + i]];
      }
      x_scale = scales;
    }
    const auto* c = static_cast<const int32_t*>(tile.c) + r * kPanelColumns;
    epilogue_.gate_up(c, together, tile.width, columns, constants, x_scale, gate_up_.swiglu, h,
                      h_stride, h_dtype);
    h += together * h_stride;
    r += together;
  }
}

void GateUpSink::rows_complete(int64_t row, int64_t rows) {
  if (gate_up_.scale == nullptr) return;
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
