// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/params.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/packed_weights.h>

namespace moeops {

// What happens to the rows of y that no group covers.
enum class Uncovered { kZero, kKeep };

// grouped_matmul: each group of consecutive rows of x times the weights of its expert.
//
// SHAPES
//   x          [M, K]   f32 | bf16 | s8            rows may be strided
//   weights    [E, N, K]                           packed (optimised) or plain (reference)
//   group_list [E] or [G, 2] i64                   see ListType
//   bias       [E, N]   f32, or i32 with s8        optional
//   x_scale    [M]      f32                        s8 only, optional (absent: 1)
//   offset     [1]      f32                        s8 -> s8 only, optional (absent: 0)
//   y          [M, N]   f32 | bf16 | i32 | s8      rows may be strided
//
// DEFINITION
//   row = 0
//   for g in groups:                               # in the order of group_list
//     for i in 0 .. rows(g):
//       for n in 0 .. N:
//         acc = sum over k ascending of x[row][k] * w[expert(g)][n][k]
//         y[row][n] = epilogue(acc)
//       row += 1
//   rows of y from `row` to M are zero, or untouched with Uncovered::kKeep
//
//   f32, bf16:  epilogue(acc) = round(act(acc + bias)); (x, y) is (f32, f32), (bf16, f32) or
//               (bf16, bf16); the accumulator is f32.
//   s8:         acc is exact in s32, K <= 65536.
//               y i32: acc + bias (i32), wrapping; no scales, no activation
//               y f32 | bf16 | s8: act(f32(acc + bias_i32) * w_scale[e][n] * x_scale[row]),
//               multiplied left to right, a bias in f32 added after the scales instead; then
//               rounded, or for s8 clamp(rint(v + offset), -128, 127), NaN -> 0.
//
// REGULARITIES  In a decode step most groups are empty and the others have 1 to 8 rows: the call
//   streams weights. In prefill they have 32 and more: it multiplies. Routing is never even.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, dtypes that no line above names, a negative count, a decreasing cumsum, an
//   expert outside [0, E), more rows than M, K > 65536 in s8, y overlapping an input.
//   out_of_memory: scratch; nothing is written.
// EMPTY, NAN  M, N, E or K may be 0 (K = 0: acc = 0). A NaN or infinity in a row of x reaches that
//   row of y only; one in w[e][n] the column n of e's rows.
// ALIASING, ALIGNMENT  y overlaps nothing. Views need their element's alignment; 64 bytes is
//   fastest.
// DETERMINISM  Each element of y has one accumulator, k ascending: its bits depend neither on the
//   number of workers nor on which rows come together. On the scalar ISA multiply and add round
//   separately; above it they are one fma.
// THREAD-SAFETY  One call at a time per context; weights are only read.
// SEMANTICS  Ascend CANN GroupedMatmul. Where its documents leave the rows past the last group
//   open, they are zero here.
struct GroupedMatmulArgs {
  ConstTensorView x;
  ConstTensorView group_list;
  ListType list_type = ListType::kCount;
  ConstTensorView bias;
  ConstTensorView x_scale;
  ConstTensorView offset;
  Activation activation = Activation::kNone;
  Uncovered uncovered = Uncovered::kZero;
  TensorView y;
};

Status grouped_matmul(Context& ctx, const PackedWeights& weights, const GroupedMatmulArgs& args);

}  // namespace moeops
