// SPDX-License-Identifier: Apache-2.0
#pragma once

// The naive reference: every operator in plain loops, slow and obviously right, for telling which
// number of an accelerator or of an optimised kernel is wrong. An operator's contract - shapes,
// mathematics, errors - stands in its header; here are the functions that carry it out without a
// context: one thread, double accumulation for f32 and bf16 products, exact s32 for s8, exp and
// tanh in double, everything else in the f32 order of the contract. They allocate their scratch.
//
// GEMMs take plain weights here, not packed ones.

#include <moeops/fused/moe_layer.h>
#include <moeops/ops/dequant_swiglu_quant.h>
#include <moeops/ops/finalize_routing.h>
#include <moeops/ops/gating_top_k.h>
#include <moeops/ops/grouped_matmul.h>
#include <moeops/ops/grouped_matmul_swiglu_quant.h>
#include <moeops/ops/init_routing.h>
#include <moeops/ops/swiglu.h>
#include <moeops/ops/token_permute.h>
#include <moeops/quant/dynamic_quant.h>
#include <moeops/quant/quant_matmul.h>
#include <moeops/quant/w8a8_linear.h>

namespace moeops::ref {

Status gating_top_k(const GatingTopKArgs& args) noexcept;
Status init_routing(const InitRoutingArgs& args) noexcept;
Status token_permute(const TokenPermuteArgs& args) noexcept;
Status token_unpermute(const TokenUnpermuteArgs& args) noexcept;
Status permute_with_map(const PermuteWithMapArgs& args) noexcept;
Status unpermute_with_map(const UnpermuteWithMapArgs& args) noexcept;
Status finalize_routing(const FinalizeRoutingArgs& args) noexcept;

// The rows that a cutoff keeps, for init_routing's active_rows: with sk the integer part of
// K * topk_scaling_factor, min(T * K, max(T, floor_tokens) * sk). Rows cut off are the last in
// sorted order. As MindIE's enable_init_routing_cutoff at ep_level 1. invalid_argument for a
// negative size, a factor outside (0, 1], an sk of 0, a T * K that overflows.
Status cutoff_rows(int64_t T, int64_t K, double topk_scaling_factor, int64_t floor_tokens,
                   int64_t* rows) noexcept;

// clipped[e] = min(cumsum[e], rows), both [E] i64: the expert_tokens of the rows that are left,
// for grouped_matmul.
Status clip_cumsum(const ConstTensorView& cumsum, int64_t rows, const TensorView& clipped) noexcept;

// w [E, N, K], or [E, K, N] with transpose_w; w_scale [E, N] f32 belongs to s8 weights.
struct Weights {
  ConstTensorView w;
  bool transpose_w = false;
  ConstTensorView w_scale;
};

Status grouped_matmul(const Weights& weights, const GroupedMatmulArgs& args) noexcept;
Status grouped_matmul_swiglu_quant(const Weights& weights,
                                   const GroupedMatmulSwigluQuantArgs& args) noexcept;

// Of one matrix: w [N, K], or [K, N] with transpose_w; w_scale [N], or [1] for all channels.
Status quant_matmul(const Weights& weights, const QuantMatmulArgs& args) noexcept;
Status w8a8_linear(const Weights& weights, const W8a8LinearArgs& args) noexcept;

Status dynamic_quant(const DynamicQuantArgs& args) noexcept;
Status swiglu(const SwigluArgs& args) noexcept;
Status dequant_swiglu_quant(const DequantSwigluQuantArgs& args) noexcept;

// The scales belong to s8 weights, the shared views to layers that have shared experts.
struct MoeLayerWeights {
  ConstTensorView w13, w13_scale, w2, w2_scale;
  ConstTensorView shared_w13, shared_w13_scale, shared_w2, shared_w2_scale;
};

Status moe_layer(const MoeLayerWeights& weights, const MoeLayerArgs& args) noexcept;

}  // namespace moeops::ref
