// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/status.h>
#include <moeops/ops/core/tensor.h>

namespace moeops {

// token_permute: the tokens in the order of their experts, for any expert ids.
//
// SHAPES  N = T * K slots, slot t * K + k is the k-th choice of token t
//   tokens         [T, H]  f32 | bf16 | f16   rows may be strided
//   expert_ids     [T, K]  i32
//   permuted       [M, H]  tokens' dtype      rows may be strided
//   sorted_indices [N]     i32
//
// DEFINITION
//   M = N                                     with num_out_tokens = 0
//       min(N, num_out_tokens)                above 0
//       max(0, N + num_out_tokens)            below 0
//   i = 0
//   for slot in the slots by (expert id, slot) ascending:
//     sorted_indices[slot] = i                # of all N slots, also where i >= M
//     if i < M: permuted[i] = tokens[slot / K]
//     i += 1
//
// REGULARITIES  As init_routing, which knows the number of experts and can leave out slots.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, a negative expert id, more slots than i32 counts, an output overlapping an input
//   or another output. out_of_memory: scratch; nothing is written.
// EMPTY, NAN  T, H, K may be 0. Values are copied, whatever they are.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact; the sort is stable.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeTokenPermute. There is no number of experts: any id of 0 and above is
//   legal.
struct TokenPermuteArgs {
  ConstTensorView tokens;
  ConstTensorView expert_ids;
  int64_t num_out_tokens = 0;
  TensorView permuted;
  TensorView sorted_indices;
};

Status token_permute(Context& ctx, const TokenPermuteArgs& args);

// token_unpermute: the weighted sum of each token's rows, the way back from token_permute.
//
// SHAPES  N = T * K
//   permuted       [M, H]  f32 | bf16 | f16   rows may be strided
//   sorted_indices [N]     i32
//   probs          [T, K]  f32                optional (absent: K = 1, probs 1)
//   tokens         [T, H]  permuted's dtype   rows may be strided
//
// DEFINITION
//   for t in 0 .. T:
//     acc = 0                                 # [H], f32
//     for k in 0 .. K:                        # ascending
//       row, p = sorted_indices[t * K + k], probs[t][k]
//       if row < 0 or row >= M or p == 0: skip the slot
//       acc = fma(p, permuted[row], acc)
//     tokens[t] = round(acc)
//
// REGULARITIES  K is 1 to 10: the call reads K rows, scattered, for each that it writes.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, tokens overlapping an input. out_of_memory: scratch; nothing is written.
// EMPTY, NAN  All sizes may be 0. A NaN or infinity in a row reaches its token only, and not when
//   its prob is 0.
// ALIASING, ALIGNMENT  tokens overlaps nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact: each element has one accumulator, k ascending.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeTokenUnpermute. Slots without a row and those of weight 0 are skipped,
//   so that nothing a dropped slot refers to comes back.
struct TokenUnpermuteArgs {
  ConstTensorView permuted;
  ConstTensorView sorted_indices;
  ConstTensorView probs;
  TensorView tokens;
};

Status token_unpermute(Context& ctx, const TokenUnpermuteArgs& args);

// permute_with_map: the tokens of each expert, as a map of who goes where says.
//
// SHAPES
//   tokens         [T, H]  f32 | bf16 | f16   rows may be strided
//   map            [T, E]  bool
//   probs          [T, E]  f32                optional
//   permuted       [M, H]  tokens' dtype      rows may be strided
//   sorted_indices [M]     i32
//   permuted_probs [M]     f32                there if probs is
//
// DEFINITION
//   for e in 0 .. E:
//     chosen = the tokens t with map[t][e], ascending
//     drop_and_pad: chosen = the first num_out_tokens / E of
//                            chosen, then the tokens without map[t][e], ascending
//     for t in chosen: the next row is
//       permuted = tokens[t]; sorted_indices = t; permuted_probs = probs[t][e]
//   M is the number of rows: the number of places that map sets, or with drop_and_pad
//   num_out_tokens, which is not read without.
//
// REGULARITIES  map sets 1 to 10 places a token, of 8 to 512. Training routes so, with drop_and_pad
//   for sizes that do not depend on the data.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, more tokens than i32 counts, one of probs and permuted_probs without the other,
//   an output overlapping an input or another output; with drop_and_pad a num_out_tokens that is no
//   multiple of E, or num_out_tokens / E not in [1, T]. out_of_memory: scratch; nothing is written.
// EMPTY, NAN  T, E, H and M may be 0; with drop_and_pad T = 0 or E = 0 needs num_out_tokens = 0.
//   Values are copied, whatever they are.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeTokenPermuteWithRoutingMap. sorted_indices is the token of each row, in
//   both modes. A padding row carries its prob like any other, and is added on the way back.
struct PermuteWithMapArgs {
  ConstTensorView tokens;
  ConstTensorView map;
  ConstTensorView probs;
  bool drop_and_pad = false;
  int64_t num_out_tokens = 0;
  TensorView permuted;
  TensorView sorted_indices;
  TensorView permuted_probs;
};

Status permute_with_map(Context& ctx, const PermuteWithMapArgs& args);

// unpermute_with_map: the weighted sum of each token's rows, the way back from permute_with_map.
//
// SHAPES
//   permuted       [M, H]  f32 | bf16 | f16   rows may be strided
//   sorted_indices [M]     i32
//   permuted_probs [M]     f32                optional (absent: 1)
//   tokens         [T, H]  permuted's dtype   rows may be strided; T is the parameter num_tokens
//
// DEFINITION
//   acc = 0                                   # [T, H], f32
//   for i in 0 .. M:                          # ascending
//     acc[sorted_indices[i]] += permuted_probs[i] * permuted[i]
//   tokens = round(acc)
//
// REGULARITIES  As permute_with_map: a token has a few rows, one an expert, far apart.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes
//   that disagree, a negative num_tokens, an index outside [0, T), tokens overlapping an input.
//   out_of_memory: scratch; nothing is written.
// EMPTY, NAN  All sizes may be 0. A NaN or infinity in a row reaches its token only.
// ALIASING, ALIGNMENT  tokens overlaps nothing. Views need their element's alignment.
// DETERMINISM  Bit-exact: each element has one accumulator, i ascending; multiply and add round
//   separately.
// THREAD-SAFETY  One call at a time per context.
// SEMANTICS  Ascend CANN MoeTokenUnpermuteWithRoutingMap.
struct UnpermuteWithMapArgs {
  ConstTensorView permuted;
  ConstTensorView sorted_indices;
  ConstTensorView permuted_probs;
  int64_t num_tokens = 0;
  TensorView tokens;
};

Status unpermute_with_map(Context& ctx, const UnpermuteWithMapArgs& args);

}  // namespace moeops
