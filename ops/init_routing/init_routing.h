// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

#include <optional>

namespace moeops {

enum class RoutingMode {
  kDropless,  // the rows of all experts, one after the other
  kDropPad,   // a fixed number of rows for each expert
};

// What expert_tokens says of each expert.
enum class ExpertCounts { kNone, kCumsum, kCount, kKeyValue };

enum class RowIndexType {
  kGather,   // the row of each slot
  kScatter,  // the slot of each row
};

enum class RoutingQuant { kNone, kStatic, kDynamic };

struct ExpertRange {
  int64_t begin;
  int64_t end;
};

// init_routing: the tokens in the order of their experts, so that each expert's are together.
//
// SHAPES  N = T * K slots, slot t * K + k is the k-th choice of token t; [s, e) is expert_range
//   x               [T, H]     f32 | bf16 | f16     rows may be strided
//   expert_ids      [T, K]     i32
//   scale           [T]        f32                  quant none: optional
//                   [1]        f32                  static: required
//                   [e - s, H] or [1, H]  f32       dynamic: optional, smooth factors
//   offset          [1]        f32                  static: required; else absent
//   expanded_x      [rows, H]  x's dtype, or s8 with quant; rows may be strided
//                   dropless:  any number of rows that R fits in; the ones from R on stay untouched
//                   drop_pad:  [E, C, H]
//   expanded_scale  [rows], drop_pad [E * C]  f32   where there is one: dynamic, or none with scale
//   row_index       [N]        i32
//   expert_tokens   [e - s], key_value [e - s, 2]  i64    absent with counts none
//   valid_rows, dropped_rows  [1]  i64              optional
//
// DEFINITION
//   kept = the slots whose expert is in [s, e), by (expert, slot) ascending; A of them
//
//   dropless:
//     R = active_rows == 0 ? A : min(active_rows, A)
//     row i of R belongs to slot kept[i]
//     gather:   row_index[kept[i]] = i, -1 for all other slots
//     scatter:  row_index[i] = kept[i], -1 from R on
//     valid_rows = R; dropped_rows = A - R
//   drop_pad:
//     row e * C + j belongs to the j-th kept slot of expert e, j < C; other rows are 0
//     row_index[slot] = e * C + j, -1 for slots without a row
//     valid_rows = rows that belong to a slot; dropped_rows = N - valid_rows
//
//   a row of token t = slot / K, with the expert id:
//     none:     expanded_x = x[t]; expanded_scale = scale[t]
//     static:   expanded_x = clamp(rint(x[t] * scale + offset), -128, 127)       # NaN -> 0
//     dynamic:  expanded_x, expanded_scale = dynamic_quant(x[t] * scale[id - s])
//
//   expert_tokens, of all kept slots, whether they have a row or not:
//     count:      [id - s] = slots of id
//     cumsum:     [id - s] = slots of s to id
//     key_value:  (id, slots of id) for the ids that have any, ascending; then zeros
//
//   allow_masked: the ids -1 and E mask a slot: it belongs to no expert.
//
// REGULARITIES  It reads each token once and writes it K times, 4 to 10. A rank of an expert
//   parallel engine has a narrow expert_range, and most slots are not its own.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, a view that the parameters leave no use for, an expert_range outside [0, E), an
//   expert id outside [0, E) that does not mask, a negative active_rows, fewer rows in expanded_x
//   than R, an index that would not fit in i32, an output overlapping an input or another output;
//   with drop_pad a capacity outside [1, max(T, 1)], an expert_range other than [0, E), scatter.
//   out_of_memory: scratch; nothing is written.
// EMPTY, NAN  T, K, H, E and the range may be empty. A NaN or infinity in a token reaches the rows
//   of that token only.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact; the sort is stable.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeInitRoutingV3. Where it leaves positions of row_index dangling past the
//   cutoff, they are -1 here, with gather and scatter, so that none points outside the rows. Counts
//   are the ones before the cutoff; those of key_value, too, cover the range in e - s pairs.
//   active_rows counts rows, not tokens; drop_pad does not read it, nor dropless capacity.
struct InitRoutingArgs {
  ConstTensorView x;
  ConstTensorView expert_ids;
  ConstTensorView scale;
  ConstTensorView offset;
  int64_t expert_count = 0;                 // E
  std::optional<ExpertRange> expert_range;  // absent: [0, E)
  int64_t active_rows = 0;                  // 0: all
  RoutingMode mode = RoutingMode::kDropless;
  int64_t capacity = 0;  // C
  ExpertCounts counts = ExpertCounts::kNone;
  RowIndexType row_index_type = RowIndexType::kGather;
  RoutingQuant quant = RoutingQuant::kNone;
  bool allow_masked = false;
  TensorView expanded_x;
  TensorView expanded_scale;
  TensorView row_index;
  TensorView expert_tokens;
  TensorView valid_rows;
  TensorView dropped_rows;
};

Status init_routing(Context& ctx, const InitRoutingArgs& args);

// The rows that a cutoff keeps, for init_routing's active_rows: with sk the integer part of
// K * topk_scaling_factor, min(T * K, max(T, floor_tokens) * sk). Rows cut off are the last in
// sorted order; the weights of the others stay as they are. As MindIE's enable_init_routing_cutoff
// at ep_level 1, whose floor_tokens are 65536. invalid_argument for a negative size, a factor
// outside (0, 1], an sk of 0, a T * K that overflows; *rows is then unchanged.
Status cutoff_rows(int64_t T, int64_t K, double topk_scaling_factor, int64_t floor_tokens,
                   int64_t* rows) noexcept;

// clipped[e] = min(cumsum[e], rows), both [E] i64: the expert_tokens of the rows that are left, for
// grouped_matmul.
Status clip_cumsum(const ConstTensorView& cumsum, int64_t rows, const TensorView& clipped) noexcept;

}  // namespace moeops
