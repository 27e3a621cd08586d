// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/dtype.h>
#include <moeops/ops/core/machine.h>
#include <moeops/ops/swiglu.h>

#include <cstdint>

namespace moeops::swiglu_internal {

// y[0 .. I) of one row x[0 .. 2I), both of the dtype that the function was chosen for. With a
// `next`, y goes past the caches, to be ordered by fence(), and `next`, the row of x to come, is
// brought near meanwhile. Nothing needs alignment.
using SwigluRow = void (*)(const SwigluParams& params, const void* x, int64_t I, void* y,
                           const void* next);

// One row of dequant_swiglu_quant, up to its quantisation.
struct DequantRow {
  const int32_t* x;           // [2I]
  const float* weight_scale;  // [2I]
  float x_scale;
  const int32_t* bias_i32;  // [2I], or null
  const float* bias_f32;    // [2I], or null
};

// An ISA's functions. All ISAs give the same bits.
struct RowKernels {
  Isa isa;  // the least that they need
  SwigluRow f32, bf16, f16;
  // With a `next`, the row of x to come is brought near meanwhile.
  void (*dequant)(const SwigluParams& params, const DequantRow& row, int64_t I, float* h,
                  const void* next);
  void (*fence)();

  SwigluRow of(DType x) const { return x == DType::kF32 ? f32 : x == DType::kBf16 ? bf16 : f16; }
};

// Every row of kernels.inc, best first.
extern const RowKernels* const kRowKernels[];
extern const int kRowKernelsCount;

// The best that `isa` allows.
const RowKernels& row_kernels(Isa isa);

}  // namespace moeops::swiglu_internal
