// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/ops/core/context.h>
#include <moeops/ops/core/tensor.h>
#include <moeops/ops/packed_weights.h>
#include <moeops/ops/swiglu.h>

namespace moeops {

// What moe_layer computes on the way, for finding the first step that goes wrong. Each view is
// optional; N = T * K slots, slot s = t * K + k.
struct MoeLayerStages {
  TensorView x_q;      // [T, H] s8   x as the routed experts see it        s8 weights only
  TensorView x_scale;  // [T]    f32                                        s8 weights only
  TensorView h;        // [N, I] f32  swiglu(w13 * x + b13), not yet rounded or quantised
  TensorView h_q;      // [N, I] s8                                         s8 weights only
  TensorView h_scale;  // [N]    f32                                        s8 weights only
  TensorView y;        // [N, H] f32  expert(x), not yet weighted
  TensorView shared;   // [T, H] f32  the sum of the shared experts         shared experts only
};

// moe_layer: the experts of one rank in one call: two GEMMs, SwiGLU between them, and the weighted
// sum of each token's experts.
//
// SHAPES
//   x          [T, H]       f32 | bf16 | f16  rows may be strided
//   expert_ids [T, K]       i32
//   weights    [T, K]       f32
//   w13        [E, 2I, H]   f32 | bf16 | s8   gate and up, as swiglu.gate says
//   w2         [E, H, I]    w13's dtype
//   b13        [E, 2I]      f32               optional
//   b2         [E, H]       f32               optional
//   shared_w13 [S, 2Is, H]  w13's dtype       optional, together with shared_w2; Is is any size
//   shared_w2  [S, H, Is]   w13's dtype
//   out        [T, H]       x's dtype         rows may be strided
//   The weights are packed (optimised) or plain (reference); in s8 each has its scale per output
//   channel: [E, 2I], [E, H], [S, 2Is], [S, H]. (x, w) is (f32, f32), (bf16, bf16) or (any, s8).
//
// DEFINITION
//   for t in 0 .. T:
//     acc = 0                                 # [H], f32
//     for k in 0 .. K:                        # ascending; not the masked slots
//       acc = fma(weights[t][k], expert(expert_ids[t][k], x[t]), acc)
//     for s in 0 .. S:
//       acc = acc + shared_expert(s, x[t])
//     out[t] = round(acc)
//
//   expert(e, x):                             # f32 but for its GEMMs
//     h = swiglu(gemm(w13[e], x) + b13[e])
//     return gemm(w2[e], h) + b2[e]
//   gemm of f32 weights:  accumulates in f32
//           bf16:         its input is rounded to bf16 first
//           s8:           its input goes through dynamic_quant, x once per token and h once per
//                         slot; then f32(acc) * w_scale[n] * scale
//   weight_on_input: K is 1; the routed expert sees f32(x[t] * weights[t][0]), rounded or quantised
//     after that, and its output is added unweighted. Shared experts see x[t] itself.
//   allow_masked: the ids -1 and E mask a slot, whose weight is not read. Its rows of the stages
//     are 0; under weight_on_input so are x_q and x_scale.
//
// REGULARITIES  A decode step has 1 to 64 tokens and streams the weights of most experts; prefill
//   has 256 and more and multiplies. Routing is never even.
//
// ERRORS  invalid_argument, found before anything is written: a missing or malformed view, sizes or
//   dtypes that disagree, an odd number of rows in w13 or shared_w13, an id outside [0, E) that
//   allow_masked does not name, weight_on_input with K other than 1, one of shared_w13 and
//   shared_w2 without the other, scales that are missing in s8 or given elsewhere, H, I or Is above
//   65536 in s8, T * K or T * S above 2^31 - 1, a stage that the weights do not have, a limit that
//   is negative or NaN with swiglu_oai, a scratch_limit that is negative or below what one token
//   takes, an output overlapping an input or another output.
// EMPTY, NAN  Any size may be 0: without slots or shared experts out is 0. A NaN or infinity in a
//   token's x or weights reaches that token's out only. Weights of 0 do multiply.
// ALIASING, ALIGNMENT  Outputs overlap nothing. Views need their element's alignment.
// DETERMINISM  A token's result depends neither on the number of workers nor on the other tokens.
// THREAD-SAFETY  One call at a time per context; weights are only read.
// MEMORY  Scratch is in the context and grows with T * K, never with T * E: a slot takes 4 * I
//   bytes for h (2 * I in bf16), in s8 I more for h_q, and 4 * H for y; so does a token for each
//   shared expert; a token in s8 takes H for x_q; a worker takes some MiB for the rows and sums
//   that it is at. T = 4096 of K = 8, H = 2048, I = 768 in s8: 403 MB, of which y is 268 and h 101.
//   scratch_limit cuts the call into runs of tokens that take no more than so many bytes each; the
//   result is the same, bit for bit, but every run reads its experts' weights again.
// SEMANTICS  The chain init_routing, grouped_matmul, swiglu, grouped_matmul, finalize_routing of
//   MindIE's MoE layers, without its rows cut off; an id may repeat within a token.
struct MoeLayerArgs {
  ConstTensorView x;
  ConstTensorView expert_ids;
  ConstTensorView weights;
  ConstTensorView b13;
  ConstTensorView b2;
  SwigluParams swiglu;
  bool weight_on_input = false;
  bool allow_masked = false;
  int64_t scratch_limit = 0;  // in bytes; 0: none
  TensorView out;
  MoeLayerStages stages;
};

// All of one dtype; the shared ones are given together or not at all.
struct MoeLayerWeights {
  const PackedWeights* w13 = nullptr;         // [E, 2I, H], packed as gate and up, as swiglu.gate
  const PackedWeights* w2 = nullptr;          // [E, H, I]
  const PackedWeights* shared_w13 = nullptr;  // [S, 2Is, H], packed as gate and up
  const PackedWeights* shared_w2 = nullptr;   // [S, H, Is]
};

Status moe_layer(Context& ctx, const MoeLayerWeights& weights, const MoeLayerArgs& args);

}  // namespace moeops
