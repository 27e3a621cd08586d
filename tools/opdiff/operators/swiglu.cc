// SPDX-License-Identifier: Apache-2.0
#include <moeops/ops/dequant_swiglu_quant.h>
#include <moeops/ops/swiglu.h>
#include <moeops/ref/ref.h>

#include "tools/opdiff/operators/swiglu_params.h"

namespace moeops::tools {

namespace {

Status run_swiglu(Call& call) {
  SwigluArgs args;
  args.x = call.in("x");
  args.swiglu = swiglu_params(call.params());
  args.y = call.out("y", args.x.present() ? args.x.dtype : DType::kF32,
                    {call.dim("x", 0), call.dim("x", 1) / 2});
  if (call.impl() == Impl::kRef) return ref::swiglu(args);
  return swiglu(call.context(), args);
}

void make_swiglu(Maker& maker) {
  const SwigluParams swiglu = swiglu_params(maker.params());
  maker.normal("x", maker.dtype(), {maker.dim("M"), 2 * maker.dim("I")}, 2.0f);
  const double rounding = maker.dtype() == DType::kBf16  ? 0.008
                          : maker.dtype() == DType::kF16 ? 0.001
                                                         : 3e-6;
  // gelu's 1 + tanh cancels for a negative gate, and leaves an error that is absolute.
  const bool cancels = swiglu.activation == GatedActivation::kGeluTanh;
  maker.tolerance("y", Close{rounding, cancels ? 1e-5 : 1e-7});
}

Status run_dequant_swiglu_quant(Call& call) {
  const int64_t M = call.dim("x", 0);
  DequantSwigluQuantArgs args;
  args.x = call.in("x");
  args.weight_scale = call.in("weight_scale");
  args.x_scale = call.in("x_scale");
  args.group_list = call.in("group_list");
  args.bias = call.in("bias");
  args.quant_scale = call.in("quant_scale");
  args.swiglu = swiglu_params(call.params());
  args.q = call.out("q", DType::kS8, {M, call.dim("x", 1) / 2});
  args.scale = call.out("scale", DType::kF32, {M});
  if (call.impl() == Impl::kRef) return ref::dequant_swiglu_quant(args);
  return dequant_swiglu_quant(call.context(), args);
}

void make_dequant_swiglu_quant(Maker& maker) {
  const int64_t M = maker.dim("M"), I = maker.dim("I"), E = maker.dim("E");
  swiglu_params(maker.params());
  maker.integers("x", DType::kI32, {M, 2 * I}, -60000, 60000);
  maker.uniform("weight_scale", {E, 2 * I}, 0.001f, 0.01f);
  maker.uniform("x_scale", {M}, 0.001f, 0.01f);
  make_group_list(maker, E, M);
  maker.normal("bias", DType::kF32, {E, 2 * I});
  maker.uniform("quant_scale", {E, I}, 0.5f, 2.0f);
  tolerate_requantised(maker, "q", "scale");
}

}  // namespace

Operator swiglu_operator() { return {"swiglu", run_swiglu, make_swiglu}; }

Operator dequant_swiglu_quant_operator() {
  return {"dequant_swiglu_quant", run_dequant_swiglu_quant, make_dequant_swiglu_quant};
}

}  // namespace moeops::tools
