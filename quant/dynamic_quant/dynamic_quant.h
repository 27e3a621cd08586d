// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

namespace moeops {

// dynamic_quant: each row to s8 with a scale of its own.
//
// SHAPES
//   x          [M, H]  f32 | bf16 | f16       rows may be strided
//   smooth     [H]     f32                    optional; with group_list [G, H], one row a group
//   group_list [G]     i64                    optional, cumsum; its last entry is M
//   q          [M, H]  s8                     rows may be strided
//   scale      [M]     f32
//   offset     [M]     f32                    asymmetric only, and then required
//
// DEFINITION
//   for i in 0 .. M:                          # all in f32
//     v = x[i] * smooth                       # smooth absent: v = x[i]
//     if any v is not finite:
//       scale[i] = offset[i] = NaN; q[i] = 0
//     else if not asymmetric:
//       a = max |v|
//       scale[i] = a / 127
//       q[i] = clamp(rint(v * (127 / a)), -127, 127)
//       if a < 1e-36: scale[i] = 0; q[i] = 0
//     else:
//       scale[i] = max((max v - min v) / 255, 1e-12)
//       offset[i] = 127 - max v / scale[i]
//       q[i] = clamp(rint(v / scale[i] + offset[i]), -128, 127)       # NaN -> 0
//   rint rounds half to even. v is q * scale, or (q - offset) * scale.
//
// REGULARITIES  M is tokens or expanded rows, H 2048 to 8192: the call streams x. A few channels
//   are 10 to 100 times larger than the rest; smooth evens them out.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, a decreasing or negative group_list, one whose last entry is not M, group_list
//   without smooth, offset without asymmetric, an output overlapping an input or another output.
// EMPTY, NAN  M, H or G may be 0 (H = 0: as for a row of zeros). A NaN or infinity, in x or made by
//   smooth, makes that row NaN once it is dequantised, and no other.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact on every ISA: the result depends on the row alone.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN DynamicQuant.
struct DynamicQuantArgs {
  ConstTensorView x;
  ConstTensorView smooth;
  ConstTensorView group_list;
  bool asymmetric = false;
  TensorView q;
  TensorView scale;
  TensorView offset;
};

Status dynamic_quant(Context& ctx, const DynamicQuantArgs& args);

}  // namespace moeops
