// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/packed_weights.h>

namespace moeops {

// w8a8_linear: a linear layer with s8 weights, whose input is quantised on the fly.
//
// SHAPES
//   x       [M, K]  f32 | bf16 | f16          rows may be strided
//   weights [N, K]  s8                        packed (optimised) or plain (reference), with
//                                             w_scale [N], or [1] for all channels
//   bias    [N]     i32 | f32                 optional
//   y       [M, N]  f32 | bf16 | f16          rows may be strided
//
// DEFINITION
//   q, x_scale = dynamic_quant(x)
//   y = quant_matmul(q, weights, x_scale, bias), rounded to y's dtype
//
// REGULARITIES  As quant_matmul. A decode step has one row a sequence: the call streams weights.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, K > 65536, y overlapping an input.
// EMPTY, NAN  M, N or K may be 0 (K = 0: acc = 0). A NaN or infinity in a row of x makes that row
//   of y NaN, and no other.
// ALIASING, ALIGNMENT  y overlaps nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact.
// THREAD-SAFETY  One call at a time per context; weights are only read.
// SEMANTICS  MindIE's dynamic W8A8 linear: Ascend CANN DynamicQuant, then QuantMatmul.
struct W8a8LinearArgs {
  ConstTensorView x;
  ConstTensorView bias;
  TensorView y;
};

// weights: a pack of one expert.
Status w8a8_linear(Context& ctx, const PackedWeights& weights, const W8a8LinearArgs& args);

}  // namespace moeops
