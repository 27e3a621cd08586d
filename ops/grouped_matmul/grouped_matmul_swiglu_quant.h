// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/params.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/packed_weights.h>
#include <moeops/ops/swiglu.h>

namespace moeops {

// grouped_matmul_swiglu_quant: the first half of w8a8 experts in one call: gate and up GEMM,
// SwiGLU, quantisation for the second GEMM.
//
// SHAPES
//   x          [M, K]      s8                 rows may be strided
//   weights    [E, 2I, K]  s8                 packed (optimised) or plain (reference), with w_scale
//   group_list [E] or [G, 2] i64              see ListType
//   bias       [E, 2I]     i32 | f32          optional
//   x_scale    [M]         f32                optional (absent: 1)
//   q          [M, I]      s8                 rows may be strided
//   scale      [M]         f32
//
// DEFINITION
//   v = grouped_matmul(x, weights, group_list, bias, x_scale)             # f32 [M, 2I]
//   for each row that a group covers:
//     q[row], scale[row] = dynamic_quant(swiglu(v[row]))
//   q and scale of the other rows are 0.
//
// REGULARITIES  As grouped_matmul; 2I is 1536 to 28672.
//
// ERRORS  invalid_argument, found before anything is written: those of the s8 grouped_matmul, an
//   odd number of weight rows, a limit that is negative or NaN with swiglu_oai, an output
//   overlapping an input or another output.
// EMPTY, NAN  M, I, E or K may be 0 (K = 0: the sums are 0). A NaN or infinity in a row's scales
//   gives that row q = 0 and scale = NaN; one in w_scale or bias each row of that expert.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  As grouped_matmul: neither the number of workers nor which rows come together.
// THREAD-SAFETY  One call at a time per context; weights are only read.
// SEMANTICS  Ascend CANN GroupedMatmulSwigluQuant, and besides it a bias, every form of swiglu and
//   every ListType.
struct GroupedMatmulSwigluQuantArgs {
  ConstTensorView x;
  ConstTensorView group_list;
  ListType list_type = ListType::kCount;
  ConstTensorView bias;
  ConstTensorView x_scale;
  SwigluParams swiglu;
  TensorView q;
  TensorView scale;
};

Status grouped_matmul_swiglu_quant(Context& ctx, const PackedWeights& weights,
                                   const GroupedMatmulSwigluQuantArgs& args);

}  // namespace moeops
