// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include <cmath>

#include "tools/opdiff/operators/swiglu_params.h"

namespace moeops::tools {

namespace {

Status run(Call& call) {
  ref::Weights weights;
  weights.w = call.in("w");
  weights.transpose_w = call.params().flag("transpose_w");
  weights.w_scale = call.in("w_scale");

  const int64_t M = call.dim("x", 0);
  GroupedMatmulSwigluQuantArgs args;
  args.x = call.in("x");
  args.group_list = call.in("group_list");
  args.list_type = list_type(call.params());
  args.bias = call.in("bias");
  args.x_scale = call.in("x_scale");
  args.swiglu = swiglu_params(call.params());
  args.q = call.out("q", DType::kS8, {M, call.dim("w", weights.transpose_w ? 2 : 1) / 2});
  args.scale = call.out("scale", DType::kF32, {M});
  if (call.impl() == Impl::kRef) return ref::grouped_matmul_swiglu_quant(weights, args);
  PackedWeights packed;
  MOEOPS_RETURN_IF_ERROR(
      pack_weights(call, weights, WeightRole::kGateUp, args.swiglu.gate, &packed));
  return grouped_matmul_swiglu_quant(call.context(), packed, args);
}

void make(Maker& maker) {
  const int64_t M = maker.dim("M"), K = maker.dim("K"), I = maker.dim("I"), E = maker.dim("E");
  swiglu_params(maker.params());
  maker.integers("x", DType::kS8, {M, K}, -127, 127);
  if (maker.params().flag("transpose_w")) {
    maker.integers("w", DType::kS8, {E, K, 2 * I}, -127, 127);
  } else {
    maker.integers("w", DType::kS8, {E, 2 * I, K}, -127, 127);
  }
  make_group_list(maker, E, M);
  // The sums deviate by about 73 * 73 * sqrt(K); gate and up should by about 1.
  const float unit = 1.0f / (73.0f * std::sqrt(static_cast<float>(K)));
  maker.uniform("w_scale", {E, 2 * I}, 0.5f * unit, 1.5f * unit);
  maker.uniform("x_scale", {M}, 0.5f / 73.0f, 1.5f / 73.0f);
  maker.normal("bias", DType::kF32, {E, 2 * I});
  tolerate_requantised(maker, "q", "scale");
}

}  // namespace

Operator grouped_matmul_swiglu_quant_operator() {
  return {"grouped_matmul_swiglu_quant", run, make};
}

}  // namespace moeops::tools
