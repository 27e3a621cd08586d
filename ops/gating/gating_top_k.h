// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

namespace moeops {

enum class GatingScore { kSoftmax, kSigmoid };  // what makes scores of logits

enum class GroupSelect { kMax, kTop2Sum };  // what a group of experts is judged by

// gating_top_k: the k best experts of each token, and their weights.
//
// SHAPES
//   logits     [T, E]  f32 | bf16 | f16       rows may be strided
//   bias       [E]     f32                    optional (absent: 0)
//   finished   [T]     bool                   optional (absent: none)
//   weights    [T, K]  f32                    K is the parameter k
//   expert_ids [T, K]  i32
//   scores     [T, E]  f32                    optional
//   row_index  [T, K]  i32                    optional
//
// DEFINITION
//   for t in 0 .. T:                          # in f32
//     softmax:  n = exp(logits[t] - max(logits[t])); n = n / sum(n)       # the sum ascending
//     sigmoid:  n = 1 / (1 + exp(-logits[t]))
//     b = n + bias
//     with group_count > 1:
//       group g is the experts [g * E / group_count, (g + 1) * E / group_count)
//       its score is max(b in g), or the sum of the two largest b in g
//       b = -inf outside the k_group best groups
//     ids = the k largest b, descending
//     y = n at ids                            # without the bias
//     renormalize: y = y / (sum(y) + eps)     # the sum in the order of ids
//     weights[t] = y * routed_scaling_factor
//     expert_ids[t] = finished[t] ? E in all places : ids
//     scores[t] = n
//     row_index[t][k] = k * T + t
//   Of equal values, experts' or groups', the lower index wins. NaN ranks below every number, -inf
//   included; the ids of a token are distinct even so.
//
// REGULARITIES  E is 8 to 512, k 1 to 10. DeepSeek-V3: sigmoid, bias, 4 of 8 groups, top2_sum,
//   renormalize, factor 2.5. Qwen3, Mixtral: softmax, renormalize. GPT-OSS: softmax over the
//   selected logits, which is softmax with renormalize but for scores that underflow to 0.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, k or group_count or k_group below 1, an E that group_count does not divide,
//   k_group > group_count, k > E / group_count * k_group, a group of one expert with top2_sum, a
//   row_index that would not fit in i32, an output overlapping an input or another output.
//   out_of_memory: scratch; nothing is written.
// EMPTY, NAN  T may be 0; E may not, since k is at least 1. A NaN or infinity in a row of logits
//   reaches that token's outputs only.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  A token's outputs depend on its own logits alone, and their bits neither on the
//   number of workers nor on the ISA.
// ACCURACY  The optimised form takes exp from the vector layer (within 0.95 units in the last
//   place, simd_math.h), everything else in the order above. So its scores differ from the
//   reference's by at most 4 units with sigmoid, and by 4 + E with softmax (5 seen), where each
//   addition may round the other way. The choice and the weights follow from the scores exactly:
//   ids differ only where those differences turn the order of b.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeGatingTopK and MoeGatingTopKSoftmax, whose row_index is column-major,
//   too. NaN has a rank here, so that the ids are always legal.
struct GatingTopKArgs {
  ConstTensorView logits;
  ConstTensorView bias;
  ConstTensorView finished;
  int64_t k = 0;
  GatingScore score = GatingScore::kSoftmax;
  int64_t group_count = 1;
  int64_t k_group = 1;
  GroupSelect group_select = GroupSelect::kMax;
  bool renormalize = false;
  float routed_scaling_factor = 1.0f;
  float eps = 1e-20f;
  TensorView weights;
  TensorView expert_ids;
  TensorView scores;
  TensorView row_index;
};

Status gating_top_k(Context& ctx, const GatingTopKArgs& args);

}  // namespace moeops
