// SPDX-License-Identifier: Apache-2.0
#include <moeops/ref/ref.h>

#include "tools/opdiff/operators/common.h"

namespace moeops::tools {

namespace {

ref::Weights weights_of(Call& call) {
  ref::Weights weights;
  weights.w = call.in("w");
  weights.transpose_w = call.params().flag("transpose_w");
  weights.w_scale = call.in("w_scale");
  return weights;
}

TensorView output_of(Call& call, const ref::Weights& weights, DType x) {
  return call.out("y", out_dtype(call.params(), x),
                  {call.dim("x", 0), call.dim("w", weights.transpose_w ? 1 : 0)});
}

void make_weights(Maker& maker, int64_t N, int64_t K) {
  if (maker.params().flag("transpose_w")) {
    maker.integers("w", DType::kS8, {K, N}, -127, 127);
  } else {
    maker.integers("w", DType::kS8, {N, K}, -127, 127);
  }
}

Status run_quant_matmul(Call& call) {
  const ref::Weights weights = weights_of(call);
  QuantMatmulArgs args;
  args.x = call.in("x");
  args.x_scale = call.in("x_scale");
  args.bias = call.in("bias");
  args.offset = call.in("offset");
  args.y = output_of(call, weights, args.x.dtype);
  if (call.impl() == Impl::kRef) return ref::quant_matmul(weights, args);
  PackedWeights packed;
  MOEOPS_RETURN_IF_ERROR(pack_plain(call, weights, &packed));
  return quant_matmul(call.context(), packed, args);
}

void make_quant_matmul(Maker& maker) {
  const int64_t M = maker.dim("M"), K = maker.dim("K"), N = maker.dim("N");
  maker.integers("x", DType::kS8, {M, K}, -127, 127);
  make_weights(maker, N, K);
  maker.integers("bias", DType::kI32, {N}, -100000, 100000);
  const DType y = out_dtype(maker.params(), DType::kS8);
  if (y == DType::kI32) return;
  maker.uniform("w_scale", {N}, 0.001f, 0.01f);
  maker.uniform("x_scale", {M}, 0.001f, 0.01f);
  if (y == DType::kS8) maker.uniform("offset", {1}, -8.0f, 8.0f);
}

Status run_w8a8_linear(Call& call) {
  const ref::Weights weights = weights_of(call);
  W8a8LinearArgs args;
  args.x = call.in("x");
  args.bias = call.in("bias");
  args.y = output_of(call, weights, args.x.dtype);
  if (call.impl() == Impl::kRef) return ref::w8a8_linear(weights, args);
  PackedWeights packed;
  MOEOPS_RETURN_IF_ERROR(pack_plain(call, weights, &packed));
  return w8a8_linear(call.context(), packed, args);
}

void make_w8a8_linear(Maker& maker) {
  const int64_t M = maker.dim("M"), K = maker.dim("K"), N = maker.dim("N");
  maker.normal("x", maker.dtype(), {M, K});
  make_weights(maker, N, K);
  out_dtype(maker.params(), maker.dtype());
  maker.uniform("w_scale", {N}, 0.001f, 0.01f);
  maker.normal("bias", DType::kF32, {N});
}

}  // namespace

Operator quant_matmul_operator() { return {"quant_matmul", run_quant_matmul, make_quant_matmul}; }

Operator w8a8_linear_operator() { return {"w8a8_linear", run_w8a8_linear, make_w8a8_linear}; }

}  // namespace moeops::tools
