// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/swiglu.h>

namespace moeops {

// dequant_swiglu_quant: what stands between the two s8 GEMMs of an expert, for a first GEMM that
// gives its s32 sums.
//
// SHAPES
//   x            [M, 2I]  i32                 rows may be strided
//   weight_scale [E, 2I]  f32
//   x_scale      [M]      f32
//   group_list   [E]      i64                 counts
//   bias         [E, 2I]  i32 | f32           optional
//   quant_scale  [E, I]   f32                 optional
//   q            [M, I]   s8                  rows may be strided
//   scale        [M]      f32
//
// DEFINITION
//   row = 0
//   for e in 0 .. E:
//     for i in 0 .. group_list[e]:
//       v = f32(x[row] + bias_i32[e]) * weight_scale[e] * x_scale[row]    # left to right
//       v = v + bias_f32[e]                   # a bias is one or the other
//       h = swiglu(v) * quant_scale[e]        # quant_scale absent: h = swiglu(v)
//       q[row], scale[row] = dynamic_quant(h)
//       row += 1
//   q and scale are 0 from `row` to M.
//
// REGULARITIES  In a decode step most groups are empty and the others have 1 to 8 rows.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, an odd
//   width of x, sizes that disagree, a negative count, more rows than M, a limit that is negative
//   or NaN with swiglu_oai, an output overlapping an input or another output.
// EMPTY, NAN  M, I or E may be 0. A NaN or infinity in a row's scales, or one that the arithmetic
//   makes, gives that row q = 0 and scale = NaN.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  Each row depends on itself and on its expert alone, and is the same on every ISA.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN DequantSwigluQuant. x + bias_i32 wraps.
struct DequantSwigluQuantArgs {
  ConstTensorView x;
  ConstTensorView weight_scale;
  ConstTensorView x_scale;
  ConstTensorView group_list;
  ConstTensorView bias;
  ConstTensorView quant_scale;
  SwigluParams swiglu;
  TensorView q;
  TensorView scale;
};

Status dequant_swiglu_quant(Context& ctx, const DequantSwigluQuantArgs& args);

}  // namespace moeops
