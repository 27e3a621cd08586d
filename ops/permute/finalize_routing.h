// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

namespace moeops {

// Where row_index holds the row of token t's k-th expert.
enum class IndexLayout {
  kRow,     // [t * K + k]
  kColumn,  // [k * T + t]
};

enum class ExpandedRows {
  kFlat,     // [M, H]
  kDropPad,  // [E, C, H], M = E * C
};

// finalize_routing: the weighted sum of each token's rows, the way back from init_routing.
//
// SHAPES
//   expanded   [M, H] or [E, C, H]  f32 | bf16 | f16    rows may be strided
//   row_index  [T * K]  i32
//   scales     [T, K]   f32                   optional (absent: K = 1, scales 1)
//   bias       [E, H]   expanded's dtype      optional
//   expert_ids [T, K]   i32                   optional; bias needs them
//   skip1      [T, H]   expanded's dtype      optional
//   skip2      [T, H]   expanded's dtype      optional, together with skip1
//   out        [T, H]   expanded's dtype      rows may be strided
//
// DEFINITION
//   for t in 0 .. T:                          # in f32
//     acc = skip1[t] + skip2[t]               # absent: 0
//     for k in 0 .. K:                        # ascending
//       row = row_index[t * K + k]            # column: row_index[k * T + t]
//       if row == -1: skip the slot, bias included
//       acc = acc + scales[t][k] * (expanded[row] + bias[expert_ids[t][k]])
//     out[t] = round(acc)
//   Multiply and add round separately.
//
// REGULARITIES  K is 1 to 10: the call reads K rows, scattered, for each that it writes.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, a row outside [-1, M), with bias an expert id outside [0, E) of a slot that has
//   a row, skip2 without skip1, bias without expert_ids, out overlapping an input. out_of_memory:
//   scratch; nothing is written.
// EMPTY, NAN  All sizes may be 0. A NaN or infinity in a row of expanded reaches the token of that
//   row only.
// ALIASING, ALIGNMENT  out overlaps nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact: each element has one accumulator, k ascending.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeFinalizeRoutingV2. A dropped slot contributes nothing, bias included,
//   as in Ascend's bf16 kernel.
struct FinalizeRoutingArgs {
  ConstTensorView expanded;
  ConstTensorView row_index;
  ConstTensorView scales;
  ConstTensorView bias;
  ConstTensorView expert_ids;
  ConstTensorView skip1;
  ConstTensorView skip2;
  IndexLayout index_layout = IndexLayout::kRow;
  ExpandedRows rows = ExpandedRows::kFlat;
  TensorView out;
};

Status finalize_routing(Context& ctx, const FinalizeRoutingArgs& args);

}  // namespace moeops
