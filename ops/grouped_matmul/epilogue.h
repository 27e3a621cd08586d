// SPDX-License-Identifier: Apache-2.0
#pragma once

// What happens to a tile's sums while they are in L1. Each step is a loop over
// [rows][kPanelColumns] with vectors of one ISA.

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/params.h>
#include <moeops/ops/packed_weights.h>
#include <moeops/ops/swiglu.h>

#include <cstdint>

namespace moeops::grouped_matmul_internal {

// The columns' constants, in panel order and padded to the panel's width.
struct ColumnConstants {
  const int32_t* sums = nullptr;      // s8 only: of the column's weights
  const int32_t* bias_i32 = nullptr;  // may be null, as all below
  const float* scale = nullptr;
  const float* bias = nullptr;
};

// Where values go: rows `stride` bytes apart, rounded to f32, bf16 or f16, or to s8 as
// clamp(rint(v + offset), -128, 127), NaN -> 0.
struct Output {
  char* y;
  int64_t stride;
  DType dtype;
  float offset = 0.0f;
  // Past the caches where y's alignment allows, which saves reading lines that are to be
  // overwritten; visible to other threads after fence().
  bool streams = false;
};

struct EpilogueKernels {
  Isa isa;
  // s32 sums of (x + 128) * w to those of x * w, plus the integer bias; wrapping. In place.
  void (*to_exact)(int32_t* c, int rows, int width, const ColumnConstants& columns);
  // Values: f32 sums plus the bias; s32 ones made exact, then as f32 times scale times x_scale[r]
  // (null: 1), from left to right, plus the bias. In place.
  void (*to_values)(void* c, int rows, int width, const ColumnConstants& columns,
                    const float* x_scale);
  void (*activate)(float* c, int rows, int width, Activation activation);
  // The values of the first `columns` columns to the output.
  void (*store)(const void* c, int rows, int columns, const ColumnConstants& constants,
                const float* x_scale, const Output& output);
  void (*fence)();
  // h[r][j] = act(v[r][j]) * v[r][width / 2 + j] for the first `columns` of them, as f32, or
  // rounded to bf16; rows h_stride bytes apart; v: the values.
  void (*gate_up)(const void* c, int rows, int width, int columns, const ColumnConstants& constants,
                  const float* x_scale, const SwigluParams& params, char* h, int64_t h_stride,
                  DType h_dtype);
};

// Whether an output is too large to stay in the caches until it is read.
inline bool outgrows_caches(int64_t rows, int64_t row_bytes) {
  int64_t bytes = 0;
  return __builtin_mul_overflow(rows, row_bytes, &bytes) || bytes > int64_t{4} * machine().l2_bytes;
}

// Those of the best ISA that the context allows.
const EpilogueKernels& epilogue_kernels(const Context& ctx);

// The constants of an expert's panel: what the pack has, and its part of bias [E, N], f32 or i32,
// or absent. `room`, kPanelColumns of 4 bytes on a line of its own, takes the bias in the panel's
// order of channels; it must outlive the result.
ColumnConstants column_constants(const PackedWeights& weights, int64_t expert, int64_t panel,
                                 const ConstTensorView& bias, int32_t* room);

}  // namespace moeops::grouped_matmul_internal
