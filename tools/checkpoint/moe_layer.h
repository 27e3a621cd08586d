// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <moeops/fused/moe_layer.h>
#include <moeops/ops/core/context.h>
#include <moeops/ops/gating_top_k.h>
#include <moeops/ops/packed_weights.h>
#include <moeops/ops/swiglu.h>

#include <cstdint>
#include <vector>

#include "tools/checkpoint/checkpoint.h"

namespace moeops::tools {

// One MoE layer of a model, its experts packed for moe_layer.
struct LoadedMoeLayer {
  int64_t experts = 0;       // E
  int64_t hidden = 0;        // H
  int64_t intermediate = 0;  // I
  PackedWeights w13;         // [E, 2I, H]
  PackedWeights w2;          // [E, H, I]
  PackedWeights shared_w13;  // [1, 2Is, H]: a model's shared experts are one wide one; or nothing
  PackedWeights shared_w2;   // [1, H, Is]
  std::vector<float> b13;    // [E, 2I] in the order of swiglu.gate, or empty
  std::vector<float> b2;     // [E, H], or empty
  SwigluParams swiglu;

  std::vector<float> router;       // [E, H]: logits = router * x (+ router_bias)
  std::vector<float> router_bias;  // [E], or empty
  std::vector<float> score_bias;   // [E], or empty: gating_top_k's bias
  GatingTopKArgs gating;           // the parameters; the views are absent

  MoeLayerWeights weights() const {
    return {&w13, &w2, shared_w13.packed() ? &shared_w13 : nullptr,
            shared_w2.packed() ? &shared_w2 : nullptr};
  }
};

// Packs model.layers.<layer> into f32, bf16 or s8 (quantised, unless the model is int8), expert by
// expert out of the mapped files, on all workers of the context. The layouts, told by their names:
//
//   DeepSeek, Qwen3   mlp.experts.<e>.{gate,up,down}_proj.weight [I, H], [I, H], [H, I]; mlp.gate;
//                     mlp.gate.e_score_correction_bias and mlp.shared_experts.* where there are
//   Mixtral           block_sparse_moe.experts.<e>.{w1,w3,w2}.weight; block_sparse_moe.gate
//   GPT-OSS           mlp.experts.{gate_up,down}_proj [E, H, 2I], [E, I, H], gate and up
//                     interleaved, with _bias; mlp.router with bias
//
// Weights are F32, BF16, F16, or I8 with <weight>_scale [N] or [N, 1] of one of the others. An
// Error names the tensor or the config's field that is missing, malformed or of another kind:
// MXFP4, block-wise or asymmetric int8.
LoadedMoeLayer load_moe_layer(Context& ctx, Checkpoint& checkpoint, int64_t layer, DType dtype);

}  // namespace moeops::tools
