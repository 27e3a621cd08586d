// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <algorithm>
#include <cmath>

#include "tools/opdiff/operators/swiglu_params.h"

namespace moeops::tools {

namespace {

Status run(Call& call) {
  ref::MoeLayerWeights weights;
  weights.w13 = call.in("w13");
  weights.w13_scale = call.in("w13_scale");
  weights.w2 = call.in("w2");
  weights.w2_scale = call.in("w2_scale");
  weights.shared_w13 = call.in("shared_w13");
  weights.shared_w13_scale = call.in("shared_w13_scale");
  weights.shared_w2 = call.in("shared_w2");
  weights.shared_w2_scale = call.in("shared_w2_scale");

  MoeLayerArgs args;
  args.x = call.in("x");
  args.expert_ids = call.in("expert_ids");
  args.weights = call.in("weights");
  args.b13 = call.in("b13");
  args.b2 = call.in("b2");
  args.swiglu = swiglu_params(call.params());
  args.weight_on_input = call.params().flag("weight_on_input");
  args.allow_masked = call.params().flag("allow_masked");

  const int64_t T = call.dim("x", 0), H = call.dim("x", 1), I = call.dim("w2", 2);
  const int64_t N = call.dim("expert_ids", 0) * call.dim("expert_ids", 1);
  const bool s8 = weights.w13.dtype == DType::kS8;
  MoeLayerStages& stages = args.stages;
  if (s8) {
    stages.x_q = call.optional_out("stage.x_q", DType::kS8, {T, H});
    stages.x_scale = call.optional_out("stage.x_scale", DType::kF32, {T});
  }
  stages.h = call.optional_out("stage.h", DType::kF32, {N, I});
  if (s8) {
    stages.h_q = call.optional_out("stage.h_q", DType::kS8, {N, I});
    stages.h_scale = call.optional_out("stage.h_scale", DType::kF32, {N});
  }
  stages.y = call.optional_out("stage.y", DType::kF32, {N, H});
  if (weights.shared_w13.present()) {
    stages.shared = call.optional_out("stage.shared", DType::kF32, {T, H});
  }
  args.out = call.out("out", args.x.present() ? args.x.dtype : DType::kF32, {T, H});
  if (call.impl() == Impl::kRef) return ref::moe_layer(weights, args);

  PackedWeights w13, w2, shared_w13, shared_w2;
  const Gate gate = args.swiglu.gate;
  const auto pack = [&](const ConstTensorView& w, const ConstTensorView& scale, WeightRole role,
                        PackedWeights* packed) {
    return w.present() ? pack_weights(call, {w, false, scale}, role, gate, packed) : Status();
  };
  MOEOPS_RETURN_IF_ERROR(pack(weights.w13, weights.w13_scale, WeightRole::kGateUp, &w13));
  MOEOPS_RETURN_IF_ERROR(pack(weights.w2, weights.w2_scale, WeightRole::kPlain, &w2));
  MOEOPS_RETURN_IF_ERROR(
      pack(weights.shared_w13, weights.shared_w13_scale, WeightRole::kGateUp, &shared_w13));
  MOEOPS_RETURN_IF_ERROR(
      pack(weights.shared_w2, weights.shared_w2_scale, WeightRole::kPlain, &shared_w2));
  MoeLayerWeights packed;
  packed.w13 = &w13;
  packed.w2 = &w2;
  if (weights.shared_w13.present()) packed.shared_w13 = &shared_w13;
  if (weights.shared_w2.present()) packed.shared_w2 = &shared_w2;
  return moe_layer(call.context(), packed, args);
}

// Weights [E, N, K] whose products with a normal x deviate by about 1.
void make_weights(Maker& maker, const std::string& name, int64_t E, int64_t N, int64_t K) {
  const float unit = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(K, 1)));
  if (maker.dtype() == DType::kS8) {
    maker.integers(name.c_str(), DType::kS8, {E, N, K}, -127, 127);
    // Uniform in [-127, 127] deviates by 73.
    maker.uniform((name + "_scale").c_str(), {E, N}, 0.5f * unit / 73.0f, 1.5f * unit / 73.0f);
  } else {
    maker.normal(name.c_str(), maker.dtype(), {E, N, K}, unit);
  }
}

// dtype is that of the weights; x is f32 where they are s8.
void make(Maker& maker) {
  const int64_t T = maker.dim("T"), H = maker.dim("H"), I = maker.dim("I");
  const int64_t E = maker.dim("E"), K = maker.dim("K");
  const int64_t S = maker.dim("S", 0), Is = maker.dim("Is", I);
  const bool s8 = maker.dtype() == DType::kS8;
  const bool bf16 = maker.dtype() == DType::kBf16;
  swiglu_params(maker.params());
  maker.params().flag("weight_on_input");
  maker.normal("x", s8 ? DType::kF32 : maker.dtype(), {T, H});
  if (maker.params().flag("allow_masked")) {
    maker.integers("expert_ids", DType::kI32, {T, K}, -1, E);
  } else {
    maker.expert_ids("expert_ids", T, K, E);
  }
  maker.uniform("weights", {T, K}, 0.0f, 1.0f);
  make_weights(maker, "w13", E, 2 * I, H);
  make_weights(maker, "w2", E, H, I);
  maker.normal("b13", DType::kF32, {E, 2 * I});
  maker.normal("b2", DType::kF32, {E, H});
  if (S > 0) {
    make_weights(maker, "shared_w13", S, 2 * Is, H);
    make_weights(maker, "shared_w2", S, H, Is);
  }

  // Both GEMMs of an expert of this width: f32 sums of n products with weights of deviation
  // 1 / sqrt(n). The error of h reaches y as it is.
  const auto sum_error = [&](int64_t n) {
    return s8 ? 1e-6 : gemm_atol(n) / std::sqrt(static_cast<double>(std::max<int64_t>(n, 1)));
  };
  const auto sums = [&](int64_t width) { return 2 * sum_error(H) + sum_error(width); };
  // An h on the edge of rounding may go either way, which moves y by its step times a weight. With
  // |h| up to 16, the step is up to 16 / 127 in s8 and 1 / 16 in bf16; weights go to 2.6 / sqrt(n)
  // in s8 and mostly stay below 4 / sqrt(n) in bf16. One such h is all that an output will see.
  const auto flip = [&](int64_t width) {
    const double times_root = s8 ? 0.33 : bf16 ? 0.25 : 0.0;
    return times_root / std::sqrt(static_cast<double>(std::max<int64_t>(width, 1)));
  };
  const double routed = static_cast<double>(K) * sums(I) + flip(I);
  const double shared = S > 0 ? static_cast<double>(S) * sums(Is) + flip(Is) : 0.0;
  maker.tolerance("stage.h", Close{1e-5, 4 * sum_error(H)});
  maker.tolerance("stage.y", Close{1e-5, sums(I) + flip(I)});
  if (s8) tolerate_requantised(maker, "stage.h_q", "stage.h_scale");
  if (S > 0) maker.tolerance("stage.shared", Close{1e-5, shared});
  maker.tolerance("out", Close{bf16 ? 0.008 : 1e-5, routed + shared});
}

}  // namespace

Operator moe_layer_operator() { return {"moe_layer", run, make}; }

}  // namespace moeops::tools
