// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/packed_weights.h>

namespace moeops {

// quant_matmul: one s8 matrix product with its scales, a grouped_matmul of one group.
//
// SHAPES
//   x       [M, K]  s8                        rows may be strided
//   weights [N, K]  s8                        packed (optimised) or plain (reference), with
//                                             w_scale [N], or [1] for all channels
//   x_scale [M]     f32                       optional (absent: 1)
//   bias    [N]     i32 | f32                 optional
//   offset  [1]     f32                       y s8 only, optional (absent: 0)
//   y       [M, N]  f32 | bf16 | s8 | i32     rows may be strided
//
// DEFINITION
//   acc = sum over k of x[m][k] * w[n][k]     # exact in s32, K <= 65536
//   y i32: acc + bias_i32[n], wrapping; no scales
//   else:  v = f32(acc + bias_i32[n]) * w_scale[n] * x_scale[m]           # left to right
//          v = v + bias_f32[n]                # a bias is one or the other
//          y[m][n] = v rounded to f32 or bf16, or clamp(rint(v + offset), -128, 127), NaN -> 0
//
// REGULARITIES  Projections of attention and dense layers: M is tokens, N and K 1024 to 16384.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, K > 65536, with y i32 a scale or a bias in f32, without it no w_scale, offset
//   when y is not s8, y overlapping an input.
// EMPTY, NAN  M, N or K may be 0 (K = 0: acc = 0). A NaN or infinity in x_scale[m] reaches row m
//   only.
// ALIASING, ALIGNMENT  y overlaps nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact.
// THREAD-SAFETY  One call at a time per context; weights are only read.
// SEMANTICS  Ascend CANN QuantMatmul.
struct QuantMatmulArgs {
  ConstTensorView x;
  ConstTensorView x_scale;
  ConstTensorView bias;
  ConstTensorView offset;
  TensorView y;
};

// weights: a pack of one expert.
Status quant_matmul(Context& ctx, const PackedWeights& weights, const QuantMatmulArgs& args);

}  // namespace moeops
